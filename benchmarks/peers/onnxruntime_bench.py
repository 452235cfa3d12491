"""A folder that qcompiler wrote, timed in plain onnxruntime: what it takes without PyTorch in the process.

    python onnxruntime_bench.py FOLDER [--threads 2]

See serving.py for what it answers. Buffers are bound once, by address, and hold as many positions as a command needs.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import onnxruntime as ort
from serving import main

DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}


class Folder:
    """One session, a binding for each command."""

    name = "onnxruntime"

    def __init__(self, options: argparse.Namespace) -> None:
        """Open the graph."""
        settings = ort.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = options.threads, 3
        self.session = ort.InferenceSession(options.model / "model.onnx", settings)
        self.caches = [i for i in self.session.get_inputs() if i.name.startswith("past_")]
        (logits,) = (o for o in self.session.get_outputs() if o.name == "logits")
        self.logits = np.zeros((1, 1, logits.shape[-1]), np.float32)

    def start(self, capacity: int) -> Any:
        """A binding over empty caches."""
        binding = self.session.io_binding()
        for spec in self.caches:
            _, heads, _, width = spec.shape
            cache = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, capacity, width), DTYPES[spec.type]))
            binding.bind_ortvalue_input(spec.name, cache)
            binding.bind_ortvalue_output(spec.name.replace("past_", "present_"), cache)
        self.mask = np.ones((1, capacity), np.int64)
        binding.bind_output("logits", "cpu", 0, np.float32, self.logits.shape, self.logits.ctypes.data)
        return binding

    def step(self, binding: Any, tokens: list[int], total: int) -> int:
        """Append tokens; the most likely next one."""
        ids = np.array([tokens])
        binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self.mask.ctypes.data)
        self.session.run_with_iobinding(binding)
        return int(self.logits.argmax())

    def prefill(self, tokens: list[int]) -> float:
        """Seconds of one pass."""
        binding = self.start(len(tokens))
        start = time.perf_counter()
        self.step(binding, tokens, len(tokens))
        return time.perf_counter() - start

    def decode(self, tokens: list[int], count: int) -> float:
        """Seconds of `count` steps."""
        binding = self.start(len(tokens) + count)
        token = self.step(binding, tokens, len(tokens))
        start = time.perf_counter()
        for i in range(count):
            token = self.step(binding, [token], len(tokens) + i + 1)
        return time.perf_counter() - start


if __name__ == "__main__":
    main(__doc__, Folder)
