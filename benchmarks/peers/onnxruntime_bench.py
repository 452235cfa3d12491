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
        settings.add_session_config_entry("session.force_spinning_stop", "1")  # the decoding session needs the cores
        reader = options.model / "prompt.onnx"
        self.reader = ort.InferenceSession(reader, settings) if reader.exists() else None
        self.caches = [i for i in self.session.get_inputs() if i.name.startswith("past_")]
        (logits,) = (o for o in self.session.get_outputs() if o.name == "logits")
        self.logits = np.zeros((1, 1, logits.shape[-1]), np.float32)

    def start(self, capacity: int) -> None:
        """Empty caches, bound."""
        self.mask, self.bindings = np.ones((1, capacity), np.int64), []  # the old buffers go first
        held = [
            (spec.name, ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, capacity, width), DTYPES[spec.type])))
            for spec in self.caches
            for _, heads, _, width in [spec.shape]
        ]
        for session in (self.session, self.reader or self.session):
            binding = session.io_binding()
            for name, cache in held:
                binding.bind_ortvalue_input(name, cache)
                binding.bind_ortvalue_output(name.replace("past_", "present_"), cache)
            self.bindings.append(binding)
        logits = self.logits
        self.bindings[0].bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)

    def step(self, tokens: list[int], total: int) -> int:
        """Append tokens; the most likely next one."""
        self.run(self.session, self.bindings[0], tokens, total)
        return int(self.logits.argmax())

    def run(self, session: ort.InferenceSession, binding: Any, tokens: list[int], total: int) -> None:
        """Append tokens."""
        ids = np.array([tokens])
        binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self.mask.ctypes.data)
        session.run_with_iobinding(binding)

    def read(self, tokens: list[int]) -> int:
        """A prompt: by the form for prompts all but its last token, where there is one."""
        if self.reader is None:
            return self.step(tokens, len(tokens))
        self.run(self.reader, self.bindings[1], tokens[:-1], len(tokens) - 1)
        return self.step(tokens[-1:], len(tokens))

    def prefill(self, tokens: list[int]) -> float:
        """Seconds of one pass."""
        self.start(len(tokens))
        start = time.perf_counter()
        self.read(tokens)
        return time.perf_counter() - start

    def decode(self, tokens: list[int], count: int) -> float:
        """Seconds of `count` steps."""
        self.start(len(tokens) + count)
        token = self.read(tokens)
        start = time.perf_counter()
        for i in range(count):
            token = self.step([token], len(tokens) + i + 1)
        return time.perf_counter() - start


if __name__ == "__main__":
    main(__doc__, Folder)
