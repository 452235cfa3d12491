"""HQQ: half-quadratic quantization, data-free (Badri and Shaji, 2023).

The zero points of min-max grids are moved so that the rounding error is small in the l_p norm, p < 1, which forgives
outliers: by half-quadratic splitting, the error is shrunk (the generalized soft threshold) and the zero point is then
the mean of what remains, in turns.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.bits import pack_bits
from qcompiler.errors import RecipeError
from qcompiler.passes.rtn import quantize_each
from qcompiler.passes.selection import BODY, select, weight_name
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme, by_group, storage_dtype

# The authors' settings: the strength of the splitting, and its growth from one turn to the next.
BETA, GROWTH = 10.0, 1.01


@dataclass(frozen=True)
class Hqq(Pass):
    """Fit each group's zero point to its weights by half-quadratic splitting; needs no data.

    `scheme` is asymmetric integers in groups or channels. `norm` is p of the l_p norm, `turns` how often error and
    zero point take turns. Zero points are floats (stored as minima); `whole` rounds them to whole steps, which
    checkpoints in the formats of GPTQ and AWQ ask for. A group for which the min-max grid is better keeps it.
    """

    name: ClassVar[str] = "hqq"
    contract: ClassVar[Contract] = Contract.LOSSY

    scheme: Scheme = Scheme.parse("int4:g64:asym")
    norm: float = 0.7
    turns: int = 20
    whole: bool = False
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()
    min_coverage: float = 1.0

    def run(self, program: Program, ctx: Context) -> None:
        self._check()
        names = dict.fromkeys(weight_name(node) for node in select(program, self.include, self.exclude, ctx))

        def fitted(_: str, weight: Tensor) -> QTensor:
            return hqq(weight, self.scheme, self.norm, self.turns, self.whole)

        quantize_each(program, ctx, names, fitted, self.name, self.min_coverage)

    def _check(self) -> None:
        if self.scheme.code != "int" or self.scheme.symmetric or self.scheme.granularity not in ("group", "channel"):
            raise RecipeError(
                f'hqq: scheme "{self.scheme}" has no zero points by group to fit; write for example int4:g64:asym'
            )
        if not 0 < self.norm <= 1 or self.turns < 1:
            raise RecipeError(f"hqq: norm {self.norm:g} must be above 0 and at most 1, turns {self.turns} at least 1")


def hqq(weight: Tensor, scheme: Scheme, norm: float = 0.7, turns: int = 20, whole: bool = False) -> QTensor:
    """Quantize weight [n, k]; the error in the l_p norm is in no group above that of its min-max grid."""
    plain = QTensor.quantize(weight, scheme)
    assert isinstance(plain.scale, Tensor)
    assert plain.zero is not None
    size, columns, top = scheme.group_of(weight.shape[1]), weight.shape[1], scheme.levels - 1
    groups = by_group(weight.detach().float(), size)
    real = by_group(torch.ones(1, columns), size)
    step = plain.scale.float()[..., None]
    zero = plain.zero.float()[..., None]
    best = zero.clone()
    best_loss = _loss(groups, step, zero, top, norm, real)
    beta = BETA
    for _ in range(turns):
        codes = (groups / step + zero).round_().clamp_(0, top)
        left = groups - (codes - zero) * step
        wanted = groups - _shrunk(left, beta, norm)
        zero = ((codes - wanted / step) * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
        tried = zero.round().clamp_(0, top) if whole else zero
        loss = _loss(groups, step, tried, top, norm, real)
        better = loss < best_loss
        best, best_loss = torch.where(better, tried, best), torch.where(better, loss, best_loss)
        beta *= GROWTH
    if whole:
        return QTensor.encode(weight, scheme, plain.scale, best[..., 0].to(torch.uint8))
    return _with_minima(plain, groups, step, best, columns)


def _with_minima(plain: QTensor, groups: Tensor, step: Tensor, zero: Tensor, columns: int) -> QTensor:
    """The record with float zero points, as minima; codes fit the minima as they are stored."""
    minimum = (-zero * step)[..., 0]
    minimum = minimum.to(storage_dtype(minimum))
    codes = ((groups - minimum.float()[..., None]) / step).round_().clamp_(0, plain.scheme.levels - 1)
    packed = pack_bits(codes.flatten(1)[:, :columns].to(torch.uint8).contiguous(), plain.scheme.bits)
    return replace(plain, codes=packed, zero=None, minimum=minimum)


def _shrunk(error: Tensor, beta: float, norm: float) -> Tensor:
    """The generalized soft threshold: sign(x) * max(|x| - |x|^(p-1) / beta, 0)."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-12).pow(norm - 1) / beta).clamp_(min=0)


def _loss(groups: Tensor, step: Tensor, zero: Tensor, top: int, norm: float, real: Tensor) -> Tensor:
    """The l_p error of each group, [n, groups, 1]."""
    codes = (groups / step + zero).round_().clamp_(0, top)
    left = (groups - (codes - zero) * step) * real
    return left.abs().pow(norm).sum(-1, keepdim=True)
