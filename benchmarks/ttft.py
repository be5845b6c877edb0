"""Time to the first token of a real model: from scratch, from RAM, and from SSD.

    python benchmarks/ttft.py [--tokens 768] [--runs 3]

The three are measured in turn, so that a busy machine is equally bad for each; the medians and their ratio to the run
from scratch are printed as JSON. From SSD: the blocks' files were written by an engine that was closed, and are read
by a new one; the page cache is as the writing left it.
"""

import argparse
import json
import platform
import statistics
import tempfile
from importlib.metadata import version

from omlx_core.mlx_backend import backend_name

from tqdm import trange

from omlx_core import CacheSettings, Engine
from omlx_core.model.sample_model import ensure_sample_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=768, help="length of the prompt")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    model = ensure_sample_model()
    ttft_s: dict[str, list[float]] = {"from scratch": [], "from RAM": [], "from SSD": []}
    for run in trange(args.runs, desc="runs"):
        # A prompt of its own for each run, so that each begins cold.
        prompt = [(7919 * (run + 1) + 31 * i) % 40000 + 100 for i in range(args.tokens)]
        with tempfile.TemporaryDirectory() as folder:
            settings = CacheSettings(paged_ssd_cache_dir=folder, hot_cache_max_size=0)
            with Engine.from_pretrained(model, cache=settings) as engine:
                engine.generate(prompt[:8], max_tokens=1)  # the first call pays for memory that later ones reuse
                ttft_s["from scratch"].append(engine.generate(prompt, max_tokens=1).ttft_s)
                hot = engine.generate(prompt, max_tokens=1)
                ttft_s["from RAM"].append(hot.ttft_s)
            with Engine.from_pretrained(model, cache=settings) as engine:
                engine.generate(prompt[:8], max_tokens=1)
                cold = engine.generate(prompt, max_tokens=1)
                ttft_s["from SSD"].append(cold.ttft_s)
    scratch_s = statistics.median(ttft_s["from scratch"])
    print(
        json.dumps(
            {
                "machine": f"{platform.system()} {platform.machine()}, {backend_name()}",
                "versions": {name: version(name) for name in ("omlx-plugins", "mlx", "mlx-lm")},
                "prompt_tokens": args.tokens,
                "reused_tokens": {"from RAM": hot.usage.cached_tokens_hot, "from SSD": cold.usage.cached_tokens_cold},
                "runs": args.runs,
                "median_ttft_s": {name: round(statistics.median(values), 4) for name, values in ttft_s.items()},
                "ratio_to_scratch": {
                    name: round(statistics.median(values) / scratch_s, 4) for name, values in ttft_s.items()
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
