from __future__ import annotations

import importlib
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_llama
from tiny_prompts import BLOCK_SIZE, tokens

import omlx_plugins
from omlx_core import CacheSettings, Engine, ModelPool
from omlx_core.engine import shared
from omlx_core.errors import MissingDependencyError, UnknownPluginError
from omlx_core.state import registry
from omlx_core.state.registry import register_state_handler
from omlx_core.testing import FakeEngine
from omlx_plugins import PluginWarning, get_llm, hookimpl, list_adapters, plugins
from omlx_plugins.base import BaseOMLX

DOCS = Path(__file__).parents[2] / "docs"
BUILT_IN = [
    EntryPoint("langchain", "omlx_plugins.langchain.plugin", "omlx"),
    EntryPoint("llama-index", "omlx_plugins.llama_index.plugin", "omlx"),
]


@pytest.fixture(autouse=True)
def _fresh_discovery(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_handlers", {})
    for function in (plugins._discover, plugins.register_state_handlers):
        function.cache_clear()
    yield
    for function in (plugins._discover, plugins.register_state_handlers):
        function.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stand-in for installed distributions: the built-ins and the given plugins, these before those."""

    def install(*entry_points: EntryPoint) -> None:
        monkeypatch.setattr(plugins, "entry_points", lambda group: [*entry_points, *BUILT_IN])

    return install


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EntryPoint]:
    """A plugin module with the given contents, and its entry point."""

    def plugin(name: str, **contents: Any) -> EntryPoint:
        module = types.ModuleType(f"third_party_{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return EntryPoint(name, module.__name__, "omlx")

    return plugin


def registering(*adapters: tuple[str, str]) -> Any:
    @hookimpl
    def omlx_register_adapters(register: Any) -> None:
        for name, target in adapters:
            register(name, target, description=f"adapter {name}")

    return omlx_register_adapters


def registering_handlers(*names: tuple[str, str]) -> Any:
    @hookimpl
    def omlx_register_state_handlers(register: Any) -> None:
        for cache_class, handler in names:
            register(cache_class, handler)

    return omlx_register_state_handlers


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_the_built_in_adapters_are_found_through_their_entry_points():
    assert [(adapter.name, adapter.target) for adapter in list_adapters()] == [
        ("langchain", "omlx_plugins.langchain:ChatOMLX"),
        ("llama-index", "omlx_plugins.llama_index:OMLX"),
    ]


def test_discovery_imports_neither_mlx_nor_a_framework():
    output = run_python(
        "import sys, omlx_plugins\n"
        "assert len(omlx_plugins.list_adapters()) >= 2\n"
        "omlx_plugins.plugins.register_state_handlers()\n"
        "heavy = ('mlx', 'mlx_lm', 'langchain', 'langchain_core', 'llama_index', 'transformers')\n"
        "print([name for name in sys.modules if name.partition('.')[0] in heavy])\n"
    )
    assert output.strip() == "[]"


def test_get_llm_passes_its_keywords_to_the_adapter(install, plugin):
    install(
        plugin(
            "dicts",
            omlx_register_adapters=registering(("dicts", "third_party_dicts:make")),
            make=lambda **kwargs: kwargs,
        )
    )
    assert get_llm("dicts", model="some/model", temperature=0.5) == {"model": "some/model", "temperature": 0.5}


def test_get_llm_makes_the_built_in_adapters():
    assert type(get_llm("langchain", model="some/model")) is omlx_plugins.langchain.ChatOMLX
    assert type(get_llm("llama-index", model="some/model")) is omlx_plugins.llama_index.OMLX


def test_an_unknown_adapter_is_an_error_that_lists_the_known_ones(install):
    install()
    with pytest.raises(UnknownPluginError, match=r"'langchan': did you mean 'langchain'\? .*langchain, llama-index"):
        get_llm("langchan", model="some/model")


def _fail(register: Any) -> None:
    register("half", "third_party_broken:half")
    raise RuntimeError("no licence")


BROKEN = {
    "a hook that raises": ({"omlx_register_adapters": hookimpl(_fail)}, "RuntimeError: no licence"),
    "a hook that doesn't exist": ({"omlx_register_adaptors": hookimpl(lambda: None)}, "omlx_register_adaptors"),
    "a hook argument that doesn't exist": (
        {"omlx_register_adapters": hookimpl(lambda registry: None)},
        "registry",
    ),
    "a target without an attribute": (
        {"omlx_register_adapters": registering(("bad", "third_party_broken"))},
        "package.module:attribute",
    ),
    "a state handler without a class": (
        {"omlx_register_state_handlers": registering_handlers(("third_party", "third_party_broken:Handler"))},
        "cache class 'third_party' is not of the form",
    ),
    "a state handler for a built-in class": (
        {"omlx_register_state_handlers": registering_handlers(("mlx_lm.models.cache:KVCache", "third_party:Handler"))},
        "KVCache is built in",
    ),
}


@pytest.mark.parametrize(("contents", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_named_in_a_warning_and_the_others_work(install, plugin, contents, reason):
    install(
        plugin("broken", **contents),
        plugin("good", omlx_register_adapters=registering(("good", "third_party_good:make"))),
    )
    with pytest.warns(PluginWarning, match=rf"broken.*third_party_broken.*{reason}") as caught:
        adapters = list_adapters()
    assert [adapter.name for adapter in adapters] == ["good", "langchain", "llama-index"]
    assert len(caught) == 1


def test_a_plugin_that_cannot_be_imported_is_named_in_a_warning_and_skipped(install):
    install(EntryPoint("absent", "no_such_package.plugin", "omlx"))
    with pytest.warns(PluginWarning, match="absent.*No module named 'no_such_package'"):
        assert len(list_adapters()) == 2


def test_a_warning_comes_once_in_a_process(install):
    install(EntryPoint("absent", "no_such_package.plugin", "omlx"))
    with pytest.warns(PluginWarning):
        list_adapters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list_adapters()


def test_a_plugin_cannot_replace_a_built_in_adapter(install, plugin):
    install(plugin("alpha", omlx_register_adapters=registering(("langchain", "third_party_alpha:make"))))
    with pytest.warns(PluginWarning, match="'langchain' of the plugin .*alpha.* registered that name first"):
        adapters = {adapter.name: adapter for adapter in list_adapters()}
    assert adapters["langchain"].target == "omlx_plugins.langchain:ChatOMLX"


def test_of_two_plugins_with_one_adapter_name_the_first_by_name_counts(install, plugin):
    install(
        plugin("zebra", omlx_register_adapters=registering(("shared", "third_party_zebra:make"))),
        plugin("ant", omlx_register_adapters=registering(("shared", "third_party_ant:make"))),
    )
    with pytest.warns(PluginWarning, match="zebra"):
        adapters = {adapter.name: adapter for adapter in list_adapters()}
    assert adapters["shared"].target == "third_party_ant:make"


def test_an_adapter_whose_package_is_absent_says_which(install, plugin):
    install(plugin("lonely", omlx_register_adapters=registering(("lonely", "no_such_package.llm:Make"))))
    with pytest.raises(MissingDependencyError, match=r"'lonely' .*'no_such_package'"):
        get_llm("lonely")


def test_an_adapter_that_does_not_exist_is_blamed_on_its_plugin(install, plugin):
    install(plugin("typo", omlx_register_adapters=registering(("typo", "third_party_typo:Mkae"))))
    with pytest.raises(UnknownPluginError, match=r"typo.*third_party_typo:Mkae"):
        get_llm("typo")


@pytest.mark.parametrize(
    ("adapter", "package", "attribute"),
    [
        ("langchain", "langchain_core", "omlx_plugins.langchain.ChatOMLX"),
        ("llama-index", "llama_index", "omlx_plugins.llama_index.OMLX"),
    ],
)
@pytest.mark.parametrize("way", ["by name", "directly"])
def test_without_the_framework_the_error_names_the_extra(adapter, package, attribute, way):
    module, _, name = attribute.rpartition(".")
    use = (
        f"import omlx_plugins; omlx_plugins.get_llm({adapter!r}, model='some/model')"
        if way == "by name"
        else f"from {module} import {name}"
    )
    output = run_python(
        "import sys\n"
        "from omlx_core.errors import MissingDependencyError\n"
        f"sys.modules[{package!r}] = None\n"
        f"try:\n    {use}\n"
        "except MissingDependencyError as exc:\n    print(exc)\n"
    )
    assert f"pip install 'omlx-plugins[{adapter}]'" in output


@pytest.mark.parametrize("package", ["omlx_plugins.langchain", "omlx_plugins.llama_index"])
def test_a_name_that_a_package_does_not_have_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="Nothing"):
        getattr(importlib.import_module(package), "Nothing")  # noqa: B009 - the access is what is tested


def test_plugins_hear_of_the_cache_events_of_an_engine_once(install, plugin):
    heard: list[Any] = []

    @hookimpl
    def omlx_cache_event(event: Any) -> None:
        heard.append(event)

    install(plugin("listener", omlx_cache_event=omlx_cache_event))
    listeners: list[Callable[[Any], None]] = []

    class FakeEngine:
        cache = types.SimpleNamespace(subscribe=listeners.append)

    engine = FakeEngine()
    plugins.forward_cache_events(engine)
    plugins.forward_cache_events(engine)
    [listener] = listeners
    listener("event")
    assert heard == ["event"]


# State handlers.


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[CacheSettings], Any]], None]:
    """Stand-in for loading a model: makes shared engines by a function of their cache settings."""

    def load(make: Callable[[CacheSettings], Any]) -> None:
        monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=lambda spec, _: make(spec.cache)))

    return load


CACHE, HANDLER = "third_party:Cache", "third_party:Handler"


@pytest.mark.parametrize("way", ["get_engine", "aget_engine"])
async def test_state_handlers_are_registered_before_an_engine_is_made(install, plugin, load, way):
    registered_at_load: list[dict[str, str]] = []

    def make(_: CacheSettings) -> FakeEngine:
        registered_at_load.append(dict(registry._handlers))
        return FakeEngine()

    load(make)
    install(plugin("alpha", omlx_register_state_handlers=registering_handlers((CACHE, HANDLER))))
    engine = getattr(BaseOMLX(model="some/model"), way)()
    assert isinstance(engine if way == "get_engine" else await engine, FakeEngine)
    assert registered_at_load == [{CACHE: HANDLER}]


def test_discovery_alone_registers_no_state_handler(install, plugin):
    install(plugin("alpha", omlx_register_state_handlers=registering_handlers((CACHE, HANDLER))))
    list_adapters()
    assert registry._handlers == {}


def test_a_plugin_that_fails_on_the_way_leaves_neither_adapters_nor_state_handlers(install, plugin):
    @hookimpl
    def omlx_register_state_handlers(register: Any) -> None:
        register(CACHE, HANDLER)
        raise RuntimeError("no licence")

    adapters = registering(("half", "third_party_broken:half"))
    install(
        plugin(
            "broken",
            omlx_register_adapters=adapters,
            omlx_register_state_handlers=omlx_register_state_handlers,
        ),
        plugin("good", omlx_register_state_handlers=registering_handlers(("third_party:Other", HANDLER))),
    )
    with pytest.warns(PluginWarning, match=r"broken.*no licence"):
        plugins.register_state_handlers()
    assert registry._handlers == {"third_party:Other": HANDLER}
    assert "half" not in [adapter.name for adapter in list_adapters()]


def test_of_two_plugins_with_one_cache_class_the_first_by_name_counts(install, plugin):
    install(
        plugin("zebra", omlx_register_state_handlers=registering_handlers((CACHE, "third_party_zebra:Handler"))),
        plugin("ant", omlx_register_state_handlers=registering_handlers((CACHE, "third_party_ant:Handler"))),
    )
    with pytest.warns(PluginWarning, match=r"third_party_zebra:Handler .*zebra.* is left out: third_party_ant:Handler"):
        plugins.register_state_handlers()
    assert registry._handlers == {CACHE: "third_party_ant:Handler"}


def test_two_plugins_may_register_the_same_state_handler(install, plugin):
    handlers = registering_handlers((CACHE, HANDLER))
    install(plugin("ant", omlx_register_state_handlers=handlers), plugin("bee", omlx_register_state_handlers=handlers))
    plugins.register_state_handlers()
    assert registry._handlers == {CACHE: HANDLER}


def test_what_the_program_registered_itself_counts_before_a_plugin(install, plugin):
    register_state_handler(CACHE, "program:Handler")
    install(plugin("ant", omlx_register_state_handlers=registering_handlers((CACHE, HANDLER))))
    with pytest.warns(
        PluginWarning, match=f"{HANDLER} .*ant.* is left out: program:Handler was registered for {CACHE}"
    ):
        plugins.register_state_handlers()
    assert registry._handlers == {CACHE: "program:Handler"}


@pytest.fixture
def documented_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The package that docs/plugins.md writes, importable; gives its plugin's entry point."""
    files: dict[str, str] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "plugins.md").read_text(encoding="utf-8"), re.DOTALL):
        if path := re.match(r"# (my_package/\w+\.py)", block):
            files[path[1]] = files.get(path[1], "") + block
    (tmp_path / "my_package").mkdir()
    for path, code in files.items():
        (tmp_path / path).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield EntryPoint("my-framework", "my_package.omlx_plugin", "omlx")
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_the_documented_plugin_has_its_cache_class_cached_and_restored_exactly(install, load, documented_package):
    install(documented_package)
    assert "my-framework" in [adapter.name for adapter in list_adapters()]
    assert "my_package.half" not in sys.modules

    def run(engine: Engine) -> list[tuple[int, list[int], list[float] | None]]:
        results = [engine.generate(tokens(70), max_tokens=5, logprobs=True) for _ in range(2)]
        return [(result.usage.cached_tokens, result.token_ids, result.logprobs) for result in results]

    model = tiny_llama()
    half_cache = importlib.import_module("my_package.half").HalfKVCache
    model.make_cache = lambda: [half_cache() for _ in model.layers]
    settings = CacheSettings(block_size=BLOCK_SIZE)
    with Engine(model, cache=settings) as engine:
        uncached = run(engine)
    load(lambda cache: Engine(model, cache=cache))
    with BaseOMLX(model="some/model", kv_cache=settings).get_engine() as engine:
        cached = run(engine)
    assert [result[0] for result in uncached] == [0, 0]
    assert [result[0] for result in cached] == [0, 64]
    assert [result[1:] for result in cached] == [result[1:] for result in uncached]
