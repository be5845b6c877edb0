from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import omlx_core
from omlx_core import CacheSettings
from omlx_core.cache.ssd_stats import SSDCacheStats
from omlx_core.errors import ModelNotFoundError
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins import plugins
from omlx_plugins.cli import main

TIMEOUT_S = 60


class FakeLoader:
    """Stands in for the class `Engine`; `loads` has what each load was asked for."""

    def __init__(self) -> None:
        self.engine = FakeEngine([FakeAnswer(["Hel", "", "lo"])])
        self.loads: list[dict[str, Any]] = []
        self.failure: BaseException | None = None

    def from_pretrained(self, model: str, **options: Any) -> FakeEngine:
        self.loads.append({"model": model, **options})
        if self.failure is not None:
            raise self.failure
        return self.engine


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> FakeLoader:
    loader = FakeLoader()
    monkeypatch.setitem(vars(omlx_core), "Engine", loader)
    return loader


@pytest.fixture
def engine(loader: FakeLoader) -> FakeEngine:
    return loader.engine


def generate(*arguments: str) -> int:
    return main(["generate", "--model", "some/model", *arguments])


# generate


def test_generate_streams_the_answer_to_stdout_and_the_reuse_to_stderr(engine, capsys):
    assert generate("Hi") == 0
    output = capsys.readouterr()
    assert output.out == "Hello\n"
    assert "prompt: 700 tokens, 512 reused from RAM, 128 from SSD; first token after 0.250 s" in output.err
    assert "answer: 5 tokens" in output.err
    assert "ended by stop" in output.err


def test_generate_sends_the_prompt_as_a_user_message(engine):
    generate("Hi")
    assert engine.calls == [([{"role": "user", "content": "Hi"}], {})]


def test_generate_continues_the_prompt_of_a_model_without_a_chat_template(engine):
    engine.has_chat_template = False
    generate("Once upon")
    assert engine.calls == [("Once upon", {})]


