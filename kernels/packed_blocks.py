"""PackedBlocks: a weight whose scales have two levels (GGUF's Q4_K and Q6_K) in the layout that linear_gguf reads."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qcompiler.bits import pack_bits
from qcompiler.errors import No
from qcompiler.kernels.packed_weight import ROWS
from qcompiler.kernels.planes import LEAST, Cells, pack_planes, unpack_planes
from qcompiler.scheme import QTensor, Scheme
from qcompiler.target import Answer

SUPERBLOCK = 256  # columns that share a step
# What a group's scale, as a share of its row's unit, is multiplied by; and what a code of the second level is worth, of
# scales and of minima, when the kernel has made a float of it.
MAGNIFY = {torch.float16: 2.0**15, torch.bfloat16: 2.0**119}
WORTH = {torch.float16: (1.0, 2.0**-9), torch.bfloat16: (2.0**-8, 2.0**-8)}


@dataclass(frozen=True)
class Kind:
    """One of GGUF's two-level formats: the code's bits and group; the scheme of its scales; whether it has minima."""

    name: str
    bits: int
    group: int
    scales: Scheme
    minima: bool


KINDS = (
    Kind("Q4_K", 4, 32, Scheme.parse("int6:g8:asym"), True),
    Kind("Q6_K", 6, 16, Scheme.parse("int8:g16:sym"), False),
)


def kind_of(weight: QTensor) -> Kind | No:
    """Which of KINDS a record is."""
    for kind in KINDS:
        if weight.scheme.bits == kind.bits and weight.scheme.group_of(weight.columns) == kind.group:
            levels = [weight.scale, *([weight.minimum] if kind.minima else [])]
            if all(_is_level(level, kind) for level in levels) and kind.minima == (weight.minimum is not None):
                return kind
    return No(f"scales of two levels as {' or '.join(kind.name for kind in KINDS)} have them are wanted")


def _is_level(level: Tensor | QTensor | None, kind: Kind) -> bool:
    if not isinstance(level, QTensor) or level.scheme != kind.scales or not isinstance(level.scale, Tensor):
        return False
    # Codes of minima and of asymmetric scales count from zero: there is one step, and no zero point.
    return not bool(level.zero.any()) if level.zero is not None else kind.scales.symmetric


def suits(weight: QTensor) -> Answer:
    """Whether a record is one of KINDS, and its rows are whole superblocks."""
    kind = kind_of(weight)
    if isinstance(kind, No):
        return kind
    return weight.columns % SUPERBLOCK == 0 or No(f"k={weight.columns} is not a multiple of {SUPERBLOCK}")


@dataclass(frozen=True, eq=False)
class PackedBlocks:
    """A weight [n, k] of one of KINDS, for activations in `dtype`: 4.625 bits a weight for Q4_K, 6.625 for Q6_K.

    The codes of both levels are kept as they are. The steps are written as shares of a power of two for each row, which
    the kernel multiplies by at the end of a row's sum: in float16 exactly, unless those of a row differ by 2^29.

    - `words`: int16 [tiles of n, tiles of k, words of a cell, rows, width], see planes.py; a group is a plane's width
    - `inner`: int32 [words, n, filled up]: codes of scales and minima, bytes s0 s1 m0 m1 of two groups; without minima
      bytes s0 s2 s1 s3 of four groups, plus 128
    - `outer`: int32 [superblocks, n, filled up]: step of the scales, and of the minima, as floats of `dtype`; without
      minima the step twice
    - `row_scale`: float32 [n, filled up]
    - `arrived`: int32 [tiles of n], zero between launches
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    words: Tensor
    inner: Tensor
    outer: Tensor
    row_scale: Tensor
    arrived: Tensor

    @classmethod
    def pack(cls, weight: QTensor, dtype: torch.dtype = torch.float16) -> "PackedBlocks":
        """Pack a weight that `suits` takes, for activations in `dtype` (float16 or bfloat16)."""
        kind = kind_of(weight)
        assert isinstance(kind, Kind)
        assert isinstance(weight.scale, QTensor)
        n, k = weight.shape
        least = weight.scale.dequantize().abs().amax(1)
        levels = [weight.scale]
        if isinstance(weight.minimum, QTensor):
            levels.append(weight.minimum)
            least = torch.maximum(least, weight.minimum.dequantize().abs().amax(1) / weight.scheme.levels)
        _, exponent = torch.frexp(least)
        unit = torch.ldexp(torch.ones(n, device=least.device), exponent)
        row_scale = unit / (MAGNIFY[dtype] * LEAST[dtype])
        factors = (MAGNIFY[dtype], MAGNIFY[dtype] * LEAST[dtype])  # the minimum is added to a product
        steps = [
            (_step(level) / unit[:, None] * (factor / worth)).to(dtype)
            for level, factor, worth in zip(levels, factors, WORTH[dtype], strict=False)
        ]
        words = pack_planes(weight.unpacked(), kind.bits, ROWS, kind.group * Cells.of(kind.bits).planes)
        return cls(
            name=kind.name,
            shape=(n, k),
            dtype=dtype,
            words=words,
            inner=_filled(_interleaved([level.unpacked() for level in levels])),
            outer=_filled(torch.stack([steps[0], steps[-1]], dim=-1).view(torch.int32).squeeze(-1)),
            row_scale=torch.nn.functional.pad(row_scale, (0, -n % ROWS)),
            arrived=words.new_zeros(words.shape[0], dtype=torch.int32),
        )

    def unpack(self) -> QTensor:
        """The record that was packed: codes of both levels exactly, steps as they were rounded."""
        n, k = self.shape
        codes = _apart(self.inner[:, :n].T.contiguous(), 2 if self.kind.minima else 1)
        steps = self.outer[:, :n].T.contiguous().view(self.dtype).view(n, -1, 2).double()
        unit = self.row_scale[:n, None]
        factors = (LEAST[self.dtype], 1.0)
        levels = [
            self._level(part, (step * unit * (factor * worth)).float())
            for part, step, factor, worth in zip(codes, steps.unbind(-1), factors, WORTH[self.dtype], strict=False)
        ]
        scheme = Scheme.parse(f"int{self.kind.bits}:g{self.kind.group}:{'asym' if self.kind.minima else 'sym'}")
        packed = pack_bits(unpack_planes(self.words, self.kind.bits, n, k), self.kind.bits)
        return QTensor(scheme, self.shape, packed, levels[0], minimum=levels[1] if self.kind.minima else None)

    def _level(self, codes: Tensor, step: Tensor) -> QTensor:
        scheme = self.kind.scales
        zero = None if scheme.symmetric else torch.zeros_like(step, dtype=torch.uint8)
        return QTensor(scheme, tuple(codes.shape), pack_bits(codes, scheme.bits), step, zero)

    def to(self, device: torch.device | str) -> "PackedBlocks":
        """The same on another device."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **moved)

    @property
    def kind(self) -> Kind:
        """What `name` stands for."""
        return next(kind for kind in KINDS if kind.name == self.name)

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        return sum(part.nbytes for part in (self.words, self.inner, self.outer, self.row_scale))


def _step(level: QTensor) -> Tensor:
    assert isinstance(level.scale, Tensor)
    return level.scale.float()


def _interleaved(codes: list[Tensor]) -> Tensor:
    """Codes [n, groups], of scales and perhaps minima, in the order of their bytes: int32 [n, words]."""
    if len(codes) == 2:
        pairs = torch.stack([part.unflatten(1, (-1, 2)) for part in codes], dim=-2)
    else:
        pairs = codes[0].unflatten(1, (-1, 2, 2)).transpose(-1, -2)
    return pairs.flatten(1).contiguous().view(torch.int32)


def _apart(words: Tensor, parts: int) -> list[Tensor]:
    """What `_interleaved` packed: `parts` tensors uint8 [n, groups]."""
    quads = words.view(torch.uint8).unflatten(1, (-1, 2, 2))
    if parts == 2:
        return [part.flatten(1).contiguous() for part in quads.unbind(2)]
    return [quads.transpose(-1, -2).flatten(1).contiguous()]


def _filled(values: Tensor) -> Tensor:
    """Values [n, count] as [count, n, filled up]."""
    return torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % ROWS)).T.contiguous()
