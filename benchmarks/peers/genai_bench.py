"""A model folder timed in onnxruntime-genai: its own model builder's, or one that qcompiler wrote.

    python -m onnxruntime_genai.models.builder -m HF_FOLDER -o OUT -p int4 -e cpu
    python genai_bench.py OUT [--threads 2]

See serving.py for what it answers.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import onnxruntime_genai as genai
from serving import main


class Genai:
    """One model; a generator for each command."""

    name = "onnxruntime-genai"

    def __init__(self, options: argparse.Namespace) -> None:
        """Load it, with so many threads."""
        config = genai.Config(str(options.model))
        threads = {"model": {"decoder": {"session_options": {"intra_op_num_threads": options.threads}}}}
        config.overlay(json.dumps(threads))
        self.model = genai.Model(config)

    def start(self, tokens: list[int], count: int) -> Any:
        """A generator that has read the tokens."""
        params = genai.GeneratorParams(self.model)
        length = len(tokens) + count + 1
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(self.model, params)
        generator.append_tokens(tokens)
        return generator

    def prefill(self, tokens: list[int]) -> float:
        """Seconds of one pass."""
        start = time.perf_counter()
        self.start(tokens, 1)
        return time.perf_counter() - start

    def decode(self, tokens: list[int], count: int) -> float:
        """Seconds of `count` steps."""
        generator = self.start(tokens, count + 1)
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(count):
            generator.generate_next_token()
        return time.perf_counter() - start


if __name__ == "__main__":
    main(__doc__, Genai)
