"""PackedWeight: a quantized weight in the layout that the weight-only kernels read."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from qcompiler.bits import pack_bits
from qcompiler.kernels.planes import LEAST, MAGNIFY, Cells, pack_planes, unpack_planes
from qcompiler.scheme import QTensor, Scheme

ROWS = 128  # of a tile: two m64 fragments of Hopper's tensor cores, so that no weight goes through shared memory twice
COLUMNS = {2: 512, 3: 256, 4: 256, 8: 128}  # the longest worthwhile step: the shorter, the more overhead for a weight
ENOUGH = 512  # tiles, two for each of two programs on each of 132 processors: only then are the longest steps taken


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [n, k] in tiles of `rows` x `columns`; what fills up the last tiles has scale zero or meets x = 0.

    A row's scales are written as shares, at most 1, of a power of two: so they are exact in 16 bits, and every value
    that is unpacked is an ordinary number. The kernel multiplies by the power once, at the end of a row's sum.

    - `words`: int16 [tiles of n, tiles of k, words of a cell, rows, width], see planes.py
    - `scales`: int32 [pairs of groups, n]; group 2i in the low half, as floats of `dtype`
    - `zeros`: int32 [fours of groups, n]; group 4i in the lowest byte; None if symmetric; where the weight has minima,
      int32 [pairs of groups, n] like the scales, and `grid` is 2
    - `row_scale`: float32 [n]
    - `arrived`: int32 [tiles of n], zero between launches: how many parts of a split sum have been written
    - `permutation`: int32 [k]; stored column j is logical column permutation[j], and so must x be ordered
    """

    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype
    columns: int
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    row_scale: Tensor
    arrived: Tensor
    grid: int = 0
    permutation: Tensor | None = None

    @classmethod
    def pack(cls, weight: QTensor, dtype: torch.dtype = torch.float16, columns: int = 0) -> "PackedWeight":
        """Pack a weight that `linear_wq.ACCEPTS` takes for activations in `dtype` (float16 or bfloat16).

        `columns` is the length of a tile, by default what suits the weight. Codes and zero points are kept exactly;
        scales are rounded to `dtype`, relative to the largest of their row.
        """
        n, k = weight.shape
        assert isinstance(weight.scale, Tensor)
        columns = columns or tile_columns(weight.scheme, n, k)
        groups = weight.scheme.groups(k)
        scale = weight.scale.float().expand(n, groups)
        _, exponent = torch.frexp(scale.abs().amax(1))
        unit = torch.ldexp(torch.ones(n, device=scale.device), exponent)
        shares = (scale / unit[:, None] * MAGNIFY[dtype]).to(dtype)
        words = pack_planes(weight.unpacked(), weight.scheme.bits, ROWS, columns)
        reach = max(groups, words.shape[1] * columns // weight.scheme.group_of(k))  # groups that the tiles extend over
        row_scale = unit / (MAGNIFY[dtype] * LEAST[dtype])
        zeros = None if weight.zero is None else _words(weight.zero.expand(n, groups), 4, reach)
        if isinstance(weight.minimum, Tensor):
            zeros = _words((weight.minimum.float().expand(n, groups) / row_scale[:, None]).to(dtype), 2, reach)
        return cls(
            scheme=weight.scheme,
            shape=(n, k),
            dtype=dtype,
            columns=columns,
            words=words,
            scales=_words(shares, 2, reach),
            zeros=zeros,
            row_scale=_padded(row_scale),
            arrived=words.new_zeros(words.shape[0], dtype=torch.int32),
            grid=2 if weight.minimum is not None else 1 if weight.zero is not None else 0,
            permutation=weight.permutation,
        )

    def unpack(self) -> QTensor:
        """The record that was packed: codes and zero points exactly, scales as they were rounded."""
        n, k = self.shape
        groups = self.scheme.groups(k)
        unit = self.row_scale[:n, None] * (MAGNIFY[self.dtype] * LEAST[self.dtype])
        scale = _parts(self.scales, self.dtype, n, groups).float() / MAGNIFY[self.dtype] * unit
        zero = _parts(self.zeros, torch.uint8, n, groups) if self.zeros is not None and self.grid == 1 else None
        minimum = None
        if self.zeros is not None and self.grid == 2:
            minimum = _parts(self.zeros, self.dtype, n, groups).float() * self.row_scale[:n, None]
        codes = unpack_planes(self.words, self.scheme.bits, n, k)
        packed = pack_bits(codes, self.scheme.bits)
        return QTensor(self.scheme, self.shape, packed, scale, zero, minimum, permutation=self.permutation)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        tensors: dict[str, Any] = {
            name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)
        }
        return replace(self, **tensors)

    @property
    def group(self) -> int:
        """Columns that share a scale, as the kernel counts them."""
        return group_of(self.scheme, self.shape[1], self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        parts = (self.words, self.scales, self.zeros, self.row_scale)
        return sum(part.nbytes for part in parts if part is not None)


def tile_columns(scheme: Scheme, n: int, k: int) -> int:
    """How many columns a tile has: the longest whose planes do not cross groups, halved where tiles would be few."""
    planes = Cells.of(scheme.bits).planes
    group = scheme.group_of(k)
    longest = COLUMNS[scheme.bits] if group == k else min(COLUMNS[scheme.bits], group * planes)
    few = -(-n // ROWS) * -(-k // longest) < ENOUGH
    return longest // 2 if few and longest // 2 >= 16 * planes else longest


def group_of(scheme: Scheme, k: int, columns: int) -> int:
    """Columns that share a scale; where all of a row do, a power of two that no tile reaches beyond."""
    size = scheme.group_of(k)
    return size if size < k else max(columns, 1 << (k - 1).bit_length())


def _padded(values: Tensor) -> Tensor:
    """Values [n, ...] with as many zeros as fill up the last tile."""
    missing = -values.shape[0] % ROWS
    return torch.nn.functional.pad(values, (0, 0) * (values.dim() - 1) + (0, missing))


def _words(values: Tensor, per_word: int, reach: int) -> Tensor:
    """Values [n, groups] of 4 / per_word bytes as int32 [ceil(reach / per_word), n, filled up]."""
    missing = reach + -reach % per_word - values.shape[1]
    filled = torch.nn.functional.pad(_padded(values.contiguous()), (0, missing))
    return filled.contiguous().view(torch.int32).T.contiguous()


def _parts(words: Tensor, dtype: torch.dtype, n: int, groups: int) -> Tensor:
    """What `_words` packed: [n, groups]."""
    return words.T.contiguous().view(dtype)[:n, :groups].contiguous()
