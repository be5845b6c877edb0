"""The name in LangChain's table, for those who ask for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from langchain.agents import create_agent
from langchain.chat_models import base, init_chat_model

from omlx_core import ModelPool
from omlx_core.engine import shared
from omlx_core.errors import MissingDependencyError
from omlx_core.testing import FakeEngine
from omlx_plugins.langchain import ChatOMLX, register_provider


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(base, "_BUILTIN_PROVIDERS", dict(base._BUILTIN_PROVIDERS))
    base._get_chat_model_creator.cache_clear()
    yield base._BUILTIN_PROVIDERS
    base._get_chat_model_creator.cache_clear()


def test_nothing_is_registered_before_it_is_asked_for():
    with pytest.raises(ValueError, match="omlx"):
        init_chat_model("omlx:some/model")


def test_a_name_makes_the_model_with_its_options(table):
    register_provider()
    register_provider()
    llm = init_chat_model("omlx:some/model:4bit", temperature=0.5)
    assert isinstance(llm, ChatOMLX)
    assert (llm.model, llm.temperature) == ("some/model:4bit", 0.5)
    assert init_chat_model("some/model", model_provider="omlx").model == "some/model"
    assert list(table).count("omlx") == 1


def test_a_configurable_model_can_become_it(monkeypatch):
    monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=lambda spec, _: FakeEngine(["hi"])))
    register_provider()
    llm = init_chat_model(configurable_fields=("model",))
    assert llm.invoke("Hi", config={"configurable": {"model": "omlx:some/model"}}).content == "hi"


def test_an_agent_is_made_by_name(monkeypatch):
    monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=lambda spec, _: FakeEngine(["hi"])))
    register_provider()
    state = create_agent("omlx:some/model", tools=[]).invoke({"messages": [("user", "Hi")]})
    assert state["messages"][-1].content == "hi"


@pytest.mark.parametrize("moved", [None, {}, {"openai": "langchain_openai"}, {"openai": ("a", "b", "c")}])
def test_a_table_that_has_moved_is_an_error_that_says_what_to_do(monkeypatch, moved):
    monkeypatch.setattr(base, "_BUILTIN_PROVIDERS", moved)
    with pytest.raises(MissingDependencyError, match=r"_BUILTIN_PROVIDERS.*ChatOMLX\(model=…\)"):
        register_provider()


def test_without_langchain_it_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "langchain.chat_models.base", None)
    with pytest.raises(MissingDependencyError, match="pip install langchain"):
        register_provider()


def test_importing_the_adapter_imports_neither_mlx_nor_langchain_itself():
    code = (
        "import sys; from omlx_plugins.langchain import ChatOMLX, OMLX, OMLXCacheCallback, register_provider;"
        "ChatOMLX(model='some/model');"
        "print(sorted({'mlx', 'mlx_lm', 'langchain', 'transformers'}.intersection(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
