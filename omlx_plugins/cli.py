"""The console command ``omlx-plugins``.

Exit status: 0 done; 2 the command line, a setting or the model is wrong; 130 interrupted; 141 whoever read the output
went away; 143 terminated. MLX is imported by the commands that run a model, not by ``--help``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from omlx_core.engine.params import GenerationOptions, GenerationParams
from omlx_core.errors import InvalidPromptError, MissingDependencyError, OMLXError
from omlx_core.settings import CacheSettings
from omlx_core.sizes import format_size
from omlx_plugins.extras import import_with_extra

if TYPE_CHECKING:
    from omlx_core import GenerationResult
    from omlx_core.cache.ssd_cache import SSDCacheStats

PROGRAM = "omlx-plugins"

_FLUSH_TIMEOUT_S = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments after the program's name; None takes this process's.
    """
    args = _parser().parse_args(argv)
    try:
        with _exit_on_sigterm():
            status: int = args.command(args)
            sys.stdout.flush()
            return status
    except OMLXError as exc:
        print(f"{PROGRAM}: error: {' '.join(str(exc).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Local language models on MLX whose KV cache lives in RAM and on the SSD.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_VersionAction)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="answer a prompt and say how much of it was reused",
        description="Stream the answer to standard output; then say on standard error what the cache saved.",
        allow_abbrev=False,
    )
    generate.set_defaults(command=_generate)
    generate.add_argument(
        "prompt",
        metavar="PROMPT",
        help="the user's message, or a text to continue if the model has no chat template; - reads standard input",
    )
    generate.add_argument("--model", required=True, help="a folder or a repository id")
    generate.add_argument("--adapter-path", metavar="DIR", help="a folder with LoRA weights")
    _add_generation_flags(generate)
    _add_cache_flags(generate)

    demo = commands.add_parser(
        "demo",
        help="one long context, asked about through LangChain and LlamaIndex",
        description="Ask several questions about one long context and show what each of them reused.",
        allow_abbrev=False,
    )
    demo.set_defaults(command=_demo)
    demo.add_argument("--model", help="a folder or a repository id (default: the sample model)")
    demo.add_argument(
        "--sections",
        type=int,
        default=6,
        metavar="N",
        help="how many sections of the documentation are the context (default: 6)",
    )
    _add_cache_flags(demo)

    bench = commands.add_parser(
        "bench",
        help="measure what the cache is worth for a model on this machine",
        description="Time to the first token, cold, from RAM, from SSD in a new process, for the next turn and for a "
        "branch, and the decoding speed: medians of several runs, each with random prompts of its own.",
        allow_abbrev=False,
    )
    bench.set_defaults(command=_bench)
    bench.add_argument("--model", help="a folder or a repository id (default: the sample model)")
    bench.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="N",
        help="lengths of the context (default: 1024 and 4096, if they fit)",
    )
    bench.add_argument("--runs", type=int, default=3, metavar="N", help="of each (default: 3)")
    bench.add_argument(
        "--decode-tokens", type=int, default=64, metavar="N", help="length of the answers to decode (default: 64)"
    )
    bench.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="where on the disk in question to write (default: the user's cache folder); what is written is removed",
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures, the machine and the versions")
    bench.add_argument("--svg", type=Path, metavar="FILE", help="write a plot; needs the extra bench")
    group = bench.add_argument_group("cache", argument_default=argparse.SUPPRESS)
    group.add_argument("--block-size", type=int, metavar="TOKENS", help="tokens in a block (default: 256)")

    sample_model = commands.add_parser("sample-model", help="fetch a small model once and print its path")
    sample_model.set_defaults(command=_sample_model)
    plugins = commands.add_parser("plugins", help="list the adapters that are installed")
    plugins.set_defaults(command=_plugins)
    return parser


# The defaults are suppressed: what wasn't given isn't passed on, so that OMLX_* variables still count.


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation", argument_default=argparse.SUPPRESS)
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate (default: 256)")
    group.add_argument("--temperature", type=float, metavar="T", help="0, the default, is greedy")
    group.add_argument("--top-p", type=float, metavar="P", help="nucleus mass in (0, 1]")
    group.add_argument("--top-k", type=int, metavar="K", help="most likely tokens to choose from; 0 is off")
    group.add_argument("--min-p", type=float, metavar="P", help="least probability relative to the likeliest")
    group.add_argument("--seed", type=int, metavar="N", help="make sampling repeatable")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer here; repeatable")


def _add_cache_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "cache",
        "Each flag has an environment variable, such as OMLX_PAGED_SSD_CACHE_DIR, which it overrides.",
        argument_default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--paged-ssd-cache-dir", metavar="DIR", help="folder of the SSD tier, or auto (default: no SSD tier)"
    )
    group.add_argument(
        "--paged-ssd-cache-max-size", metavar="SIZE", help='most disk space, as "50GB" or "20%%" (default: 100GB)'
    )
    group.add_argument(
        "--hot-cache-max-size", metavar="SIZE", help='most RAM, as "2GB" or "20%%"; 0, the default, is no limit'
    )
    group.add_argument("--no-cache", action="store_true", help="cache nothing")
    group.add_argument("--initial-cache-blocks", type=int, metavar="N", help="blocks allocated at start (default: 256)")
    group.add_argument("--block-size", type=int, metavar="TOKENS", help="tokens in a block (default: 256)")


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name in names}


