"""Sentences into objects of a schema, all at once: the instruction and its examples are read once.

python examples/langchain/structured_output.py [--model MODEL]
"""

import argparse
from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from pydantic import BaseModel, Field

from omlx_core import CacheSettings
from omlx_core.model.sample_model import ensure_sample_model
from omlx_plugins.langchain import ChatOMLX, OMLXCacheCallback


class Visit(BaseModel):
    """A visit to a city."""

    name: str = Field(max_length=12)
    city: str = Field(max_length=12)
    days: int = Field(ge=0, le=99)
    by: Literal["train", "car", "plane", "bicycle"]


EXAMPLES = (
    ("Maria took the train to Rome and stayed two days.", Visit(name="Maria", city="Rome", days=2, by="train")),
    ("For a week Paul was in Oslo; he had flown there.", Visit(name="Paul", city="Oslo", days=7, by="plane")),
    ("Chen drove to Lyon for three days.", Visit(name="Chen", city="Lyon", days=3, by="car")),
)
SENTENCES = (
    "Anna took the train to Berlin and stayed four days.",
    "Omar drove to Madrid for five days.",
    "Lucy rode her bicycle to Ghent and stayed one day.",
    "Ivan was in Tokyo for nine days; he had flown there.",
)

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", help="a folder or a repository id; left out, a small model is fetched")
model = parser.parse_args().model or str(ensure_sample_model())

cache = OMLXCacheCallback()
llm = ChatOMLX(model=model, kv_cache=CacheSettings(block_size=16), max_tokens=60)  # these prompts are short
# JSON has braces, which are a template's own: it is handed over as a message, not as a template's text.
shown = [m for sentence, visit in EXAMPLES for m in (HumanMessage(sentence), AIMessage(visit.model_dump_json()))]
chain = ChatPromptTemplate(
    [("system", "Who was where, how long, and how did they get there?"), *shown, ("user", "{sentence}")]
) | llm.with_structured_output(Visit)
visits = chain.batch([{"sentence": sentence} for sentence in SENTENCES], config={"callbacks": [cache]})

row = "{:52} {:8} {:8} {:>4}  {}".format
print(row("sentence", *Visit.model_fields))
for sentence, visit in zip(SENTENCES, visits, strict=True):
    print(row(sentence, *visit.model_dump().values()))
print(cache.summary())
