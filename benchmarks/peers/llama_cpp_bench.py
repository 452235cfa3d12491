"""Prefill and decode speed of llama.cpp on one GGUF; prints JSON lines.

Runs inside a peer environment (see README.md), with either of two packagings of llama.cpp:
`llama_cpp` (llama-cpp-python: every llama_decode call is timed here) or `xllamacpp` (an in-process server whose
own timings are reported). One shot by default; with `--serve`, one JSON line for each of the commands
"prefill", "decode" and "quit" on standard input, so that a driver can alternate it with another runtime.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import logging
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from peer_report import claim_stdout, memory_mb


class Engine(Protocol):
    """A loaded model that can be timed."""

    def prefill(self, tokens: list[int]) -> float:
        """Seconds to process the tokens from an empty cache and get the last token's logits."""

    def decode(self, tokens: list[int], count: int) -> list[float]:
        """Seconds of each of `count` greedy steps after the tokens (or one entry, their mean, `count` times)."""

    def system(self) -> str:
        """What the build says about the instruction sets it uses."""


class LlamaCpp:
    """llama-cpp-python's low-level API."""

    def __init__(self, model: Path, context: int, threads: int, flash: bool) -> None:
        """Load the model and create one context."""
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.WARNING)  # it writes thousands of lines otherwise
        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, context, 512
        params.n_threads = params.n_threads_batch = threads
        if flash:
            params.flash_attn_type = 1
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot open {model}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(context, 0, 1)

    def run(self, tokens: list[int], start: int, all_logits: bool = False) -> None:
        """Process tokens at positions start, start + 1, ..."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = all_logits or i == len(tokens) - 1
        if self.lib.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        self.lib.llama_synchronize(self.context)

    def logits(self, index: int) -> Any:
        """A view of the logits of batch entry `index` (negative: from the end)."""
        import numpy as np

        pointer = self.lib.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))

    def prefill(self, tokens: list[int]) -> float:
        """Time one pass over the tokens."""
        self.lib.llama_memory_clear(self.memory, True)
        start = time.perf_counter()
        self.run(tokens, 0)
        self.logits(-1)
        return time.perf_counter() - start

    def decode(self, tokens: list[int], count: int) -> list[float]:
        """Time `count` steps, each feeding the arg max of the one before."""
        self.prefill(tokens)
        times, token = [], int(self.logits(-1).argmax())
        for position in range(len(tokens), len(tokens) + count):
            start = time.perf_counter()
            self.run([token], position)
            token = int(self.logits(-1).argmax())
            times.append(time.perf_counter() - start)
        return times

    def nll(self, tokens: list[int]) -> float:
        """Mean next-token negative log likelihood over the window."""
        import numpy as np

        self.lib.llama_memory_clear(self.memory, True)
        self.run(tokens, 0, all_logits=True)
        total = 0.0
        for i, target in enumerate(tokens[1:]):
            row = self.logits(i).astype(np.float64)
            total += row.max() + math.log(np.exp(row - row.max()).sum()) - row[target]
        return float(total / (len(tokens) - 1))

    def system(self) -> str:
        """The build's own description."""
        return str(self.lib.llama_print_system_info().decode())


class XLlamaCpp:
    """xllamacpp's in-process server; its timings include sampling (decode) and slot handling (both)."""

    def __init__(self, model: Path, context: int, threads: int, flash: bool) -> None:
        """Start the server on the model."""
        import xllamacpp

        self.lib = xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = context, context, 512, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_prompt, params.cache_ram_mib, params.fit_params, params.n_ctx_checkpoints = False, 0, False, 0
        if flash:
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.server = xllamacpp.Server(params)

    def complete(self, tokens: list[int], count: int) -> dict[str, Any]:
        """Generate greedily and return the server's timings."""
        request = {
            "prompt": tokens, "n_predict": count, "cache_prompt": False, "ignore_eos": True, "temperature": 0.0,
            "samplers": ["temperature"], "return_tokens": True, "stream": False,
        }  # fmt: skip
        answer = self.server.handle_completions(request)
        if isinstance(answer, list | tuple):
            answer = answer[0]
        if isinstance(answer, str | bytes):
            answer = json.loads(answer)
        if "timings" not in answer:
            raise SystemExit(f"xllamacpp: {answer}")
        return dict(answer["timings"])

    def prefill(self, tokens: list[int]) -> float:
        """The server's time for the prompt."""
        timings = self.complete(tokens, 1)
        if timings["prompt_n"] != len(tokens):
            raise SystemExit(f"xllamacpp processed {timings['prompt_n']} tokens of {len(tokens)}")
        return float(timings["prompt_ms"]) / 1000

    def decode(self, tokens: list[int], count: int) -> list[float]:
        """The server's mean time for a token; its first token comes with the prompt."""
        timings = self.complete(tokens, count + 1)
        return [float(timings["predicted_ms"]) / 1000 / (timings["predicted_n"] - 1)] * count

    def system(self) -> str:
        """The build's own description."""
        return str(self.lib.get_system_info())


