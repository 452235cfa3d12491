"""GPTQ: accurate post-training quantization (Frantar et al., arXiv 2210.17323).

Columns are rounded one after another; the error of each is spread over the columns not yet rounded, weighted by the
inverse Hessian of the layer's squared error ||WX - QX||^2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompiler.calibration import Needs
from qcompiler.errors import No, PassError
from qcompiler.passes.rtn import Rtn, layer_record
from qcompiler.passes.selection import BODY, check_coverage, select, weight_name
from qcompiler.passes.statistics import Hessian
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme, by_group, pack_bits, range_grid

BLOCK = 128  # columns whose errors are spread together, as in the paper's lazy batch updates


@dataclass(frozen=True)
class Gptq(Pass):
    """Quantize linear layers with GPTQ, segment by segment, each on the outputs of the quantized ones before it.

    `damp` is added to the Hessian's diagonal as a fraction of its mean. `act_order` rounds the columns with the
    largest activations first; groups are static (fixed before, in the original column order), so that no
    permutation remains at run time. `clip` is how far the search for each group's range may shrink it (1 keeps the
    minimum-maximum range). `refits` is how often the scales are fitted to the codes by least squares and the columns
    rounded again (beyond the paper; 0 is plain GPTQ). A row for which plain rounding has the smaller error keeps its
    rounded codes.
    """

    name: ClassVar[str] = "gptq"
    contract: ClassVar[Contract] = Contract.LOSSY

    scheme: Scheme = Scheme.parse("int4:g128")
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()
    damp: float = 0.01
    act_order: bool = True
    clip: float = 0.6
    refits: int = 1
    min_coverage: float = 1.0

    @property
    def uses_data(self) -> bool:
        return True

    def plan(self) -> Pass:
        return Rtn(self.scheme, self.include, self.exclude, self.min_coverage)

    def run(self, program: Program, ctx: Context) -> None:
        if not ctx.samples:
            raise PassError("it needs calibration data; give calibration=..., or use rtn, which needs none")
        chosen = {node.name for node in select(program, self.include, self.exclude, ctx)}
        done = 0

        def needs(nodes: Sequence[fx.Node]) -> Needs:
            return {node.name: Hessian() for node in nodes if node.name in chosen}

        for segment in ctx.sweep(program, needs):
            for node in [n for n in segment.nodes if n.name in segment.statistics]:
                ctx.node = node
                done += self._quantize(program, node, segment.statistics[node.name], ctx)
        check_coverage(len(chosen), done, self.min_coverage)

    def _how(self) -> dict[str, Any]:
        return {"damp": self.damp, "act_order": self.act_order, "clip": self.clip, "refits": self.refits}

    def _quantize(self, program: Program, node: fx.Node, hessian: Tensor | None, ctx: Context) -> bool:
        name = weight_name(node)
        if name not in program.tensors:  # a weight shared by two layers: quantized with the first
            return True
        weight = program.tensors[name]
        if hessian is None or not bool(torch.isfinite(hessian).all()):
            ctx.refuse(No("no finite activations reached it", name))
            return False
        q, error = gptq(weight, hessian, self.scheme, **self._how())
        ctx.layer(layer_record(name, weight, q, self.name, error))
        program.quantize_tensor(name, q)
        return True


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    clip: float = 0.6,
    refits: int = 1,
) -> tuple[QTensor, float]:
    """Quantize weight [n, k] given the Hessian [k, k] of its inputs; returns it and its relative output error.

    Row by row the objective is never worse than rounding to the nearest code of the minimum-maximum grid.
    """
    w, h = weight.float(), hessian.float()
    inverse, order = inverse_factor(hessian.double(), damp, act_order)
    best = QTensor.quantize(weight, scheme)
    scale, zero = search_grid(w, h.diagonal(), scheme, clip)
    for _ in range(1 + refits):
        codes = solve(w, inverse, order, scheme, scale, zero)
        solved = QTensor(scheme, tuple(w.shape), pack_bits(codes, scheme.bits), scale, zero, dtype=weight.dtype)
        best = better(w, h, solved, best)
        if scheme.granularity == "tensor":
            break
        scale = refit_scale(w, h, solved)
        best = better(w, h, solved.with_parts(scale=scale), best)
    energy = ((w @ h) * w).sum().clamp(min=1e-30)
    return best, float((objective(w, best, h).sum() / energy).sqrt())


def inverse_factor(h: Tensor, damp: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the damped inverse Hessian in processing order, and that order.

    Channels that were never active get a unit diagonal: their columns are simply rounded.
    """
    h = h.clone()
    diagonal = h.diagonal()
    diagonal[diagonal <= 0] = 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(h.shape[0])
    h = h[order][:, order]
    for attempt in range(8):  # a singular Hessian needs more damping
        damped = h + torch.eye(h.shape[0], dtype=h.dtype) * (damp * 4**attempt * h.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float(), order
    raise PassError(f"the Hessian is not positive definite even when damped; raise damp above {damp:g}")


def solve(w: Tensor, u: Tensor, order: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The GPTQ recursion: codes, uint8 [n, k], on a fixed grid, columns processed in `order`."""
    columns = w.shape[1]
    group = torch.arange(columns) // scheme.group_of(columns) if scale.shape[1] > 1 else torch.zeros(columns).long()
    s = scale.float()[:, group[order]].expand(w.shape[0], -1)
    z = zero.float()[:, group[order]].expand_as(s) if zero is not None else torch.full_like(s, scheme.levels >> 1)
    w = w[:, order].clone()
    codes = torch.empty_like(w)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(w.shape[0], stop - start)
        block = w[:, start:stop].clone()
        for i in range(stop - start):
            j = start + i
            code = (torch.round(block[:, i] / s[:, j]) + z[:, j]).clamp_(0, scheme.levels - 1)
            codes[:, j] = code
            errors[:, i] = (block[:, i] - (code - z[:, j]) * s[:, j]) / u[j, j]
            block[:, i + 1 :].addr_(errors[:, i], u[j, j + 1 : stop], alpha=-1)
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return codes[:, torch.argsort(order)].to(torch.uint8)


def search_grid(w: Tensor, importance: Tensor, scheme: Scheme, clip: float) -> tuple[Tensor, Tensor | None]:
    """Per group, the shrunken minimum-maximum range with the least rounding error weighted by `importance` [k]."""
    size = scheme.group_of(w.shape[1])
    groups = by_group(w, size)
    low, high = groups.amin(-1), groups.amax(-1)
    if scheme.granularity == "tensor":
        low, high = low.amin().view(1, 1), high.amax().view(1, 1)
        return range_grid(low, high, scheme)
    weights = by_group(importance.clamp(min=importance.mean() * 1e-4)[None], size)
    best_error = torch.full_like(low, torch.inf)
    best_low, best_high = low.clone(), high.clone()
    steps = max(1, round((1 - clip) * 40))
    for step in range(steps + 1):
        shrink = 1 - (1 - clip) * step / steps
        scale, zero = range_grid(low * shrink, high * shrink, scheme)
        error = _rounding_error(groups, scheme, scale, zero).pow_(2).mul_(weights).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low = torch.where(better, low * shrink, best_low)
        best_high = torch.where(better, high * shrink, best_high)
    return range_grid(best_low, best_high, scheme)


def _rounding_error(groups: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> Tensor:
    """What rounding to the grid changes, for values [rows, groups, group]."""
    step = scale.float()[..., None]
    offset = zero.float()[..., None] if zero is not None else float(scheme.levels >> 1)
    codes = (groups / step).round_().add_(offset).clamp_(0, scheme.levels - 1)
    return codes.sub_(offset).mul_(step).sub_(groups)


def refit_scale(w: Tensor, h: Tensor, q: QTensor) -> Tensor:
    """The scales [n, groups] that minimise ||WX - QX||^2 for the codes of `q`, by least squares in each row."""
    assert isinstance(q.scale, Tensor)
    middle = q.zero.float() if q.zero is not None else torch.full_like(q.scale.float(), q.scheme.levels >> 1)
    index = q.group_index() if q.scale.shape[1] > 1 else torch.zeros(w.shape[1], dtype=torch.int64)
    steps = q.unpacked().float() - middle[:, index]
    count = q.scale.shape[1]
    gram = torch.empty(w.shape[0], count, count)
    target = torch.empty(w.shape[0], count)
    for group in range(count):
        inside = index == group
        curved = steps[:, inside] @ h[inside]
        gram[:, group] = by_group(curved * steps, q.scheme.group_of(w.shape[1])).sum(-1)
        target[:, group] = (curved * w).sum(-1)
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(count)
    fitted, failed = torch.linalg.solve_ex(gram + ridge, target)
    usable = torch.isfinite(fitted) & (fitted > 0) & (failed == 0)[:, None]
    return torch.where(usable, fitted, q.scale.float()).to(q.scale.dtype)


def objective(w: Tensor, q: QTensor, h: Tensor) -> Tensor:
    """||WX - QX||^2 per row, float32 [n]."""
    difference = w - q.dequantize().float()
    return ((difference @ h) * difference).sum(-1)


def better(w: Tensor, h: Tensor, a: QTensor, b: QTensor) -> QTensor:
    """Row by row, whichever of `a` and `b` has the smaller objective; as a whole where all rows share one scale."""
    mine, other = objective(w, a, h), objective(w, b, h)
    if a.scheme.granularity == "tensor":
        return a if mine.sum() <= other.sum() else b
    keep = (mine <= other)[:, None]
    parts = {}
    for name, part in a.parts().items():
        dtype = torch.promote_types(part.dtype, b.parts()[name].dtype)
        parts[name] = torch.where(keep, part.to(dtype), b.parts()[name].to(dtype))
    return a.with_parts(**parts)
