"""Conversations keep the token ids that they were generated with, and nothing else changes."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_chats import QWEN_TEMPLATE, THINKING_TEMPLATE, chat_tokenizer, misspell, tool
from tiny_tokenizer import CHAT_TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from omlx_core.engine.output import OutputAssembler
from omlx_core.engine.params import GenerationParams
from omlx_core.errors import InvalidParameterError, InvalidToolError
from omlx_core.model.history import Cut, Segment, TokenHistory
from omlx_core.model.prompts import PromptEncoder
from omlx_core.model.text_encoder import TextEncoder

END = "<|im_end|>"
ADD = tool("add", a="integer", b="integer")


def segments(*texts, shift=0):
    """Segments with a token for each letter; `shift` makes them other ones."""
    return [Segment(text, [ord(letter) + shift for letter in text]) for text in texts]


def found(history, text, scope=None):
    """The part of a text that is known."""
    known = history.find(scope, text)
    assert not known.cuts or len(known.token_ids) == known.cuts[-1].num_tokens
    return text[: known.cuts[-1].num_chars] if known.cuts else ""


# The tree.


def test_longest_known_beginning_is_found_with_its_cuts():
    history = TokenHistory()
    history.add(None, segments("ab", "cd"))
    history.add(None, segments("ab", "cd", "ef"))
    known = history.find(None, "abcdefgh")
    assert known.cuts == [Cut(2, 2), Cut(4, 4), Cut(6, 6)]
    assert known.token_ids == [ord(letter) for letter in "abcdef"]
    assert found(history, "abcdxx") == "abcd"
    assert found(history, "abcx") == "ab"
    assert found(history, "xab") == ""


def test_longest_one_is_found_though_another_branch_is_newer():
    history = TokenHistory()
    history.add(None, segments("a", "bcd"))
    history.add(None, segments("ab"))
    assert found(history, "abcde") == "abcd"
    assert found(history, "abx") == "ab"


def test_of_equal_texts_the_most_recently_used_tokens_are_found():
    history = TokenHistory()
    history.add(None, segments("ab", "cd"))
    history.add(None, segments("ab", "cd", shift=1000))
    assert history.find(None, "abcd").token_ids[0] == ord("a") + 1000
    history.add(None, segments("ab", "cd"))
    assert history.find(None, "abcd").token_ids[0] == ord("a")


def test_common_beginning_is_kept_once():
    history = TokenHistory()
    for end in ("cd", "ef", "gh"):
        history.add(None, segments("ab", end))
        history.add(None, segments("ab", end))
    assert (history.num_tokens, history.num_segments) == (8, 4)


def test_scopes_do_not_see_each_other():
    history = TokenHistory()
    history.add("one", segments("ab"))
    assert found(history, "abc", "two") == ""
    assert found(history, "abc", "one") == "ab"


def test_least_recently_used_is_forgotten_first_and_ends_before_beginnings():
    history = TokenHistory(max_tokens=8)
    history.add(None, segments("aa", "bb"))
    history.add(None, segments("aa", "cc"))
    history.add(None, segments("dd"))
    assert found(history, "aabb") == "aabb"
    history.add(None, segments("ee"))
    assert [found(history, text) for text in ("aacc", "dd", "aabb", "ee")] == ["aa", "dd", "aabb", "ee"]
    history.add(None, segments("ff", "gg"))
    assert [found(history, text) for text in ("aabb", "dd", "ee", "ffgg")] == ["aa", "", "ee", "ffgg"]
    history.add(None, segments("hh"))
    assert [found(history, text) for text in ("aabb", "ee", "ffgg", "hh")] == ["", "ee", "ffgg", "hh"]


def test_number_of_segments_is_bounded():
    history = TokenHistory(max_segments=3)
    for letter in "abcdef":
        history.add(letter, segments(letter))
    assert history.num_segments == 3
    assert [letter for letter in "abcdef" if found(history, letter, letter)] == ["d", "e", "f"]
    assert set(history._roots) == {"d", "e", "f"}


def test_sequence_that_is_too_long_leaves_the_others_alone():
    history = TokenHistory(max_tokens=3)
    history.add(None, segments("ab"))
    history.add(None, segments("cd", "ef"))
    assert (found(history, "ab"), found(history, "cdef")) == ("ab", "")


def test_token_without_text_is_part_of_its_segment():
    history = TokenHistory()
    history.add(None, [Segment("a", [1]), Segment("b", [2])])
    history.add(None, [Segment("a", [1, 99]), Segment("b", [2]), Segment("c", [3])])
    assert history.find(None, "abc").token_ids == [1, 99, 2, 3]


def test_segments_after_one_without_text_are_left_out():
    history = TokenHistory()
    history.add(None, [*segments("ab"), Segment("", [7]), *segments("cd")])
    history.add(None, [Segment("", [7]), *segments("cd")])
    assert (found(history, "abcd"), found(history, "cd")) == ("ab", "")


TEXTS = st.text("ab", min_size=1, max_size=4)


@given(
    st.lists(st.tuples(st.lists(TEXTS, min_size=1, max_size=4), st.sampled_from([0, 1000])), max_size=8), TEXTS, TEXTS
)
def test_history_finds_what_a_list_of_all_sequences_has(sequences, first, rest):
    history = TokenHistory()
    expected = 0
    for texts, shift in sequences:
        history.add(None, segments(*texts, shift=shift))
        ends = ["".join(texts[: count + 1]) for count in range(len(texts))]
        expected = max([expected, *(len(end) for end in ends if (first + rest).startswith(end))])
    known = history.find(None, first + rest)
    assert len(found(history, first + rest)) == expected
    assert [token_id % 1000 for token_id in known.token_ids] == [ord(letter) for letter in (first + rest)[:expected]]


@given(st.lists(st.lists(TEXTS, min_size=1, max_size=4), max_size=30), st.integers(1, 12), st.integers(1, 6))
def test_history_never_keeps_more_than_it_may(sequences, max_tokens, max_segments):
    history = TokenHistory(max_tokens, max_segments)
    for position, texts in enumerate(sequences):
        history.add(position % 2, segments(*texts))
        assert history.num_tokens <= max_tokens
        assert history.num_segments <= max_segments
        for scope, root in history._roots.items():
            assert root.children
            assert all(node.scope == scope for node in root.children)
        assert history.num_tokens == sum(len(node.token_ids) for node in history._nodes)


@pytest.fixture
def frequent_switches():
    """Has threads take turns as often as possible."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("frequent_switches")
