"""Questions about retrieved documents: what is prefilled, and how long the first token takes, by what is reused.

    python benchmarks/rag.py [--questions 200] [--timed 16] [--answers 12] > RESULT.json
    python benchmarks/rag.py --report RESULT.json        # writes the tables and plots of docs/rag.md

60 pieces of this project's documents; each question is six words that stand together in one of them, which is drawn
with a popularity like Zipf's; BM25 finds the best five, and the prompt has these before the question.

- **no cache**: every prompt is read whole.
- **cache**: the documents in the order of the retriever.
- **cache + reorder**: in the order of `omlx_plugins.rag.reorder`.
- **approximate**: the retriever's order with `document_reuse="approximate"`; a document's first sight costs its tokens.

Which tokens are reused depends on texts, tokenizer and block size, and not on weights: all questions are asked of a
model of one layer with the real tokenizer, and what each of them reused is noted. `--timed` of them, evenly spread,
are then asked of SmolLM2-135M: its cache is first filled with what the question found, so that the time to the first
token is what it would have been in its place. The ways are timed in turn.

For `--answers` of these the exact answer is compared with the approximate one: as they are generated, and token by
token behind the exact answer so far, with several numbers of tokens that are computed in place.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omlx_core.mlx_backend import mx

import numpy as np
from harness import Figure, print_report, print_table
from mlx_lm.models.cache import make_prompt_cache
from models import build
from tqdm import tqdm

from omlx_core import CacheSettings, Engine, Usage
from omlx_core.model.loading import load_model
from omlx_core.model.sample_model import ensure_sample_model
from omlx_core.model.text_places import TokenPlaces
from omlx_core.state.rotation import find_rotations, rotate
from omlx_plugins.bench.plot import bar_chart
from omlx_plugins.demo.corpus import Bm25Index, Section, load_sections
from omlx_plugins.rag.reorder import reorder

NO_CACHE, CACHE, REORDER, APPROXIMATE = "no cache", "cache", "cache + reorder", "approximate"
WAYS = (NO_CACHE, CACHE, REORDER, APPROXIMATE)
RECOMPUTED = 16
RECOMPUTED_TRIED = (0, 8, 16, 32, 64)
ANSWER_TOKENS = 24
SEPARATOR = "\n\n"
INSTRUCTION = "Answer in one short sentence, from these documents only."
NOT_IN_THE_CORPUS = {"docs/rag.md", "docs/performance.md", "docs/architectures.md"}  # made of results, or all table
PIECE_CHARS = (200, 480)
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "rag.md"


@dataclass
class Way:
    """What became of the questions in one way.

    Attributes:
        prompts: the token ids of each.
        prefilled: how many tokens were computed for each.
        reused: how many of its prompt were found in the cache, as a prefix.
        sizes: how many tokens each of its documents has.
        hits: how many of these were reused.
        ttft_s: of those that were timed.
    """

    prompts: list[list[int]] = field(default_factory=list)
    prefilled: list[int] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)
    hits: list[list[int]] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)

    def hit_rates(self) -> list[float]:
        """The share of the tokens in each place of a document that was reused."""
        places = range(len(self.sizes[0]))
        return [sum(hits[at] for hits in self.hits) / sum(sizes[at] for sizes in self.sizes) for at in places]


@dataclass(frozen=True)
class Asked:
    """A question, its documents as the retriever has them, and those among them that were seen before."""

    question: str
    texts: list[str]
    known: list[str]


def chat(context: str, question: str = "") -> list[dict[str, str]]:
    return [
        {"role": "system", "content": f"{INSTRUCTION}{SEPARATOR}{context}"},
        {"role": "user", "content": question},
    ]


def corpus(num_documents: int) -> list[Section]:
    """Paragraphs of the project's documents, joined until they are long enough; evenly drawn from all of them."""
    shortest, longest = PIECE_CHARS
    pieces = []
    for section in load_sections():
        if section.source in NOT_IN_THE_CORPUS:
            continue
        text = ""
        for paragraph in re.split(r"\n\s*\n", section.text):
            text = f"{text}\n{paragraph}".strip()
            if len(text) >= shortest:
                pieces.append(Section(section.source, text[:longest].strip()))
                text = ""
    if len(pieces) < num_documents:
        raise SystemExit(f"the documents have {len(pieces)} pieces, of {num_documents} that are asked for")
    return [pieces[index * len(pieces) // num_documents] for index in range(num_documents)]


def questions(documents: Sequence[Section], count: int, draw: random.Random) -> list[str]:
    """Words that stand together in a document; the n-th most popular document is asked about in proportion to 1/n."""
    by_rank = draw.sample(documents, len(documents))
    asked = draw.choices(by_rank, [1 / rank for rank in range(1, len(by_rank) + 1)], k=count)
    found = []
    for document in asked:
        words = re.findall(r"\w+", document.text)
        start = draw.randrange(max(1, len(words) - 6))
        found.append(f"What is said about this: {' '.join(words[start : start + 6])}?")
    return found


def spans_of(engine: Engine, token_ids: Sequence[int], texts: Sequence[str]) -> list[tuple[int, int]]:
    """The tokens of a prompt that are its documents."""
    decode = engine.tokenizer.decode
    return TokenPlaces(decode, decode(token_ids), token_ids).spans(texts)


def count_reuse(
    engine: Engine, index: Bm25Index, found: Sequence[str], num_retrieved: int
) -> tuple[dict[str, Way], list[Asked]]:
    """Ask all questions in all ways, and note what each found in the cache."""
    ways = {name: Way() for name in WAYS}
    asked: list[Asked] = []
    seen: set[tuple[int, ...]] = set()
    for question in tqdm(found, desc="counting"):
        texts = [section.text for section, _ in index.search(question, num_retrieved)]
        plan = reorder(engine, texts, render=chat, separator=SEPARATOR, options={"cache_salt": REORDER})
        known: list[str] = []
        for name, way in ways.items():
            order = [texts[i] for i in plan.order] if name == REORDER else texts
            prompt = chat(SEPARATOR.join(order), question)
            token_ids = engine.encode(prompt)
            spans = spans_of(engine, token_ids, order)
            way.prompts.append(token_ids)
            way.sizes.append([stop - start for start, stop in spans])
            if name == NO_CACHE:
                usage = Usage(len(token_ids))
            elif name == APPROXIMATE:
                usage = engine.generate(prompt, max_tokens=1, cache_salt=name, **approximate(order)).usage
            else:
                usage = engine.generate(token_ids, max_tokens=1, cache_salt=name).usage
            reused = usage.cached_tokens
            hits = [max(0, min(reused, stop) - start) for start, stop in spans]
            num_computed = len(token_ids) - reused - usage.approximate_tokens
            if name == APPROXIMATE:
                for place, (start, stop) in enumerate(spans):
                    document = tuple(token_ids[start:stop])
                    if document in seen:
                        known.append(order[place])
                        hits[place] = max(hits[place], stop - start - RECOMPUTED)
                    else:
                        num_computed += stop - start  # by itself
                        seen.add(document)
            way.reused.append(reused)
            way.prefilled.append(num_computed)
            way.hits.append(hits)
        asked.append(Asked(question, texts, known))
    return ways, asked


def approximate(texts: Sequence[str]) -> dict[str, Any]:
    return {"document_reuse": "approximate", "documents": texts, "document_recompute_tokens": RECOMPUTED}


def time_first_tokens(engine: Engine, ways: Mapping[str, Way], asked: Sequence[Asked], numbers: Sequence[int]) -> None:
    """Time some of the questions, each with as much of its prompt in the cache as it found."""
    for turn, number in enumerate(tqdm(numbers, desc="timing")):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            way, each = ways[name], asked[number]
            token_ids, reused = way.prompts[number], way.reused[number]
            salt = f"{name} {number}"  # each begins with an empty cache
            if name == APPROXIMATE:
                prompt: Any = chat(SEPARATOR.join(each.texts), each.question)
                if each.known:
                    engine.prefill(prompt, cache_salt=salt, **approximate(each.known))
                result = engine.generate(prompt, max_tokens=1, cache_salt=salt, **approximate(each.texts))
            else:
                if reused:
                    engine.prefill(token_ids[: reused + 1], cache_salt=salt)
                result = engine.generate(token_ids, max_tokens=1, cache_salt=salt)
                if result.usage.cached_tokens != reused:
                    raise RuntimeError(f"{salt}: {result.usage.cached_tokens} tokens were reused, not {reused}")
            way.ttft_s.append(result.ttft_s)


# Agreement


@dataclass
class Agreement:
    """How the exact answers' tokens fare behind documents that are put in place approximately.

    Attributes:
        likeliest: for each token of each, whether it is the likeliest one there as well.
        logprobs: its log-probability there.
        saved: the share of the prompt's tokens that needn't be computed.
    """

    likeliest: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    saved: list[float] = field(default_factory=list)


def compute(model: Any, token_ids: Sequence[int], cache: list[Any]) -> mx.array:
    """The logits ``[tokens, vocabulary]``, which are lazy; the cache is computed."""
    logits: mx.array = model(mx.array(token_ids)[None], cache=cache)
    mx.eval([layer.state for layer in cache])
    return logits[0]


def score(
    model: Any,
    rotations: Sequence[Any],
    prompt: Sequence[int],
    documents: Mapping[tuple[int, int], list[Any]],
    answer: Sequence[int],
    *,
    num_recomputed: int,
) -> tuple[mx.array, int]:
    """Log-probabilities ``[answer tokens, vocabulary]``, and the number of prompt tokens that were moved.

    A second implementation of `omlx_core.engine.document_reuse`, which scores an answer instead of generating one.
    """
    cache = make_prompt_cache(model)
    at = num_moved = 0
    for (start, stop), document in documents.items():
        if start + num_recomputed >= stop:
            continue
        compute(model, prompt[at : start + num_recomputed], cache)
        for leaf, source, rotation in zip(cache, document, rotations, strict=True):
            keys, values = (rows[..., num_recomputed : stop - start, :] for rows in (source.keys, source.values))
            leaf.update_and_fetch(rotate(rotation, keys, start), values)
        num_moved += stop - start - num_recomputed
        at = stop
    logits = compute(model, [*prompt[at:], *answer[:-1]], cache)[-len(answer) :].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True), num_moved


def compare_answers(
    engine: Engine, model: Any, asked: Sequence[Asked], numbers: Sequence[int]
) -> tuple[dict[str, Any], dict[int, Agreement]]:
    """Exact and approximate answers to some of the questions."""
    rotations = find_rotations(model, make_prompt_cache(model))
    agreements = {count: Agreement() for count in RECOMPUTED_TRIED}
    exact_logprobs: list[float] = []
    shared, equal = [], 0
    for number in tqdm(numbers, desc="answers"):
        each = asked[number]
        prompt = chat(SEPARATOR.join(each.texts), each.question)
        token_ids = engine.encode(prompt)
        exact = engine.generate(token_ids, max_tokens=ANSWER_TOKENS, logprobs=True, cache_salt=f"exact {number}")
        moved = engine.generate(
            prompt, max_tokens=ANSWER_TOKENS, cache_salt=f"{APPROXIMATE} {number}", **approximate(each.texts)
        )
        pairs = list(zip(exact.token_ids, moved.token_ids, strict=False))
        num_shared = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        shared.append(num_shared / len(exact.token_ids))
        equal += exact.token_ids == moved.token_ids
        exact_logprobs += exact.logprobs or []
        documents: dict[tuple[int, int], list[Any]] = {}
        for start, stop in spans_of(engine, token_ids, each.texts):
            documents[start, stop] = make_prompt_cache(model)
            compute(model, token_ids[start:stop], documents[start, stop])
        for count, agreement in agreements.items():
            logprobs, num_moved = score(model, rotations, token_ids, documents, exact.token_ids, num_recomputed=count)
            answer = mx.array(exact.token_ids)
            agreement.likeliest += (logprobs.argmax(axis=-1) == answer).tolist()
            agreement.logprobs += mx.take_along_axis(logprobs, answer[:, None], axis=-1)[:, 0].tolist()
            agreement.saved.append(num_moved / len(token_ids))
    generated = {
        "answers": len(numbers),
        "tokens": len(exact_logprobs),
        "equal_answers": equal,
        "shared_beginning": statistics.mean(shared),
        "exact_mean_logprob": statistics.mean(exact_logprobs),
    }
    return generated, agreements


# Report


def figures_of(ways: Mapping[str, Way]) -> list[Figure]:
    whole = ways[NO_CACHE]
    figures = []
    for name, way in ways.items():
        figures.append(Figure(f"{name}: prefilled", sum(way.prefilled), "tokens", limit=sum(whole.prefilled)))
        if way.ttft_s:
            limit = statistics.mean(whole.ttft_s)
            figures.append(
                Figure(f"{name}: mean TTFT; limit: {NO_CACHE}", statistics.mean(way.ttft_s), "s", limit=limit)
            )
    return figures


def result_of(ways: Mapping[str, Way], numbers: Sequence[int]) -> dict[str, Any]:
    whole = ways[NO_CACHE]
    return {
        name: {
            "prefilled_tokens": sum(way.prefilled),
            "prefilled_share": sum(way.prefilled) / sum(whole.prefilled),
            "timed_prefilled_tokens": statistics.mean(way.prefilled[number] for number in numbers),
            "mean_ttft_s": statistics.mean(way.ttft_s) if way.ttft_s else None,
            "median_ttft_s": statistics.median(way.ttft_s) if way.ttft_s else None,
            "hit_rate_by_place": way.hit_rates(),
        }
        for name, way in ways.items()
    }


def write_report(result: Mapping[str, Any]) -> None:
    """The tables between the marks of docs/rag.md, and the plots beside it."""
    ways = result["ways"]
    folder = PAGE.with_suffix("")
    folder.mkdir(exist_ok=True)
    bar_chart(
        folder / "prefilled.svg",
        f"Tokens prefilled for {result['arguments']['questions']} questions",
        "tokens",
        {name: {"prefilled": way["prefilled_tokens"]} for name, way in ways.items()},
    )
    bar_chart(
        folder / "ttft.svg",
        "Mean time to the first token",
        "s",
        {name: {"mean": way["mean_ttft_s"]} for name, way in ways.items() if way["mean_ttft_s"] is not None},
    )
    places = range(len(ways[CACHE]["hit_rate_by_place"]))
    bar_chart(
        folder / "hit_rates.svg",
        "Tokens of a document that were reused, by its place in the prompt",
        "%",
        {
            f"place {place + 1}": {
                name: 100 * way["hit_rate_by_place"][place] for name, way in ways.items() if name != NO_CACHE
            }
            for place in places
        },
    )
    bar_chart(
        folder / "agreement.svg",
        "Approximate documents, by the tokens of each that are computed in place",
        "%",
        {
            count: {
                "prompt tokens moved": 100 * values["saved_share"],
                "likeliest token is the exact answer's": 100 * values["likeliest_share"],
            }
            for count, values in result["agreement"].items()
        },
    )
    page = with_section(PAGE.read_text(encoding="utf-8"), "figures", tables(result))
    page = with_section(page, "agreement", agreement_tables(result))
    PAGE.write_text(page, encoding="utf-8")


def tables(result: Mapping[str, Any]) -> str:
    ways = result["ways"]
    num_places = len(ways[CACHE]["hit_rate_by_place"])
    header = [
        "",
        "tokens prefilled",
        "of all",
        "mean TTFT",
        "prefilled for it, mean",
        *(f"place {place + 1}" for place in range(num_places)),
    ]
    rows = [header, ["---", *("--:" for _ in header[1:])]]
    for name, way in ways.items():
        ttft = "" if way["mean_ttft_s"] is None else f"{way['mean_ttft_s']:.2f} s"
        rates = [f"{rate:.0%}" for rate in way["hit_rate_by_place"]]
        prefilled = (f"{way['prefilled_tokens']:,}", f"{way['prefilled_share']:.0%}")
        rows.append([name, *prefilled, ttft, f"{way['timed_prefilled_tokens']:.0f}", *rates])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    arguments = result["arguments"]
    where = (
        f"{result['machine']}, {result['device']}, {result['backend']}; load of the minute before: {result['load']}. "
        f"{versions}. {arguments['questions']} questions, the best {arguments['retrieved']} of "
        f"{arguments['documents']} documents, blocks of {arguments['block_size']} tokens; "
        f"TTFT of {result['timed']} questions."
    )
    return f"{table(rows)}\n\n{where}\n"


def agreement_tables(result: Mapping[str, Any]) -> str:
    generated = result["generated"]
    rows = [
        [
            "tokens computed in place, of each document",
            "prompt tokens moved",
            "likeliest token is the exact answer's",
            "its mean log-probability",
        ],
        ["---", "--:", "--:", "--:"],
        ["all (exact)", "0%", "100%", f"{generated['exact_mean_logprob']:.3f}"],
    ]
    for count, values in reversed(result["agreement"].items()):
        cells = (f"{values['saved_share']:.0%}", f"{values['likeliest_share']:.1%}", f"{values['mean_logprob']:.3f}")
        rows.append([count, *cells])
    where = (
        f"{generated['tokens']} tokens of {generated['answers']} greedy answers of {ANSWER_TOKENS} tokens at the most, "
        f"scored behind the exact answer so far. Generated with {RECOMPUTED} tokens computed in place, "
        f"{generated['equal_answers']} of the {generated['answers']} answers are equal to the exact ones, and on "
        f"average {generated['shared_beginning']:.0%} of an answer is the same up to the first difference."
    )
    return f"{table(rows)}\n\n{where}\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_section(page: str, name: str, content: str) -> str:
    """The page with other content between the marks of that name."""
    begin, end = (f"<!-- {name}: {edge} -->\n" for edge in ("begin", "end"))
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + content + end + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--retrieved", type=int, default=5)
    parser.add_argument("--timed", type=int, default=16, help="questions that are timed on the real model")
    parser.add_argument("--answers", type=int, default=12, help="of these, how many are answered and compared")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, help="write docs/rag.md's tables and plots of this result")
    args = parser.parse_args()
    if args.report:
        write_report(json.loads(args.report.read_text()))
        return
    draw = random.Random(args.seed)
    documents = corpus(args.documents)
    found = questions(documents, args.questions, draw)
    loaded = load_model(ensure_sample_model())
    cache = CacheSettings(block_size=args.block_size)
    small = build("minimal", vocab_size=loaded.config["vocab_size"])  # it has to read tokens, and nothing else
    with Engine(small, loaded.tokenizer, cache=cache) as engine:
        ways, asked = count_reuse(engine, Bm25Index(documents), found, args.retrieved)
    numbers = sorted({int(n) for n in np.linspace(0, args.questions - 1, min(args.timed, args.questions))})
    with Engine(loaded.model, loaded.tokenizer, name=loaded.name, cache=cache, config=loaded.config) as engine:
        engine.generate("warm", max_tokens=1, cache_salt="warm")
        time_first_tokens(engine, ways, asked, numbers)
        compared = numbers[: args.answers]
        generated, agreements = compare_answers(engine, loaded.model, asked, compared) if compared else ({}, {})
    print_table(figures_of(ways))
    tokens = [len(engine_ids) for engine_ids in ways[NO_CACHE].prompts]
    print_report(
        arguments={key: value for key, value in vars(args).items() if key != "report"},
        timed=len(numbers),
        mean_prompt_tokens=statistics.mean(tokens),
        sources=sorted({section.source for section in documents}),
        ways=result_of(ways, numbers),
        generated=generated,
        agreement={
            str(count): {
                "saved_share": statistics.mean(agreement.saved),
                "likeliest_share": statistics.mean(agreement.likeliest),
                "mean_logprob": statistics.mean(agreement.logprobs),
            }
            for count, agreement in agreements.items()
        },
        figures=[figure.as_dict() for figure in figures_of(ways)],
    )


if __name__ == "__main__":
    sys.exit(main())
