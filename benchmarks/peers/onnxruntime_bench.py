"""A folder that qcompiler wrote, timed in plain onnxruntime: what it takes without PyTorch in the process.

    python onnxruntime_bench.py FOLDER [--threads 2]

See serving.py for what it answers. Buffers are bound once, by address, and hold as many positions as a command needs.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from serving import main

DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
AT_ONCE = 256  # tokens of a prompt


class Folder:
    """One session, a binding for each command."""

    name = "onnxruntime"

    def __init__(self, options: argparse.Namespace, settings: ort.SessionOptions | None = None) -> None:
        """Open the graphs; with `settings` only the first."""
        self.session = ort.InferenceSession(options.model / "model.onnx", settings or usual(options.threads))
        self.pieces = [] if settings else pieces(options)
        self.specs = {spec.name: spec for spec in self.session.get_inputs() if spec.name.startswith("past_")}
        (logits,) = (o for o in self.session.get_outputs() if o.name == "logits")
        self.logits = np.zeros((1, 1, logits.shape[-1]), np.float32)
        self.caches: dict[str, np.ndarray] = {}

    def start(self, capacity: int) -> None:
        """Empty caches, and the binding of a step: no step differs in a shape from the one before."""
        self.caches.clear()  # the old ones go first
        for name, spec in self.specs.items():
            _, heads, _, width = spec.shape
            self.caches[name] = np.zeros((1, heads, capacity, width), DTYPES[spec.type])
        self.token, self.mask = np.zeros((1, 1), np.int64), np.zeros((1, capacity), np.int64)
        self.single = self.bound(self.token, self.mask)

    def bound(self, ids: np.ndarray, mask: np.ndarray) -> ort.IOBinding:
        """A binding of all buffers."""
        binding = self.session.io_binding()
        for name, cache in self.caches.items():
            bind(binding.bind_input, name, cache)
            bind(binding.bind_output, name.replace("past_", "present_"), cache)
        bind(binding.bind_input, "input_ids", ids)
        bind(binding.bind_input, "attention_mask", mask)
        bind(binding.bind_output, "logits", self.logits)
        return binding

    def step(self, tokens: list[int], total: int) -> int:
        """Append tokens; the most likely next one."""
        self.mask[0, :total] = 1
        if len(tokens) == 1:
            self.token[0, 0] = tokens[0]
            self.session.run_with_iobinding(self.single)
        else:
            ids, mask = np.array([tokens]), self.mask[:, :total]
            self.session.run_with_iobinding(self.bound(ids, mask))
        return int(self.logits.argmax())

    def read(self, tokens: list[int]) -> int:
        """A prompt: by the form for prompts all but its last token, where there is one."""
        ends = [*range(AT_ONCE, len(tokens), AT_ONCE), len(tokens)]
        if not self.pieces:
            return [self.step(tokens[max(0, end - AT_ONCE) : end], end) for end in ends][-1]
        ids, left = np.array([tokens[:-1]]), [{} for _ in ends]
        self.mask[0, : len(tokens)] = 1
        for piece in self.pieces:
            piece.read(ids, self.mask, self.caches, left)
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


def usual(threads: int) -> ort.SessionOptions:
    """What the session that decodes is opened with."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 3
    settings.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    return settings


def pieces(options: argparse.Namespace) -> list[Piece]:
    """The graphs that read prompts, if there are some."""
    settings = usual(options.threads)
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # the decoding session needs the cores
    settings.add_session_config_entry("session.use_env_allocators", "1")  # one arena for all pieces
    settings.enable_mem_pattern = False
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(place, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
    return [Piece(path, settings) for path in sorted(options.model.glob("prompt.*.onnx"))]


class Piece:
    """One of the graphs that read prompts: its weights are inputs, mapped from the file beside it."""

    def __init__(self, path: Path, settings: ort.SessionOptions) -> None:
        self.session = ort.InferenceSession(path, settings)
        with path.with_name(f"{path.name}.data").open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        offsets = json.loads(self.session.get_modelmeta().custom_metadata_map["qcompiler"])["given"]
        whole = np.frombuffer(self.data, np.int8)
        self.binding, self.inputs = self.session.io_binding(), []
        for spec in self.session.get_inputs():
            if spec.name in offsets:
                weight = whole[offsets[spec.name] :][: math.prod(spec.shape)].reshape(spec.shape)
                bind(self.binding.bind_input, spec.name, weight)
            else:
                self.inputs.append(spec.name)
        self.left = [spec.name for spec in self.session.get_outputs() if not spec.name.startswith("present_")]

    def read(
        self, ids: np.ndarray, mask: np.ndarray, caches: dict[str, np.ndarray], left: list[dict[str, ort.OrtValue]]
    ) -> None:
        """Append a prompt to its caches; `left` are the values that pieces leave to later ones, by part."""
        names = [name for name in self.inputs if name in caches]
        count = ids.shape[1]
        floats = {
            name: cache
            if cache.dtype == np.float32
            else np.empty((*cache.shape[:2], count, cache.shape[3]), np.float32)
            for name, cache in ((name, caches[name]) for name in names)
        }
        for i, values in enumerate(left):
            part = np.ascontiguousarray(ids[:, i * AT_ONCE : (i + 1) * AT_ONCE])
            if part.size:
                given = {"input_ids": part, "attention_mask": mask[:, : min(count, (i + 1) * AT_ONCE)]}
                values |= self.run({**given, **floats}, floats, values)
        self.data.madvise(mmap.MADV_DONTNEED)
        for name, cache in floats.items():
            if cache is not caches[name]:
                cache /= left[0][f"{name}.scale"].numpy()
                caches[name][:, :, :count] = np.clip(np.rint(cache, out=cache), -128, 127, out=cache)

    def run(
        self, given: dict[str, np.ndarray], caches: dict[str, np.ndarray], left: dict[str, ort.OrtValue]
    ) -> dict[str, ort.OrtValue]:
        """One part of a prompt; what it leaves."""
        for name in self.inputs:
            if name in left:
                self.binding.bind_ortvalue_input(name, left[name])
            else:
                bind(self.binding.bind_input, name, given[name])
        self.binding.clear_binding_outputs()
        for name, cache in caches.items():
            bind(self.binding.bind_output, name.replace("past_", "present_"), cache)
        for name in self.left:
            self.binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(self.binding)
        return dict(zip(self.left, self.binding.get_outputs()[len(caches) :], strict=True))


def bind(how: Any, name: str, array: np.ndarray) -> None:
    """Bind an array's memory, which must outlive the binding."""
    how(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


if __name__ == "__main__":
    main(__doc__, Folder)
