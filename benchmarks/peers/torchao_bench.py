"""A Hugging Face folder timed in PyTorch: bfloat16, torchao's 4-bit weights, a static cache, torch.compile.

    python torchao_bench.py HF_FOLDER [--threads 2]

See serving.py for what it answers. Groups of 32, the head included. The first command of each kind compiles (about a
minute), which is no part of `load_s`. torchao's public Int4WeightOnlyConfig has no packing for CPUs; its prototype has,
over PyTorch's own kernel, which is a fast one in bfloat16 only.
"""

from __future__ import annotations

import argparse
import time

import torch
from serving import main
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, StaticCache


class TorchAo:
    """One model; a cache for each command, of just the length that it needs, and the steps compiled for that length."""

    name = "torchao"

    def __init__(self, options: argparse.Namespace) -> None:
        """Load and quantize."""
        torch.set_num_threads(options.threads)
        self.model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
        quantize_(self.model, PrototypeInt4WeightOnlyConfig(group_size=32))
        self.compiled = torch.compile(self.model, dynamic=False)

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> float:
        """Seconds of one pass."""
        ids, cache = torch.tensor([tokens]), StaticCache(self.model.config, max_cache_len=len(tokens))
        start = time.perf_counter()
        self.compiled(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, tokens: list[int], count: int) -> float:
        """Seconds of `count` steps."""
        ids, cache = torch.tensor([tokens]), StaticCache(self.model.config, max_cache_len=len(tokens) + count)
        logits = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        start = time.perf_counter()
        for _ in range(count):
            logits = self.compiled(input_ids=logits.argmax(-1), past_key_values=cache, logits_to_keep=1).logits
        return time.perf_counter() - start


if __name__ == "__main__":
    main(__doc__, TorchAo)