def _cache_options(args: argparse.Namespace) -> dict[str, Any]:
    return _given(args, list(CacheSettings.model_fields))


def _generate(args: argparse.Namespace) -> int:
    options = _given(args, list(GenerationOptions.__annotations__))
    GenerationParams.from_options(options)  # a bad flag is named before the model is loaded
    cache = CacheSettings(**_cache_options(args))
    text = _prompt_text(args.prompt)

    from omlx_core import Engine
    from omlx_plugins.plugins import register_state_handlers

    register_state_handlers()
    with closing(Engine.from_pretrained(args.model, adapter_path=args.adapter_path, cache=cache)) as engine:
        prompt = [{"role": "user", "content": text}] if engine.has_chat_template else text
        started_s = time.perf_counter()
        result: GenerationResult | None = None
        with closing(engine.stream(prompt, **options)) as chunks:
            for chunk in chunks:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                result = chunk.result
        elapsed_s = time.perf_counter() - started_s
        sys.stdout.write("\n")
        sys.stdout.flush()
        if result is not None:
            print(_summary(result, elapsed_s), file=sys.stderr)
        if engine.cache.ssd is not None:
            engine.cache.flush(_FLUSH_TIMEOUT_S)
            print(_ssd_summary(engine.cache.ssd.stats()), file=sys.stderr)
    return 0


def _prompt_text(argument: str) -> str:
    if argument != "-":
        return argument
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as exc:
        raise InvalidPromptError(f"standard input is not text ({exc}): send it as {exc.encoding}") from exc


def _summary(result: GenerationResult, elapsed_s: float) -> str:
    usage = result.usage
    decode_s = elapsed_s - result.ttft_s
    decoded = usage.completion_tokens - 1  # the first token is the prefill's
    speed = f", {decoded / decode_s:.1f} tokens/s" if decoded > 0 and decode_s > 0 else ""
    return (
        f"prompt: {usage.prompt_tokens} tokens, {usage.cached_tokens_hot} reused from RAM, "
        f"{usage.cached_tokens_cold} from SSD; first token after {result.ttft_s:.3f} s\n"
        f"answer: {usage.completion_tokens} tokens{speed}; ended by {result.finish_reason}"
    )


def _ssd_summary(stats: SSDCacheStats) -> str:
    checkpoints = f" ({format_size(stats.checkpoint_bytes)} of checkpoints)" if stats.checkpoint_bytes else ""
    return (
        f"SSD: {stats.num_blocks} blocks, {format_size(stats.size_bytes)}{checkpoints}; written: "
        f"{format_size(stats.bytes_written)} now, {format_size(stats.bytes_written_last_day)} in 24 hours"
    )


def _demo(args: argparse.Namespace) -> int:
    try:
        from omlx_plugins.demo.run import run
    except ModuleNotFoundError as exc:
        raise MissingDependencyError(
            f"the demo needs the package {exc.name!r}, which isn't installed: pip install 'omlx-plugins[all]'"
        ) from exc

    return run(model=args.model, num_sections=args.sections, cache_options=_cache_options(args))


def _bench(args: argparse.Namespace) -> int:
    if args.svg is not None:
        import_with_extra("matplotlib", "rc_context", extra="bench", package="matplotlib")  # before all is measured
    from omlx_plugins.bench.run import run

    return run(
        model=args.model,
        tokens=args.tokens,
        runs=args.runs,
        decode_tokens=args.decode_tokens,
        directory=args.directory,
        json_path=args.json,
        svg_path=args.svg,
        cache_options=_cache_options(args),
    )


def _sample_model(_: argparse.Namespace) -> int:
    from omlx_core.model.sample_model import ensure_sample_model

    print(ensure_sample_model())
    return 0


def _plugins(_: argparse.Namespace) -> int:
    from omlx_plugins.plugins import PluginWarning, list_adapters

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PluginWarning)
        adapters = list_adapters()
    for warning in caught:
        print(f"{PROGRAM}: warning: {warning.message}", file=sys.stderr)
    rows = [("ADAPTER", "CLASS", "PLUGIN", "DESCRIPTION")]
    rows += [(adapter.name, adapter.target, adapter.plugin, adapter.description) for adapter in adapters]
    widths = [max(len(row[column]) for row in rows) for column in range(3)] + [0]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit`, so that the engine is closed and its cache flushed; a second one kills."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers belong to the main thread
        return

    def terminate(signal_number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(128 + signal_number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _VersionAction(argparse.Action):
    """Prints the version; unlike argparse's own, it looks it up only when asked."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"{PROGRAM} {version(PROGRAM)}")
        parser.exit()
