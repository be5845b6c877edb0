"""Many questions at once: what they share is read once."""

import pytest
from langchain_core.prompts import ChatPromptTemplate

from omlx_core import CacheSettings
from omlx_plugins.langchain import ChatOMLX, OMLXCacheCallback

BLOCK_SIZE = 16
NUM_QUESTIONS = 16

pytestmark = pytest.mark.usefixtures("shared_engines")


@pytest.fixture
def llm(sample_model):
    return ChatOMLX(model=sample_model, kv_cache=CacheSettings(block_size=BLOCK_SIZE), max_tokens=3)


@pytest.fixture
def prompt(document):
    prompt = ChatPromptTemplate([("system", "Answer from this:\n{document}"), ("user", "{question}")])
    return prompt.partial(document=document)


async def test_sixteen_questions_at_once_read_their_document_once_though_nobody_warmed_it(llm, prompt):
    questions = [{"question": f"What is number {number}?"} for number in range(10, 10 + NUM_QUESTIONS)]
    use = OMLXCacheCallback()
    answers = await (prompt | llm).abatch(questions, config={"callbacks": [use]})
    [num_prompt_tokens] = {answer.usage_metadata["input_tokens"] for answer in answers}
    computed = sorted(
        num_prompt_tokens - answer.usage_metadata["input_token_details"]["cache_read"] for answer in answers
    )
    num_shared = llm.get_num_tokens_from_messages(prompt.invoke({"question": ""}).to_messages())
    assert num_shared > 20 * BLOCK_SIZE
    # The first reads all; the others their question, and at most the block in which it begins. The marks that end a
    # prompt without a question are those that end each of these.
    assert computed[-1] == num_prompt_tokens
    assert computed[-2] <= num_prompt_tokens - num_shared + 2 * BLOCK_SIZE
    assert use.use.computed_tokens == sum(computed)
