"""The protocol of the peer scripts that a driver alternates: one JSON line after loading, then one for each command.

Commands on standard input: `prefill`, `decode`, `long` (decoding behind --long-context positions), `quit`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from peer_report import claim_stdout, memory_mb


class Engine(Protocol):
    """A loaded model that can be timed."""

    name: str

    def prefill(self, tokens: list[int]) -> float:
        """Seconds to process the tokens from an empty cache and get the last token's logits."""

    def decode(self, tokens: list[int], count: int) -> float:
        """Seconds of `count` greedy steps after the tokens."""


def main(
    description: str,
    load: Callable[[argparse.Namespace], Engine],
    extend: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> None:
    """Load, report, and answer commands until `quit` or the end of the input; `extend` adds options of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--long-context", type=int, default=2048)
    extend(parser)
    options = parser.parse_args()
    out = claim_stdout()
    start = time.perf_counter()
    engine = load(options)
    loaded = time.perf_counter() - start
    print(json.dumps({"peer": engine.name, "load_s": loaded, "rss_mb": memory_mb("VmRSS")}), file=out)
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        print(json.dumps(answer(engine, line.strip(), options)), file=out)


def answer(engine: Engine, command: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second at a command, and the peak memory so far."""
    generator = random.Random(0)
    prompt = [generator.randrange(1000, 20000) for _ in range(max(options.prompt_tokens, options.long_context))]
    if command == "prefill":
        pace = options.prompt_tokens / engine.prefill(prompt[: options.prompt_tokens])
    elif command in ("decode", "long"):
        context = 16 if command == "decode" else options.long_context
        pace = options.new_tokens / engine.decode(prompt[:context], options.new_tokens)
    else:
        return {"error": f'unknown command "{command}"'}
    return {"tokens_per_s": pace, "peak_rss_mb": memory_mb("VmHWM")}
