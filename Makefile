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
# Compares bits, and so belongs in the processes of the unit tests, which don't load OpenBLAS.
ON_REFERENCE_BLAS := integration_tests/test_architectures.py integration_tests/test_stress.py
# Processes that run the tests.
WORKERS ?= 2

.PHONY: help setup sample-model test-models check test stress crashtest soak demo bench bench-peers clean

help:
	@echo "make demo          show the cache at work, on a small real model"
	@echo "make test          run all tests"
	@echo "make check         ruff, formatting, mypy"
	@echo "make crashtest     kill writing processes at every step of I/O (minutes; a part of it is in make test)"
	@echo "make stress        ask three engines for 2,000 things from 64 threads and 64 tasks (a part is in make test)"
	@echo "make soak          a minute of two processes at full load in one cache folder, with kills"
	@echo "make bench         run the benchmarks, on a quiet machine, and write docs/performance.md"
	@echo "make bench-peers   compare with other caches, each in an environment of its own (compiles llama.cpp)"
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

# The dash: without this one, a test is skipped. It is under Google's Gemma Terms of Use.
test-models: sample-model
	-$(BIN)/python -m integration_tests.gemma_model

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: setup test-models
	$(BIN)/python -m pytest tests $(ON_REFERENCE_BLAS) --numprocesses $(WORKERS) --dist worksteal
	$(BIN)/python -m pytest integration_tests $(ON_REFERENCE_BLAS:%=--ignore=%) --numprocesses $(WORKERS) --dist worksteal

crashtest: setup
	CRASH_TEST=full $(BIN)/python -m pytest integration_tests/crash --deselect integration_tests/crash/test_soak.py --capture no --timeout 3600

soak: setup
	SOAK_SECONDS=60 $(BIN)/python -m pytest integration_tests/crash/test_soak.py --capture no

stress: setup
	OMLX_OPENBLAS=0 STRESS_REQUESTS=2000 $(BIN)/python -m pytest integration_tests/test_stress.py

demo: setup sample-model
	$(BIN)/omlx-plugins demo

bench: setup sample-model
	$(BIN)/python benchmarks/run_all.py
	$(BIN)/python benchmarks/report.py

bench-peers: setup sample-model
	$(BIN)/python benchmarks/peers/run.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find core omlx_plugins tests integration_tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
