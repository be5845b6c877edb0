"""Run the benchmarks one after the other, each into ``benchmarks/results/NAME.json``.

    python benchmarks/run_all.py [--only whole_requests growth ...]

On a machine that does nothing else: what else it did in the minute before is in each result, as its load. Afterwards
`report.py` makes a page of the results. Results from other machines may be put beside these under names of their own,
such as ``whole_requests-h100.json``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
_ON_THE_SHAPE = ("--only", "hit", "restore", "store", "--runs", "5")
BENCHMARKS: dict[str, tuple[str, ...]] = {  # the name of a result begins with its script's
    "whole_requests": ("--tokens", "1024", "--runs", "3"),
    "cache_ops": (),
    "cache_ops-long": ("--shape", "long", *_ON_THE_SHAPE),
    "cache_ops-qwen3-8b": ("--shape", "qwen3-8b", *_ON_THE_SHAPE),
    "overhead": ("--model", "minimal"),
    "overhead-smollm2": ("--model", "smollm2", "--tokens", "48", "--runs", "3"),  # its steps take 0.2 s
    "batching": (),
    "growth": (),
    "cold_tier": (),
    "writer_busy": (),
    "cold_bits": (),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=BENCHMARKS, nargs="+", default=list(BENCHMARKS))
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    failed = []
    for name in args.only:
        print(f"== {name}", file=sys.stderr, flush=True)
        script = HERE / f"{name.partition('-')[0]}.py"
        done = subprocess.run([sys.executable, str(script), *BENCHMARKS[name]], check=False, stdout=subprocess.PIPE)
        if done.returncode:
            failed.append(name)
        else:  # only now: a benchmark that fails leaves the last result alone
            (RESULTS / f"{name}.json").write_bytes(done.stdout)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