def test_a_dash_reads_the_prompt_from_standard_input(engine, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a\npipe"))
    generate("-")
    assert engine.calls[0][0] == [{"role": "user", "content": "from a\npipe"}]


def test_standard_input_that_is_not_text_is_an_error(loader, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert generate("-") == 2
    assert "standard input is not text" in capsys.readouterr().err
    assert loader.loads == []


@pytest.mark.parametrize("text", ["%", "100% sure?", "@file", "{}", "%(prog)s"])
def test_a_prompt_is_plain_text_whatever_it_starts_with(engine, text):
    assert generate(text) == 0
    assert engine.calls[0][0] == [{"role": "user", "content": text}]


def test_generation_flags_reach_the_engine(engine):
    flags = "--max-tokens 8 --temperature 0.5 --top-p 0.9 --top-k 40 --min-p 0.1 --seed 7 --stop a --stop b"
    generate(*flags.split(), "Hi")
    assert engine.calls[0][1] == {
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["a", "b"],
    }


def test_cache_flags_become_settings(loader):
    flags = (
        "--paged-ssd-cache-dir somewhere --paged-ssd-cache-max-size 50GB --hot-cache-max-size 20% --no-cache "
        "--initial-cache-blocks 64 --block-size 16 --adapter-path lora"
    )
    generate(*flags.split(), "Hi")
    cache = CacheSettings(
        paged_ssd_cache_dir="somewhere",
        paged_ssd_cache_max_size="50GB",
        hot_cache_max_size="20%",
        no_cache=True,
        initial_cache_blocks=64,
        block_size=16,
    )
    assert loader.loads == [{"model": "some/model", "adapter_path": "lora", "cache": cache}]


def test_a_flag_that_was_not_given_leaves_its_environment_variable_in_force(loader, monkeypatch):
    monkeypatch.setenv("OMLX_BLOCK_SIZE", "32")
    monkeypatch.setenv("OMLX_NO_CACHE", "true")
    monkeypatch.setenv("OMLX_INITIAL_CACHE_BLOCKS", "99")
    generate("--initial-cache-blocks", "64", "Hi")
    cache = loader.loads[0]["cache"]
    assert (cache.block_size, cache.no_cache, cache.initial_cache_blocks) == (32, True, 64)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--max-tokens", "0"], "max_tokens=0"),
        (["--top-p", "2"], "top_p=2.0"),
        (["--hot-cache-max-size", "12 bananas"], "hot_cache_max_size='12 bananas' is not a size"),
        (["--paged-ssd-cache-max-size", "150%"], "150%"),
        (["--block-size", "0"], "block_size=0"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_status_2_before_anything_is_loaded(loader, capsys, flags, complaint):
    assert generate(*flags, "Hi") == 2
    error = capsys.readouterr().err
    assert error.startswith("omlx-plugins: error: ")
    assert complaint in error
    assert error.count("\n") == 1
    assert loader.loads == []


def test_a_missing_model_is_one_line_and_exit_status_2(loader, capsys):
    loader.failure = ModelNotFoundError("there is no model at 'some/model':\n give a folder")
    assert generate("Hi") == 2
    assert capsys.readouterr().err == ("omlx-plugins: error: there is no model at 'some/model': give a folder\n")


def test_the_engine_is_closed_after_an_answer_and_after_an_interrupt(engine):
    engine.answers = [FakeAnswer(["Hel"], error=KeyboardInterrupt())]
    assert generate("Hi") == 130
    assert engine.is_closed
    assert engine.cancelled.is_set()


def test_a_defect_keeps_its_traceback(engine):
    engine.answers = [FakeAnswer(["Hel"], error=ZeroDivisionError())]
    with pytest.raises(ZeroDivisionError):
        generate("Hi")
    assert engine.is_closed


def test_main_puts_the_signal_handler_back(engine):
    before = signal.getsignal(signal.SIGTERM)
    generate("Hi")
    assert signal.getsignal(signal.SIGTERM) is before


SUBPROCESS = """
import itertools, sys, threading
import omlx_core
from omlx_core import GenerationChunk
from omlx_core.testing import FakeEngine
from omlx_plugins.cli import main

class Engine(FakeEngine):
    def stream(self, prompt, **options):
        yield GenerationChunk("first\\n", [1])
        {then}

    def close(self):
        print("closed", file=sys.stderr)

Engine.from_pretrained = classmethod(lambda cls, *args, **kwargs: cls())
vars(omlx_core)["Engine"] = Engine
sys.exit(main(["generate", "--model", "some/model", "Hi"]))
"""


def start(then: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SUBPROCESS.format(then=then)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )


def test_sigterm_closes_the_engine():
    with start("threading.Event().wait()") as process:
        assert process.stdout.readline() == "first\n"
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=TIMEOUT_S)
    assert error == "closed\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_a_reader_that_goes_away_is_no_error():
    with start("yield from itertools.repeat(GenerationChunk('x' * 4096, [1]))") as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        error = process.stderr.read()
        process.wait(TIMEOUT_S)
    assert error == "closed\n"
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("checkpoint_bytes", "held"), [(0, "3 blocks, 2.0 MiB;"), (2**20, "3 blocks, 2.0 MiB (1.0 MiB of checkpoints);")]
)
def test_generate_says_what_the_ssd_tier_holds(engine, capsys, checkpoint_bytes, held):
    stats = SSDCacheStats(num_blocks=3, size_bytes=2**21, checkpoint_bytes=checkpoint_bytes)
    engine.cache = types.SimpleNamespace(ssd=types.SimpleNamespace(stats=lambda: stats), flush=lambda timeout_s: True)
    assert generate("Hi") == 0
    assert f"SSD: {held} written: 0 B now, 0 B in 24 hours" in capsys.readouterr().err


# The other commands


def test_help_imports_no_mlx():
    code = (
        "import sys\n"
        "from omlx_plugins.cli import main\n"
        "try:\n    main(['generate', '--help'])\n"
        "except SystemExit as exc:\n    assert not exc.code\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('mlx', 'mlx_lm', 'transformers')])\n"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.endswith("\n[]\n")
    assert "20%" in output


def test_version_is_the_distributions(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert not exit_info.value.code
    assert capsys.readouterr().out == f"omlx-plugins {version('omlx-plugins')}\n"


@pytest.mark.parametrize("arguments", [[], ["generat"], ["generate", "Hi"], ["generate", "--mod", "x", "Hi"]])
def test_a_wrong_command_line_is_exit_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: omlx-plugins" in capsys.readouterr().err


def test_plugins_lists_the_adapters(capsys):
    assert main(["plugins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ADAPTER", "CLASS", "PLUGIN", "DESCRIPTION"]
    assert "omlx_plugins.langchain:ChatOMLX" in lines[1]
    assert "omlx_plugins.llama_index:OMLX" in lines[2]


def test_plugins_names_a_broken_plugin_in_one_line(monkeypatch, capsys):
    broken = types.SimpleNamespace(name="absent", value="no_such.plugin", module="no_such.plugin", dist=None)
    broken.load = lambda: __import__("no_such")
    plugins._discover.cache_clear()
    monkeypatch.setattr(plugins, "entry_points", lambda group: [broken])
    assert main(["plugins"]) == 0
    plugins._discover.cache_clear()
    error = capsys.readouterr().err
    assert error.startswith("omlx-plugins: warning: the plugin 'unknown distribution: absent'")
    assert error.count("\n") == 1


def test_sample_model_prints_its_path(monkeypatch, capsys, tmp_path):
    module = types.ModuleType("omlx_core.model.sample_model")
    module.ensure_sample_model = lambda: tmp_path
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["sample-model"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}{os.linesep}"


def test_demo_gets_the_model_and_the_given_cache_flags(monkeypatch):
    given: list[dict[str, Any]] = []
    module = types.ModuleType("omlx_plugins.demo.run")
    module.run = lambda **options: given.append(options) or 0
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["demo", "--hot-cache-max-size", "1GB"]) == 0
    assert main(["demo", "--model", "some/model", "--sections", "2"]) == 0
    assert given == [
        {"model": None, "num_sections": 6, "cache_options": {"hot_cache_max_size": "1GB"}},
        {"model": "some/model", "num_sections": 2, "cache_options": {}},
    ]


def test_demo_wants_a_context(capsys):
    assert main(["demo", "--sections", "0"]) == 2
    assert "--sections 0: give at least 1" in capsys.readouterr().err
