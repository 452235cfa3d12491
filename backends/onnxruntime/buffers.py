"""Decoding in place: each cache is one buffer of full capacity, past and present at once, bound once."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from qcompiler.backends.onnxruntime.names import AT_ONCE, MASK
from qcompiler.backends.onnxruntime.reader import PromptReader
from qcompiler.backends.onnxruntime.sessions import bind
from qcompiler.errors import BackendError
from qcompiler.padding import Shift
from qcompiler.program import Program, Type
from qcompiler.target import Decoder

LONG = 32  # tokens; a prompt of more is worth reading in its own form


class SharedDecoder(Decoder):
    """Rows may be of unequal length: each has its tokens at the front of its part of the buffers."""

    def __init__(
        self,
        program: Program,
        session: ort.InferenceSession,
        inputs: Sequence[str],
        caches: Mapping[str, Type],
        batch: int,
        capacity: int,
        reader: PromptReader | None = None,
    ) -> None:
        self.program, self.session, self.inputs = program, session, inputs
        self.reader = reader  # the form that reads prompts, if there is one: see prompt.py
        self.capacity, self.lengths = capacity, torch.zeros(batch, dtype=torch.int64)
        self.caches = {name: empty(kind, batch, capacity) for name, kind in caches.items()}
        self.mask = torch.zeros((batch, capacity), dtype=torch.int64)
        self.ids, self.positions = (torch.zeros((batch, 1), dtype=torch.int64) for _ in range(2))
        self.kept = torch.zeros(1, dtype=torch.int64)
        values: Any = program.output_node.args[0]
        self.logits = empty(values[program.outputs.index("logits")].meta["type"], batch)
        # Made once: binding everything costs a tenth of a small step. The mask is as long as the buffers, and zero
        # behind each row's tokens, so that no step differs in a shape from the one before.
        self.single = self._bind(self.ids, self.positions, self.kept, self.mask, self.logits)

    def step(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Append ids [batch, new]; returns the logits [batch, vocabulary] of the last position."""
        batch, new = ids.shape
        start = int(self.lengths.max())
        if start + new > self.capacity:
            raise BackendError(
                f"{start} + {new} positions are more than this decoder's {self.capacity}; ask for more capacity"
            )
        if mask is not None and start:
            raise BackendError("padding comes with the prompt, in a decoder's first step")
        if start and new > 1 and batch > 1:
            # GroupQueryAttention takes several new positions over a past for one sequence only.
            return [self.step(column) for column in ids.split(1, dim=1)][-1]
        if new > 1:
            return self._prompt(ids, mask)
        self.ids.copy_(ids)
        self.positions.copy_(self.lengths[:, None])
        self.mask.scatter_(1, self.lengths[:, None], 1)
        self.lengths += 1
        self.session.run_with_iobinding(self.single)
        return torch.from_numpy(self.logits.numpy()[:, 0].copy())  # numpy: see qcompiler/sampling.py

    def _prompt(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Several positions at once; the logits of each row's last."""
        counts = torch.full_like(self.lengths, ids.shape[1])
        if mask is not None and not bool(mask.all()):
            shift = Shift.of(mask)
            ids, counts = shift.to_front(ids), counts - shift.pads
        if len(ids) == 1:
            ids = ids[:, : int(counts)]
        if self.reader is not None and int(counts.min()) > LONG and self.reader.takes(self.caches, self.lengths):
            return self._read(self.reader, ids, counts)
        if len(ids) > 1:
            return self._append(ids, counts)
        return [self._append(part, torch.tensor([part.shape[1]])) for part in ids.split(AT_ONCE, dim=1)][-1]

    def _append(self, ids: Tensor, counts: Tensor) -> Tensor:
        """The first `counts` of each row's ids in one run; the logits of the last of them."""
        ids, positions = ids.contiguous(), self._positions(ids)  # they must outlive the binding
        self._lengthen(counts)
        kept, row = torch.unique(counts - 1, return_inverse=True)
        mask = self.mask[:, : int(positions[0, -1]) + 1].contiguous()  # of several positions it gives their places
        binding = self._bind(ids, positions, kept, mask)
        self.session.run_with_iobinding(binding)
        logits = torch.from_numpy(binding.get_outputs()[0].numpy())
        return logits[torch.arange(len(ids)), row]

    def _read(self, reader: PromptReader, ids: Tensor, counts: Tensor) -> Tensor:
        """A prompt but for each row's last token, which the first form then adds."""
        last = ids.gather(1, counts[:, None] - 1)
        positions = self._positions(ids)
        self._lengthen(counts - 1)
        given = {self.program.inputs[0].name: ids[:, :-1], "position_ids": positions[:, :-1]}
        reader.read(given, self.mask, self.caches)
        return self.step(last)

    def _positions(self, ids: Tensor) -> Tensor:
        """The positions of further ids."""
        start = int(self.lengths.max())
        return torch.arange(start, start + ids.shape[1]).repeat(len(ids), 1)

    def _lengthen(self, counts: Tensor) -> None:
        """Count so many more tokens of each row, and unmask them."""
        self.lengths += counts
        self.mask.copy_(torch.arange(self.capacity) < self.lengths[:, None])

    def _bind(
        self, ids: Tensor, positions: Tensor, kept: Tensor, mask: Tensor, logits: Tensor | None = None
    ) -> ort.IOBinding:
        """A binding of all buffers; without one for the logits they are made as large as they get."""
        binding = self.session.io_binding()
        if logits is None:
            binding.bind_output("logits", "cpu")
        else:
            bind(binding.bind_output, "logits", logits)
        given = {self.program.inputs[0].name: ids, "position_ids": positions, "logits_positions": kept, MASK: mask}
        buffers = {**given, **self.caches}
        for name in self.inputs:
            bind(binding.bind_input, name, buffers[name])
        for past, present in self.program.info["caches"].items():
            bind(binding.bind_output, present, self.caches[past])
        return binding


def empty(kind: Type, batch: int, past: int = 0, kept: int = 1) -> Tensor:
    """Zeros of a type, with room for `past` positions in a cache."""
    sizes = {"batch": batch, "past": past, "kept": kept}
    shape = [sizes[size] if isinstance(size, str) else size for size in kind.shape]
    return torch.zeros(shape, dtype=kind.dtype)
