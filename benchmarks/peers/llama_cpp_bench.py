"""A GGUF timed in llama.cpp, by either of two packagings.

    python llama_cpp_bench.py MODEL.gguf [--engine xllamacpp] [--threads 2]

See serving.py for what it answers. `llama_cpp` is llama-cpp-python, each command timed here; `xllamacpp` is a server in
this process, whose own timings are given.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from serving import Engine, main


class LlamaCpp:
    """llama-cpp-python's low-level API."""

    name = "llama_cpp"

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

    def decode(self, tokens: list[int], count: int) -> float:
        """Time `count` steps, each feeding the arg max of the one before."""
        self.prefill(tokens)
        token = int(self.logits(-1).argmax())
        start = time.perf_counter()
        for position in range(len(tokens), len(tokens) + count):
            self.run([token], position)
            token = int(self.logits(-1).argmax())
        return time.perf_counter() - start

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


class XLlamaCpp:
    """xllamacpp's in-process server; its timings include sampling (decode) and slot handling (both)."""

    name = "xllamacpp"

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

    def decode(self, tokens: list[int], count: int) -> float:
        """The server's mean time for a token, `count` times; its first token comes with the prompt."""
        timings = self.complete(tokens, count + 1)
        return float(timings["predicted_ms"]) / 1000 / (timings["predicted_n"] - 1) * count


def load(options: argparse.Namespace) -> Engine:
    """The model in the packaging asked for."""
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    kind = LlamaCpp if options.engine == "llama_cpp" else XLlamaCpp
    return kind(options.model, options.context, options.threads, options.flash_attention)


def extend(parser: argparse.ArgumentParser) -> None:
    """The options of llama.cpp."""
    parser.add_argument("--engine", choices=["llama_cpp", "xllamacpp"], default="llama_cpp")
    parser.add_argument("--context", type=int, default=1024, help="key-value slots (`long` needs 2304)")
    parser.add_argument("--flash-attention", action="store_true", help="force it on (default: the library's choice)")


if __name__ == "__main__":
    main(__doc__, load, extend)
