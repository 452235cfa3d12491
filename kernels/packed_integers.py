"""PackedIntegers: a quantized weight in the layout of the kernel that multiplies integers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import No
from qcompiler.kernels.packed_weight import ROWS
from qcompiler.rounding import activation_scheme, codes_of, group_size, run_length
from qcompiler.scheme import QTensor, Scheme, by_group
from qcompiler.target import Answer

WIDTH = 128  # columns of a product, or less where runs are shorter
MAGIC = 0x4B400000  # the bits of 1.5 * 2^23 as float32, whose last bit is worth 1: see linear_a8.py


@dataclass(frozen=True, eq=False)
class PackedIntegers:
    """A weight [n, k] of 4 or 8 bits, for activations rounded by `activation`, a scheme of 8 bits or fewer.

    A run is a stretch of columns that share one scale in both; what lies in it is added up in integers.

    - `words`: int8 [tiles of n, products, rows, width], code less half the levels; with 4 bits a byte holds column i
      of the product's first half in its low bits, and of its second half in its high ones, and `width` is half the
      columns
    - `factors`: float32 [runs, n, filled up]: the weight's scale, times a static activation's
    - `starts`: int32 [runs, n, filled up]: what a static activation's zero point takes from each run's sum; of a
      dynamic one, the sum of the weight's codes less zero points, which each token's zero point is multiplied by
    - `zeros`: int32 [runs, n, filled up]: zero points less half the levels; None if symmetric
    """

    scheme: Scheme
    activation: str
    shape: tuple[int, int]
    run: int
    words: Tensor
    factors: Tensor
    starts: Tensor
    arrived: Tensor
    zeros: Tensor | None = None

    @classmethod
    def pack(cls, weight: QTensor, activation: str, grid: Sequence[Tensor] = ()) -> "PackedIntegers":
        """Pack a weight that `linear_a8.SUITABLE` takes; `grid` is a static activation's, as in qc.integer_linear."""
        n, k = weight.shape
        assert isinstance(weight.scale, Tensor)
        kind, bits = activation_scheme(activation), weight.scheme.bits
        run = run_length(weight.scheme, kind, k)
        width = run if run < k else WIDTH
        steps = weight.unpacked().short() - (weight.scheme.levels >> 1)
        groups = torch.arange(0, k, run, device=steps.device) // weight.scheme.group_of(k)  # of each run
        weights = weight.scale.float().expand(n, weight.scheme.groups(k))[:, groups]
        sums = by_group(steps.int(), run).sum(-1, dtype=torch.int32)  # [n, runs]
        zeros = None
        if weight.zero is not None:
            zeros = weight.zero.expand(n, weight.scheme.groups(k))[:, groups].int() - (weight.scheme.levels >> 1)
            sums = sums - zeros * by_group(torch.ones_like(steps[:1]), run).sum(-1, dtype=torch.int32)
        scale, zero = _of_runs(kind, grid, k, run)
        starts = sums if kind.dynamic else -sums * zero
        words = tiled(steps, bits, width)
        reach = words.shape[1] * (8 // bits) if run < k else 1  # runs that the tiles extend over
        return cls(
            scheme=weight.scheme,
            activation=activation,
            shape=(n, k),
            run=run,
            words=words,
            factors=filled(weights * scale / LIFT[bits], reach),
            starts=filled(starts * LIFT[bits], reach),
            arrived=torch.zeros(-(-n // ROWS), dtype=torch.int32, device=steps.device),
            zeros=None if zeros is None else filled(zeros * LIFT[bits], reach),
        )

    def unpack(self) -> Tensor:
        """The weight's codes, uint8 [n, k], exactly as they were packed."""
        n, k = self.shape
        parts = [self.words.int()]
        if self.scheme.bits == 4:
            parts = [self.words.int() << 28 >> 28, self.words.int() >> 4]
        whole = torch.cat(parts, dim=-1).permute(0, 2, 1, 3)
        return (whole.flatten(2).flatten(0, 1)[:n, :k] + (self.scheme.levels >> 1)).to(torch.uint8)

    def to(self, device: torch.device | str) -> "PackedIntegers":
        """The same on another device."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **moved)

    @property
    def counted(self) -> int:
        """Of how many columns the sums of an activation's codes are needed: a run with zero points; 0 is none."""
        return 0 if self.zeros is None else self.run

    @property
    def columns(self) -> int:
        """Columns of a tile: those of one product, and with 4 bits those of two."""
        return self.words.shape[3] * (8 // self.scheme.bits)

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        parts = (self.words, self.factors, self.starts, self.zeros)
        return sum(part.nbytes for part in parts if part is not None)


def sums_of(codes: Tensor, run: int) -> Tensor:
    """The sums [runs, tokens] of each `run` columns of codes [..., k]: what kernels count as they round.

    Of codes in int8 they are in int32, of floats of 8 bits in float32.

    >>> sums_of(torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8), 2)
    tensor([[3, 9],
            [3, 6]], dtype=torch.int32)
    """
    whole = codes.flatten(0, -2).to(torch.int32 if codes.dtype == torch.int8 else torch.float32)
    return by_group(whole, run).sum(-1, dtype=whole.dtype).T.contiguous()


def runs_suit(weight: QTensor, activation: str) -> Answer:
    """Whether the columns that share a scale in both are all, or so many as one product takes."""
    run = run_length(weight.scheme, activation_scheme(activation), weight.columns)
    suits = run >= weight.columns or run in (32, 64, WIDTH)
    return suits or No(f"a weight {weight.scheme} and an activation {activation} share scales over {run} columns")


LIFT = {4: 16, 8: 1}  # codes of 4 bits are multiplied while they lie in the high half of a byte, sign and all


def _of_runs(kind: Scheme, grid: Sequence[Tensor], k: int, run: int) -> tuple[Tensor | float, Tensor | int]:
    """Scale (float32) and zero point less half the levels (int32) of a static activation for each run; or 1 and 0."""
    if kind.dynamic:
        return 1.0, 0
    _, scale, zero = codes_of(torch.zeros(k, device=grid[0].device), grid, kind)
    groups = torch.arange(0, k, run) // group_size(kind, k)
    middle = zero.expand_as(scale).flatten() - (kind.levels >> 1)
    return scale.flatten()[groups], middle.int()[groups]


def tiled(steps: Tensor, bits: int, width: int) -> Tensor:
    """Codes, int16 [n, k], as `words`; what fills up the last tiles is zero."""
    columns = width * (8 // bits)
    whole = torch.nn.functional.pad(steps, (0, -steps.shape[1] % columns, 0, -steps.shape[0] % ROWS))
    whole = whole.view(whole.shape[0] // ROWS, ROWS, whole.shape[1] // columns, columns).permute(0, 2, 1, 3)
    if bits == 4:
        whole = (whole[..., :width] & 15) | whole[..., width:] << 4
    return whole.to(torch.int8).contiguous()


def filled(values: Tensor, reach: int) -> Tensor:
    """Values [n, runs] as [reach, n filled up], the rest zeros."""
    missing = (0, reach - values.shape[1], 0, -values.shape[0] % ROWS)
    return torch.nn.functional.pad(values, missing).T.contiguous()