def measure(engine: Engine, command: str, args: argparse.Namespace) -> dict[str, Any]:
    """Answer one command."""
    generator = random.Random(args.seed)
    prompt = [generator.randrange(1000, 20000) for _ in range(args.prompt_tokens)]
    result: dict[str, Any] = {"command": command}
    if command == "prefill":
        seconds = engine.prefill(prompt)
        result |= {"tokens": len(prompt), "seconds": seconds, "tokens_per_s": len(prompt) / seconds}
    elif command == "decode":
        times = engine.decode(prompt[: args.decode_context], args.new_tokens)
        result |= {"tokens": len(times), "context": args.decode_context, "seconds": sum(times)}
        result |= {"tokens_per_s": len(times) / sum(times), "median_tokens_per_s": 1 / statistics.median(times)}
        result["best_step_tokens_per_s"] = 1 / min(times)
    elif command == "evaluate" and isinstance(engine, LlamaCpp):
        lines = [line for line in args.evaluate.read_text().splitlines() if line.strip()]
        losses = [engine.nll(json.loads(line)["input_ids"]) for line in lines]
        mean = statistics.mean(losses)
        result |= {"windows": len(losses), "nll": mean, "perplexity": math.exp(mean)}
    else:
        result["error"] = "unknown command"
    return result | {"rss_mb": memory_mb("VmRSS"), "peak_rss_mb": memory_mb("VmHWM")}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--engine", choices=["llama_cpp", "xllamacpp"], default="llama_cpp")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--decode-context", type=int, default=16, help="prompt tokens before the decode steps")
    parser.add_argument("--context", type=int, default=1024, help="key-value slots")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5, help="measurements of each kind in one-shot mode")
    parser.add_argument("--flash-attention", action="store_true", help="force it on (default: the library's choice)")
    parser.add_argument("--evaluate", type=Path, help='also perplexity over JSON lines {"input_ids": [...]}')
    parser.add_argument("--serve", action="store_true", help="answer commands on standard input")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Load, then answer commands or run every measurement once."""
    args = arguments()
    out = claim_stdout()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    before = memory_mb("VmRSS")
    start = time.perf_counter()
    kind = LlamaCpp if args.engine == "llama_cpp" else XLlamaCpp
    engine: Engine = kind(args.model, args.context, args.threads, args.flash_attention)
    package = {"llama_cpp": "llama-cpp-python", "xllamacpp": "xllamacpp"}[args.engine]
    report: dict[str, Any] = {
        "peer": args.engine,
        "version": importlib.metadata.version(package),
        "model": args.model.name,
        "threads": args.threads,
        "load_seconds": time.perf_counter() - start,
        "rss_before_mb": before,
        "system": engine.system(),
    }
    if args.serve:
        print(json.dumps(report | {"command": "load"}), file=out)
        for line in sys.stdin:
            if (command := line.strip()) == "quit":
                break
            print(json.dumps(measure(engine, command, args)), file=out)
        return
    for command in ("prefill", "decode"):
        measure(engine, command, args)
        samples = [measure(engine, command, args)["tokens_per_s"] for _ in range(args.repeat)]
        report[command] = {"best": max(samples), "median": statistics.median(samples), "tokens_per_s": samples}
    report["peak_rss_mb"], report["rss_anonymous_mb"] = memory_mb("VmHWM"), memory_mb("RssAnon")
    if args.evaluate:
        report["evaluate"] = measure(engine, "evaluate", args)
    print(json.dumps(report), file=out)


if __name__ == "__main__":
    main()