def test_threads_may_use_it_at_once():
    history = TokenHistory(max_tokens=200, max_segments=40)

    def work(number):
        for turn in range(200):
            text = f"{number}:{turn % 7}"
            history.add(None, segments(f"{number}:", str(turn % 7), "."))
            assert text.startswith(found(history, text))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert history.num_tokens <= 200


# Texts.


def spaced_tokenizer(prepend_scheme):
    """Words with a mark for the space before them, as SentencePiece has it."""
    words = ["▁", "▁the", "▁cat", "the", "cat", "c", "a", "t", "h", "e", ".", "▁.", "<end>"]
    merges = [("▁", "the"), ("▁", "cat"), ("t", "h"), ("th", "e"), ("c", "a"), ("ca", "t"), ("▁", ".")]
    vocab = {word: position for position, word in enumerate([*words, "th", "ca", "at"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.add_special_tokens(["<end>"])
    return wrapped(tokenizer, eos_token="<end>")


def wrapped(tokenizer, **options):
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options))


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("rest", ["<end>the cat", "<end> the cat", "<end><end>.", " the cat", "."])
def test_rest_is_tokenized_as_after_what_is_known(scheme, rest):
    tokenizer = spaced_tokenizer(scheme)
    encoder, plain = TextEncoder(tokenizer, TokenHistory()), TextEncoder(tokenizer)
    prompt = "the cat"
    for known in (prompt, "the cat the cat.", "the cat the cat<end>"):
        whole = plain.encode(known + rest, add_special_tokens=False)
        prompt_ids = encoder.encode(prompt, add_special_tokens=False)
        answer_ids = plain.encode(known, add_special_tokens=False)[len(prompt_ids) :]
        encoder.remember(prompt, prompt_ids, answer_ids, add_special_tokens=False)
        assert encoder.encode(known + rest, add_special_tokens=False) == whole


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_space_that_a_decoder_trims_is_part_of_an_answer(scheme):
    tokenizer = spaced_tokenizer(scheme)
    encoder = TextEncoder(tokenizer, TokenHistory())
    prompt_ids = encoder.encode("the cat", add_special_tokens=False)
    answer_ids = tokenizer.convert_tokens_to_ids(["▁", "c", "at", "<end>"])
    encoder.remember("the cat", prompt_ids, answer_ids, add_special_tokens=False)
    assert encoder.encode("the cat cat<end>", add_special_tokens=False) == prompt_ids + answer_ids


@pytest.fixture
def tokenizer():
    return chat_tokenizer()


@pytest.fixture
def encoder(tokenizer):
    return TextEncoder(tokenizer, TokenHistory())


def remember(encoder, tokenizer, prompt, answer_ids, **options):
    """Remember an answer to a prompt; returns the ids of both."""
    prompt_ids = encoder.encode(prompt, add_special_tokens=True, **options)
    encoder.remember(prompt, prompt_ids, answer_ids, add_special_tokens=True, **options)
    return prompt_ids + answer_ids


def test_ids_that_were_generated_are_kept(encoder, tokenizer):
    answer_ids = [*misspell(tokenizer, "the name in the ring"), tokenizer.eos_token_id]
    sequence = remember(encoder, tokenizer, "Who? ", answer_ids)
    text = f"Who? the name in the ring{END}\nthe"
    assert tokenizer.encode(text)[: len(sequence)] != sequence
    assert encoder.encode(text, add_special_tokens=True) == sequence + tokenizer.encode("\nthe")


def test_end_token_need_not_be_what_the_template_ends_a_turn_with(encoder, tokenizer):
    answer_ids = misspell(tokenizer, "the name")
    sequence = remember(encoder, tokenizer, "Who? ", [*answer_ids, tokenizer.eos_token_id])
    assert encoder.encode("Who? the name\n", add_special_tokens=True) == sequence[:-1] + tokenizer.encode("\n")


def test_beginning_that_ends_within_a_token_is_not_taken(encoder, tokenizer):
    whole = tokenizer.encode("Who in the")
    assert tokenizer.encode("Who in th") != whole[: len(tokenizer.encode("Who in th"))]
    remember(encoder, tokenizer, "Who in th", [])
    assert encoder.encode("Who in the", add_special_tokens=True) == whole


def test_answer_that_ends_within_a_character_is_not_kept(encoder, tokenizer):
    half = tokenizer.encode("é")[:1]
    sequence = remember(encoder, tokenizer, "Who? ", [*misspell(tokenizer, "the name"), *half])
    text = tokenizer.decode(sequence)
    assert text.endswith("\ufffd")
    assert encoder.encode(text, add_special_tokens=True) == tokenizer.encode(text)


def test_characters_of_several_tokens_are_kept(encoder, tokenizer):
    answer_ids = [*misspell(tokenizer, "né 東京 🎉 the"), tokenizer.eos_token_id]
    sequence = remember(encoder, tokenizer, "Où? ", answer_ids)
    assert encoder.encode(f"Où? né 東京 🎉 the{END}", add_special_tokens=True) == sequence


def test_other_salts_see_nothing(encoder, tokenizer):
    answer_ids = [*misspell(tokenizer, "the name"), tokenizer.eos_token_id]
    sequence = remember(encoder, tokenizer, "Who? ", answer_ids, salt="one")
    text = f"Who? the name{END}"
    for salt in (None, "two"):
        assert encoder.encode(text, add_special_tokens=True, salt=salt) == tokenizer.encode(text)
    assert encoder.encode(text, add_special_tokens=True, salt="one") == sequence


def test_special_tokens_before_a_text_are_kept_apart_from_text_without():
    raw = chat_tokenizer(markers=["<|im_end|>", "<bos>"])._tokenizer.backend_tokenizer
    bos_id = raw.token_to_id("<bos>")
    raw.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", bos_id)])
    tokenizer = wrapped(raw, eos_token=END, bos_token="<bos>")
    encoder = TextEncoder(tokenizer, TokenHistory())
    sequence = remember(encoder, tokenizer, "Who? ", [*misspell(tokenizer, "the name"), tokenizer.eos_token_id])
    assert sequence[0] == bos_id
    text = f"Who? the name{END}"
    assert encoder.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert encoder.encode(text, add_special_tokens=True) == sequence


def test_nothing_goes_on_from_a_text_that_the_tokenizer_ends():
    raw = chat_tokenizer(markers=["<|im_end|>", "<sep>"])._tokenizer.backend_tokenizer
    raw.post_processor = processors.TemplateProcessing("$A <sep>", special_tokens=[("<sep>", raw.token_to_id("<sep>"))])
    tokenizer = wrapped(raw, eos_token=END)
    encoder = TextEncoder(tokenizer, TokenHistory())
    remember(encoder, tokenizer, "Who? ", [*misspell(tokenizer, "the name"), tokenizer.eos_token_id])
    text = f"Who? the name{END}"
    assert encoder.encode(text, add_special_tokens=True) == tokenizer.encode(text)


# Conversations.


def converse(tokenizer, encoder, *, num_turns, answer, **options):
    """A conversation with tool calls and misspelled answers; yields each turn's prompt and the sequence before."""
    params = GenerationParams.from_options({"tools": [ADD], **options})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the sum in the ring"}]
    before = []
    for turn in range(num_turns):
        encoded = encoder.encode(messages, params)
        yield encoded.token_ids, before
        answer_ids = [*misspell(tokenizer, answer(turn), seed=turn), tokenizer.eos_token_id]
        encoder.remember(encoded, params, answer_ids)
        before = encoded.token_ids + answer_ids
        output = OutputAssembler(tokenizer, params, encoded.chat)
        for token_id in answer_ids:
            output.add(token_id, None, is_end_token=token_id == tokenizer.eos_token_id)
        output.finish("stop")
        message = {"role": "assistant", "content": output.text}
        if output.reasoning:
            message["reasoning_content"] = output.reasoning
        if output.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
                for c in output.tool_calls
            ]
        messages.append(message)
        messages += [{"role": "tool", "content": "the 3", "tool_call_id": call.id} for call in output.tool_calls]
        if not output.tool_calls:
            messages.append({"role": "user", "content": f"and the {turn}"})


