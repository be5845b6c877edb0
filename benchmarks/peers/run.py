"""This project's cache beside those that one would take instead, in one run on one machine.

    python benchmarks/peers/run.py [--only cache requests] [--runs 7] [--request-runs 3] [--directory DIR]

Each peer runs from its own package, in a virtual environment of its own that is made at the first run; one that can't
be installed is named and skipped. What each guarantees stands at the top of its adapter.

- **cache**: no model, 64 MiB of keys and values of 4,096 tokens. *store* ends when the call returns, when the peer
  says that the files are written, and when an fsync of them has returned as well (so that all are durable alike).
  *RAM* and *restored* end when 32 more tokens are appended, which forces every copy that a lazy restore puts off;
  *restored* is in a new process, the cache opened before, the files in the page cache or dropped from it. All restored
  bits are compared.
- **requests**: SmolLM2-135M asked for the same text three times; time to the first of 16 greedy tokens. The prompt ends
  half a block after a block, where a cache of blocks is expected to end on average.

The peers take turns within every run, every other run in reverse order. Tables go to standard error, JSON to standard
output.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import trange

from benchmarks.harness import print_report
from benchmarks.peers.child import AdapterError, Child
from benchmarks.peers.environments import (
    HERE,
    PEERS,
    ROOT,
    Peer,
    PeerUnavailableError,
    ensure_environment,
    ensure_gguf,
)
from benchmarks.peers.protocol import drop_files, read_files
from benchmarks.peers.report import Samples, Table
from omlx_core.model.sample_model import ensure_sample_model
from omlx_core.settings import user_cache_dir

ANSWER_TOKENS = 16
# Six and a half blocks of 256.
PROMPT_TOKENS = 1664
CACHE_COLUMNS = {
    "returned_s": "store, returned",
    "flushed_s": "store, written",
    "synced_s": "store, fsynced",
    "hit_s": "RAM",
    "opened_s": "open",
    "warm_s": "restored, page cache",
    "dropped_s": "restored, disk",
}
REQUEST_COLUMNS = {"cold_s": "cold", "ram_s": "from RAM", "ssd_s": "new process, from file"}


class Contender:
    """A peer that is installed, and what was measured of it.

    Args:
        peer: which.
        python: the interpreter of its environment.
        log: file for what its adapter prints.
    """

    def __init__(self, peer: Peer, python: Path, log: Path) -> None:
        self.peer = peer
        self.cache, self.requests = Samples(peer.label), Samples(peer.label)
        self.same_answers: bool | None = None
        self._python, self._log = python, log

    def start(self) -> Child:
        """A new process of its adapter."""
        return Child(self._python, HERE / self.peer.adapter, self.peer.variables, self._log)

    def versions(self) -> dict[str, str]:
        with self.start() as child:
            return child.ask("versions")


def in_turn(contenders: Sequence[Contender], group: str, runs: int) -> Iterator[Contender]:
    """Those that have a group of operations, once per run, every other run in reverse order."""
    taking_part = [contender for contender in contenders if group in contender.peer.does]
    for run in trange(runs, desc=group):
        yield from taking_part[:: -1 if run % 2 else 1]


def measure_cache(contenders: Sequence[Contender], runs: int, root: Path) -> None:
    """Fill `Contender.cache`; the first run is not counted."""
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        for number, contender in enumerate(in_turn(contenders, "cache", runs + 1)):
            samples, label = contender.cache, contender.peer.label
            if samples.skipped is not None:
                continue
            try:
                if label not in children:
                    children[label] = stack.enter_context(contender.start())
                measured = measure_cache_once(contender, children[label], root)
            except AdapterError as exc:
                samples.skipped = str(exc)
                continue
            if number >= sum("cache" in other.peer.does for other in contenders):
                samples.add(measured)


def measure_cache_once(contender: Contender, child: Child, root: Path) -> dict[str, float]:
    """Store, take from RAM, restore in two new processes."""
    hits = root / f"hits-{contender.peer.label.replace('/', '-')}"
    hits.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        measured = {**child.ask("store", directory=folder), **child.ask("hit", directory=str(hits))}
        for name, prepare in (("warm_s", read_files), ("dropped_s", drop_files)):
            if prepare is drop_files and not hasattr(os, "posix_fadvise"):
                continue
            prepare(Path(folder))
            with contender.start() as newcomer:
                restored = newcomer.ask("restore", directory=folder)
            measured[name] = restored["restored_s"]
            measured.setdefault("opened_s", restored["opened_s"])
        return measured


def measure_requests(contenders: Sequence[Contender], runs: int, root: Path, ggufs: Path) -> None:
    """Fill `Contender.requests` and `Contender.same_answers`."""
    model = ensure_sample_model()
    text = Tokenizer.from_file(str(model / "tokenizer.json")).encode((ROOT / "LICENSE").read_text()).ids
    request = {"prompt": text[:PROMPT_TOKENS], "warm_up": text[PROMPT_TOKENS:][:16], "max_tokens": ANSWER_TOKENS}
    for contender in in_turn(contenders, "requests", runs):
        samples = contender.requests
        if samples.skipped is not None:
            continue
        try:
            path = ensure_gguf(ggufs, timeout_s=300) if contender.peer.uses_gguf else model
            with tempfile.TemporaryDirectory(dir=root) as folder:
                arguments = {"model": str(path), "directory": folder, **request}
                with contender.start() as first:
                    answers = first.ask("ask_twice", **arguments)
                with contender.start() as second:
                    answers |= second.ask("ask_again", **arguments)
        except (AdapterError, PeerUnavailableError) as exc:
            samples.skipped = str(exc)
            continue
        samples.add(answers)
        same = answers["cold"] == answers["ram"] == answers["ssd"]
        contender.same_answers = same and contender.same_answers is not False


def install(folder: Path, log: Path, timeout_s: float) -> tuple[list[Contender], dict[str, str]]:
    """The peers that can take part, and why the others can't."""
    contenders, missing = [], {}
    for peer in PEERS:
        try:
            contenders.append(Contender(peer, ensure_environment(peer, folder, timeout_s), log))
        except PeerUnavailableError as exc:
            missing[peer.label] = str(exc)
            print(f"{peer.label}: skipped, {exc}", file=sys.stderr)
    return contenders, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("cache", "requests"), nargs="+", default=("cache", "requests"))
    parser.add_argument("--runs", type=int, default=7, help="of cache operations")
    parser.add_argument("--request-runs", type=int, default=3, help="of whole requests")
    parser.add_argument("--install-timeout", type=float, default=900, metavar="SECONDS", help="per peer")
    parser.add_argument("--directory", type=Path, help="where to write, on the disk in question")
    args = parser.parse_args()
    folder = user_cache_dir() / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    load_before = os.getloadavg()
    contenders, missing = install(folder, folder / "adapters.log", args.install_timeout)
    with tempfile.TemporaryDirectory(dir=args.directory or folder) as root:
        if "cache" in args.only:
            measure_cache(contenders, args.runs, Path(root))
        if "requests" in args.only:
            measure_requests(contenders, args.request_runs, Path(root), folder)
    tables = {
        "cache": Table(
            "Cache operations, 64 MiB",
            CACHE_COLUMNS,
            [contender.cache for contender in contenders if "cache" in contender.peer.does],
        ),
        "requests": Table(
            f"Time to the first token of {PROMPT_TOKENS:,}",
            REQUEST_COLUMNS,
            [contender.requests for contender in contenders if "requests" in contender.peer.does],
        ),
    }
    for group in args.only:
        print("", *tables[group].lines(), sep="\n", file=sys.stderr)
    print_report(
        load_average={"before": load_before, "after": os.getloadavg()},
        runs={"cache": args.runs, "requests": args.request_runs},
        peers={
            contender.peer.label: {
                "versions": contender.versions(),
                "written_is_durable": contender.peer.has_fsync,
                "same_answers": contender.same_answers,
            }
            for contender in contenders
        },
        missing=missing,
        columns={group: tables[group].columns for group in args.only},
        **{group: tables[group].as_dict() for group in args.only},
    )


if __name__ == "__main__":
    main()
