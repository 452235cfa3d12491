"""The reader of prompts: the pieces of a program's second form (prompt.py), run one after the other."""

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from qcompiler.backends.onnxruntime.names import AT_ONCE, DATA, MASK, METADATA, PROMPT, SCALE
from qcompiler.backends.onnxruntime.sessions import bind, open_session


@dataclass
class Part:
    """Some tokens of a prompt: the inputs of all pieces, and the values that earlier pieces left to later ones."""

    inputs: Mapping[str, Tensor]
    left: dict[str, ort.OrtValue] = field(default_factory=dict)


class PromptReader:
    """Fills caches; the weights of one of its `pieces` are in memory at a time."""

    def __init__(self, pieces: Sequence["Piece"]) -> None:
        self.pieces = pieces

    @classmethod
    def of(cls, folder: Path, threads: int | None, presents: Mapping[str, str]) -> "PromptReader | None":
        """The one whose files stand in a folder, if there is one; `presents` are the outputs of caches by inputs."""
        paths = [folder / PROMPT.format(i) for i in range(len(list(folder.glob(PROMPT.format("*")))))]
        return cls([Piece(path, threads, presents) for path in paths]) if paths else None

    def takes(self, caches: Mapping[str, Tensor], lengths: Tensor) -> bool:
        """Whether it can go on from these caches: its attention reads floats, so it does not go on from codes."""
        return not bool(lengths.any()) or all(cache.is_floating_point() for cache in caches.values())

    def read(self, inputs: Mapping[str, Tensor], mask: Tensor, caches: Mapping[str, Tensor]) -> None:
        """Append to caches [batch, heads, capacity, d] the tokens in `inputs`, [batch, new] each.

        `mask` [batch, capacity] marks these too, at the front of each row; position_ids are among the inputs.
        """
        start, rows = int(inputs["position_ids"][0, 0]), len(mask)
        new = inputs["position_ids"].shape[1]
        # GroupQueryAttention takes several new positions over a past for one sequence only.
        size = AT_ONCE if rows == 1 else new
        parts = []
        for first in range(0, new, size):
            end = min(first + size, new)
            cut = {name: value[:, first:end].contiguous() for name, value in inputs.items()}
            parts.append(Part({**cut, MASK: mask[:, : start + end].contiguous()}))
        for i, piece in enumerate(self.pieces):
            piece.read(parts, caches)
            wanted = {name for later in self.pieces[i + 1 :] for name in later.inputs}
            for part in parts:
                part.left = {name: value for name, value in part.left.items() if name in wanted}


class Piece:
    """One of the graphs, and the file with its weights."""

    def __init__(self, path: Path, threads: int | None, presents: Mapping[str, str]) -> None:
        self.session = open_session(path, threads, yields=True)
        self.presents = presents
        self.leaves = [spec.name for spec in self.session.get_outputs() if spec.name not in presents.values()]
        offsets = json.loads(self.session.get_modelmeta().custom_metadata_map[METADATA])["given"]
        with path.with_name(f"{path.name}{DATA}").open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(np.frombuffer(self.data, np.uint8).__array_interface__["data"][0])
        self.inputs = [spec.name for spec in self.session.get_inputs() if spec.name not in offsets]
        specs = [spec for spec in self.session.get_inputs() if spec.name in offsets]
        self.weights = [(spec.name, "cpu", 0, np.int8, spec.shape, start + offsets[spec.name]) for spec in specs]

    def read(self, parts: Sequence[Part], caches: Mapping[str, Tensor]) -> None:
        """Append the tokens of all parts to those of the caches that are its own."""
        mine = {name: caches[name] for name in self.inputs if name in caches}
        total = parts[-1].inputs[MASK].shape[1]
        floats = {
            name: cache if cache.is_floating_point() else torch.empty(*cache.shape[:2], total, cache.shape[3])
            for name, cache in mine.items()
        }
        binding = self.session.io_binding()  # of this call: others may read prompts at the same time
        for weight in self.weights:
            binding.bind_input(*weight)
        for part in parts:
            part.left |= self._run(binding, part, floats)
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self.data.madvise(mmap.MADV_DONTNEED)  # the file has them still
        for name, cache in mine.items():
            if cache is not floats[name]:
                scale = torch.from_numpy(parts[0].left[f"{name}{SCALE}"].numpy())
                cache[:, :, :total] = floats[name].div_(scale).round_().clamp_(-128, 127)

    def _run(self, binding: ort.IOBinding, part: Part, caches: Mapping[str, Tensor]) -> dict[str, ort.OrtValue]:
        """One part; what it leaves to later pieces."""
        given = {**part.inputs, **caches}
        for name in self.inputs:
            if name in part.left:
                binding.bind_ortvalue_input(name, part.left[name])
            else:
                bind(binding.bind_input, name, given[name])
        binding.clear_binding_outputs()
        for name, cache in caches.items():
            bind(binding.bind_output, self.presents[name], cache)
        for name in self.leaves:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        return dict(zip(self.leaves, binding.get_outputs()[len(caches) :], strict=True))