def template_answer(turn):
    call = f'<tool_call>\n{{"name": "add", "arguments": {{"a": {turn}, "b": 1}}}}\n</tool_call>'
    return ["the answer", f"in the ring\n{call}\n{call}", call][turn % 3]


def generic_answer(turn):
    call = f'<tool_call>{{"name": "add", "arguments": {{"a": {turn}, "b": 1}}}}</tool_call>'
    return ["the answer", f"in the ring\n{call}\n{call}", call][turn % 3]


def thinking_answer(turn):
    return (
        f'the thing in {turn}\n</think>\n\n<tool_call>\n{{"name": "add", "arguments": {{"a": {turn}}}}}\n</tool_call>'
    )


@pytest.mark.parametrize(
    ("template", "parser", "answer", "options"),
    [
        (QWEN_TEMPLATE, "json_tools", template_answer, {}),
        (QWEN_TEMPLATE, "json_tools", generic_answer, {"tool_format": "generic"}),
        (CHAT_TEMPLATE, None, generic_answer, {}),
        (THINKING_TEMPLATE, "json_tools", thinking_answer, {}),
        (CHAT_TEMPLATE, None, generic_answer, {"cache_salt": "one"}),
    ],
)
def test_every_turn_begins_with_all_tokens_of_the_one_before(template, parser, answer, options):
    tokenizer = chat_tokenizer(template, parser=parser)
    remembering = PromptEncoder(tokenizer, None, None, history=TokenHistory())
    turns = [*converse(tokenizer, remembering, num_turns=10, answer=answer, **options)]
    assert all(prompt_ids[: len(before)] == before for prompt_ids, before in turns)
    # The test tests something: without a history most turns are other tokens than those generated.
    forgetful = PromptEncoder(tokenizer, None, None)
    again = [*converse(tokenizer, forgetful, num_turns=10, answer=answer, **options)]
    assert sum(prompt_ids[: len(before)] == before for prompt_ids, before in again) <= 2
    for (prompt_ids, _), (other_ids, _) in zip(turns, again, strict=True):
        assert tokenizer.decode(prompt_ids) == tokenizer.decode(other_ids)


