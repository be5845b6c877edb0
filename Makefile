# `make demo` and `make test` set up everything that they need. Written for make 3.81, which macOS ships.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux, MLX needs a backend: `make setup BACKEND=cuda13` is for NVIDIA GPUs.
ifeq ($(shell uname -s),Linux)
BACKEND ?= cpu
endif
comma := ,
EXTRAS := all$(if $(BACKEND),$(comma)$(BACKEND))
STAMP := $(VENV)/.setup-$(BACKEND)
# Processes that run the tests.
WORKERS ?= 2

.PHONY: help setup sample-model check test demo bench clean

help:
	@echo "make demo          show the cache at work, on a small real model"
	@echo "make test          run all tests"
	@echo "make check         ruff, formatting, mypy"
	@echo "make bench         run the benchmarks"
	@echo "make setup         create $(VENV) with everything that these need"
	@echo "make sample-model  fetch and convert the small real model"
	@echo "make clean         remove $(VENV) and what tools left behind"

setup: $(STAMP)

# Debian's python3 has venv but, without the package python3-venv, not the pip that goes in; pip itself can do that.
$(STAMP): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 is needed: make PYTHON=python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install "pip>=25.1"
	$(BIN)/python -m pip install --editable ".[$(EXTRAS)]" --group dev
	touch $@

sample-model: setup
	$(BIN)/python -m omlx_core.model.sample_model

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: setup sample-model
	$(BIN)/python -m pytest tests --numprocesses $(WORKERS) --dist worksteal
	$(BIN)/python -m pytest integration_tests --numprocesses $(WORKERS) --dist worksteal

demo: setup sample-model
	$(BIN)/omlx-plugins demo

bench: setup sample-model
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find core omlx_plugins tests integration_tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
