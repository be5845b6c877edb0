"""Objects of a class out of texts: guaranteed to be of the class, and its schema is read once.

python examples/llama_index/structured_output.py [--model MODEL]
"""

from typing import Literal

from common import make_llm, parse_model
from llama_index.core.prompts import PromptTemplate
from pydantic import BaseModel, Field

REVIEWS = (
    "Arrived in two days, works like a charm. My daughter loves it.",
    "The handle broke on the first day. I want my money back.",
    "It does what it says. A bit loud.",
)


class Review(BaseModel):
    """What a customer's review says."""

    mood: Literal["happy", "neutral", "angry"] = Field(description="how the customer feels about the product")
    wants_refund: bool = Field(description="whether the customer asks for money back")
    topic: str = Field(description="what the review is about, in a word or two", max_length=12)


llm, table = make_llm(parse_model(__doc__), max_tokens=60)
prompt = PromptTemplate("Read this review: {review}")

for review in REVIEWS[:-1]:
    print(repr(llm.structured_predict(Review, prompt, review=review)))
print("and while it is written:")
for partial in llm.stream_structured_predict(Review, prompt, review=REVIEWS[-1]):
    print(f"  {partial!r}")
table.print()