def test_cut_off_answer_is_continued_with_its_own_tokens():
    tokenizer = chat_tokenizer()
    encoder = PromptEncoder(tokenizer, None, None, history=TokenHistory())
    params = GenerationParams()
    user = {"role": "user", "content": "Who?"}
    encoded = encoder.encode([user], params)
    answer_ids = misspell(tokenizer, "in the na")
    encoder.remember(encoded, params, answer_ids)
    messages = [user, {"role": "assistant", "content": "in the na"}]
    continued = encoder.encode(messages, GenerationParams(continue_final_message=True))
    assert continued.token_ids == encoded.token_ids + answer_ids


def test_request_that_leaves_nothing_is_not_remembered():
    tokenizer = chat_tokenizer()
    encoder = PromptEncoder(tokenizer, None, None, history=TokenHistory())
    turns = [*converse(tokenizer, encoder, num_turns=4, answer=template_answer, store=False)]
    assert any(prompt_ids[: len(before)] != before for prompt_ids, before in turns)


def test_token_ids_are_taken_as_they_are_and_not_remembered():
    tokenizer = chat_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    history = TokenHistory()
    encoder = PromptEncoder(tokenizer, None, None, history=history)
    params = GenerationParams()
    ids = misspell(tokenizer, "the name")
    encoded = encoder.encode(ids, params)
    assert (encoded.token_ids, encoded.text, encoded.chat) == (ids, None, None)
    encoder.remember(encoded, params, [tokenizer.eos_token_id])
    encoder.encode("x", params)
    assert history.num_tokens == 0


