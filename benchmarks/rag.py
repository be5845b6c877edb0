"""Questions about retrieved documents: what is prefilled, and how long the first token takes, by what is reused.

    python benchmarks/rag.py [--questions 200] [--timed 16] [--answers 0] > RESULT.json
    python benchmarks/rag.py --report RESULT.json        # writes the tables and plots of docs/rag.md

60 pieces of this project's documents; each question is six words that stand together in one of them, which is drawn
with a popularity like Zipf's; BM25 finds the best five, and the prompt has these before the question.

- **no cache**: every prompt is read whole.
- **cache**: the documents in the order of the retriever.
- **cache + reorder**: in the order of `omlx_plugins.rag.reorder`.

Which tokens are reused depends on texts, tokenizer and block size, and not on weights: all questions are asked of a
model of one layer with the real tokenizer, and what each of them reused is noted. `--timed` of them, evenly spread,
are then asked of SmolLM2-135M: its cache is first filled with what the question found, so that the time to the first
token is what it would have been in its place. The ways are timed in turn.
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
from mlx_lm.models.llama import Model, ModelArgs
from tqdm import tqdm

from omlx_core import CacheSettings, Engine
from omlx_core.model.loading import load_model
from omlx_core.model.sample_model import ensure_sample_model
from omlx_plugins.bench.plot import bar_chart
from omlx_plugins.demo.corpus import Bm25Index, Section, load_sections
from omlx_plugins.rag.reorder import reorder

NO_CACHE, CACHE, REORDER = "no cache", "cache", "cache + reorder"
WAYS = (NO_CACHE, CACHE, REORDER)
SEPARATOR = "\n\n"
INSTRUCTION = "Answer in one short sentence, from these documents only."
NOT_IN_THE_CORPUS = {"docs/rag.md", "docs/performance.md", "docs/architectures.md"}  # made of results, or all table
PIECE_CHARS = (200, 480)
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "rag.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


@dataclass
class Way:
    """What became of the questions in one way.

    Attributes:
        prompts: the token ids of each.
        reused: how many of them were found in the cache.
        starts: where its documents begin, and the last one ends.
        ttft_s: of those that were timed.
    """

    prompts: list[list[int]] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)
    starts: list[list[int]] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)

    @property
    def prefilled(self) -> int:
        return sum(map(len, self.prompts)) - sum(self.reused)

    def hit_rates(self) -> list[float]:
        """The share of the tokens in each place of a document that was reused."""
        rates = []
        for place in range(len(self.starts[0]) - 1):
            spans = [(starts[place], starts[place + 1]) for starts in self.starts]
            hits = (max(0, min(n, stop) - start) for n, (start, stop) in zip(self.reused, spans, strict=True))
            rates.append(sum(hits) / sum(stop - start for start, stop in spans))
        return rates


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


def counting_model(vocab_size: int) -> Any:
    """One layer, the smallest that there is: it has to read tokens, and nothing else."""
    args = ModelArgs(
        model_type="llama",
        hidden_size=32,
        num_hidden_layers=1,
        intermediate_size=32,
        num_attention_heads=1,
        rms_norm_eps=1e-5,
        vocab_size=vocab_size,
        max_position_embeddings=8192,
    )
    return Model(args)


def count_reuse(
    engine: Engine, index: Bm25Index, asked: Sequence[str], num_retrieved: int
) -> tuple[dict[str, Way], list[dict[str, list[str]]]]:
    """Ask all questions in all ways; what each found in the cache, and the documents as they were ordered."""
    ways = {name: Way() for name in WAYS}
    ordered: list[dict[str, list[str]]] = []
    for question in tqdm(asked, desc="counting"):
        texts = [section.text for section, _ in index.search(question, num_retrieved)]
        plan = reorder(engine, texts, render=chat, separator=SEPARATOR, options={"cache_salt": REORDER})
        orders = {CACHE: texts, REORDER: [texts[i] for i in plan.order]}
        ordered.append(orders)
        for name, way in ways.items():
            order = orders.get(name, texts)
            prompt = chat(SEPARATOR.join(order), question)
            token_ids = engine.encode(prompt)
            starts = engine.find_starts(prompt, [*order, question])
            way.prompts.append(token_ids)
            way.starts.append(starts)
            reused = 0
            if name != NO_CACHE:
                reused = engine.generate(token_ids, max_tokens=1, cache_salt=name).usage.cached_tokens
            way.reused.append(reused)
    return ways, ordered


def time_first_tokens(engine: Engine, ways: Mapping[str, Way], numbers: Sequence[int]) -> None:
    """Time some of the questions, each with as much of its prompt in the cache as it found."""
    for turn, number in enumerate(tqdm(numbers, desc="timing")):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            way = ways[name]
            prompt, reused = way.prompts[number], way.reused[number]
            salt = f"{name} {number}"  # each begins with an empty cache
            if reused:
                engine.prefill(prompt[: reused + 1], cache_salt=salt)
            result = engine.generate(prompt, max_tokens=1, cache_salt=salt)
            if result.usage.cached_tokens != reused:
                raise RuntimeError(f"{name}, question {number}: {result.usage.cached_tokens} reused, not {reused}")
            way.ttft_s.append(result.ttft_s)


def figures_of(ways: Mapping[str, Way]) -> list[Figure]:
    whole = ways[NO_CACHE]
    figures = []
    for name, way in ways.items():
        figures.append(Figure(f"{name}: prefilled", way.prefilled, "tokens", limit=whole.prefilled))
        if way.ttft_s:
            limit = statistics.mean(whole.ttft_s)
            figures.append(
                Figure(f"{name}: mean TTFT; limit: {NO_CACHE}", statistics.mean(way.ttft_s), "s", limit=limit)
            )
    return figures


def result_of(ways: Mapping[str, Way]) -> dict[str, Any]:
    whole = ways[NO_CACHE]
    return {
        name: {
            "prefilled_tokens": way.prefilled,
            "prefilled_share": way.prefilled / whole.prefilled,
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
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + tables(result) + END + after, encoding="utf-8")


def tables(result: Mapping[str, Any]) -> str:
    ways = result["ways"]
    num_places = len(ways[CACHE]["hit_rate_by_place"])
    header = ["", "tokens prefilled", "of all", "mean TTFT", *(f"place {place + 1}" for place in range(num_places))]
    rows = [header, ["---", *("--:" for _ in header[1:])]]
    for name, way in ways.items():
        ttft = "" if way["mean_ttft_s"] is None else f"{way['mean_ttft_s']:.2f} s"
        rates = [f"{rate:.0%}" for rate in way["hit_rate_by_place"]]
        rows.append([name, f"{way['prefilled_tokens']:,}", f"{way['prefilled_share']:.0%}", ttft, *rates])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    arguments = result["arguments"]
    where = (
        f"{result['machine']}, {result['device']}, {result['backend']}; load of the minute before: {result['load']}. "
        f"{versions}. {arguments['questions']} questions, the best {arguments['retrieved']} of "
        f"{arguments['documents']} documents, blocks of {arguments['block_size']} tokens; "
        f"TTFT of {result['timed']} questions."
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{where}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--retrieved", type=int, default=5)
    parser.add_argument("--timed", type=int, default=16, help="questions that are timed on the real model")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, help="write docs/rag.md's tables and plots of this result")
    args = parser.parse_args()
    if args.report:
        write_report(json.loads(args.report.read_text()))
        return
    draw = random.Random(args.seed)
    documents = corpus(args.documents)
    asked = questions(documents, args.questions, draw)
    loaded = load_model(ensure_sample_model())
    cache = CacheSettings(block_size=args.block_size)
    small = counting_model(loaded.config["vocab_size"])
    mx.eval(small.parameters())
    with Engine(small, loaded.tokenizer, cache=cache) as engine:
        ways, _ = count_reuse(engine, Bm25Index(documents), asked, args.retrieved)
    numbers = sorted({int(n) for n in np.linspace(0, args.questions - 1, min(args.timed, args.questions))})
    with Engine(loaded.model, loaded.tokenizer, name=loaded.name, cache=cache, config=loaded.config) as engine:
        engine.generate("warm", max_tokens=1, cache_salt="warm")
        time_first_tokens(engine, ways, numbers)
    print_table(figures_of(ways))
    tokens = [len(engine_ids) for engine_ids in ways[NO_CACHE].prompts]
    print_report(
        arguments={key: value for key, value in vars(args).items() if key != "report"},
        timed=len(numbers),
        mean_prompt_tokens=statistics.mean(tokens),
        sources=sorted({section.source for section in documents}),
        ways=result_of(ways),
        figures=[figure.as_dict() for figure in figures_of(ways)],
    )


if __name__ == "__main__":
    sys.exit(main())