@pytest.mark.usefixtures("frequent_switches")
def test_encoders_may_be_used_by_several_threads_at_once():
    tokenizer = chat_tokenizer()
    encoder = PromptEncoder(tokenizer, None, None, history=TokenHistory())

    def run(number):
        options = {"num_turns": 6, "answer": template_answer, "cache_salt": str(number)}
        return all(ids[: len(before)] == before for ids, before in converse(tokenizer, encoder, **options))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(4)))


# What prompts can't have.


@pytest.mark.parametrize("prompt", ["text", [1, 2, 3]])
def test_tools_and_continuing_are_for_chats(prompt):
    encoder = PromptEncoder(chat_tokenizer(), None, None)
    with pytest.raises(InvalidToolError, match=r"tools=\['add'\].*isn't a chat"):
        encoder.encode(prompt, GenerationParams(tools=[ADD]))
    with pytest.raises(InvalidParameterError, match=r"continue_final_message=True.*isn't a chat"):
        encoder.encode(prompt, GenerationParams(continue_final_message=True))
    encoder.encode(prompt, GenerationParams(template_args={"enable_thinking": False}, tool_format="generic"))


def test_system_turn_is_counted_with_the_tools_in_it():
    tokenizer = chat_tokenizer(CHAT_TEMPLATE, parser=None)
    encoder = PromptEncoder(tokenizer, None, None)
    params = GenerationParams(tools=[ADD])
    messages = [{"role": "user", "content": "Who?"}]
    encoded = encoder.encode(messages, params)
    count = encoder.count_system_tokens(messages, encoded, params)
    assert tokenizer.decode(encoded.token_ids[:count]).endswith("XML tags.<|im_end|>\n<|im_start|>user\n")
    text = encoder.encode("text", GenerationParams())
    assert encoder.count_system_tokens("text", text) == 0
