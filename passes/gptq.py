"""GPTQ: accurate post-training quantization (Frantar et al., arXiv 2210.17323).

Columns are rounded one after another; the error of each is spread over the columns not yet rounded, weighted by the
inverse Hessian of the layer's squared error ||WX - QX||^2.

Two variants: tokens that count for more (`importance`), and inputs X that are not what they are in the float model, X~
(`correction`): then the error is ||WX~ - QX||^2 (GPTAQ, Li et al., arXiv 2504.02692), whose least value over floats is
at W + W (X~ - X) X' (XX')^-1; that matrix is rounded in W's place (QEP, Arai and Ichikawa, arXiv 2504.09629).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from qcompiler.bits import pack_bits
from qcompiler.calibration import Needs, Segment
from qcompiler.errors import No, PassError, RecipeError
from qcompiler.passes.curvature import IMPORTANCE, Side, measure, side_by_side
from qcompiler.passes.rtn import Rtn, layer_record
from qcompiler.passes.selection import BODY, check_coverage, select, weight_name
from qcompiler.passes.statistics import Hessian
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme, by_group, range_grid

NONE: Mapping[str, Tensor] = MappingProxyType({})
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

    `importance` is how tokens are weighed: `relative`, `attention`, or all the same (see `curvature`). `correction` is
    how much of the way to the corrected weights is gone, 0 (none) to 1; to stop before the end guards against fitting
    the calibration data. Both run each block once more, and `correction` the float model beside.

    `samples` > 0 reads the first so many calibration sequences only: a pass after it may want more of them.
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
    importance: str = ""
    correction: float = 0.0
    samples: int = 0
    min_coverage: float = 1.0

    @property
    def uses_data(self) -> bool:
        return True

    def plan(self) -> Pass:
        return Rtn(self.scheme, self.include, self.exclude, self.min_coverage)

    def run(self, program: Program, ctx: Context) -> None:
        if not ctx.samples:
            raise PassError("it needs calibration data; give calibration=..., or use rtn, which needs none")
        if self.importance not in IMPORTANCE:
            raise RecipeError(f'importance "{self.importance}" is none of {", ".join(filter(None, IMPORTANCE))}')
        if not 0 <= self.correction <= 1:
            raise RecipeError(f"correction={self.correction:g}: it is a share of the way, 0 to 1")
        with ctx.reading(self.samples):
            self._quantize(program, ctx)

    def _quantize(self, program: Program, ctx: Context) -> None:
        chosen = {node.name: weight_name(node) for node in select(program, self.include, self.exclude, ctx)}
        journal = ctx.journal.of(str(self), program, ctx.samples, ctx.seed)
        plain = not self.importance and not self.correction

        def needs(nodes: Sequence[fx.Node]) -> Needs:
            layers = [node for node in nodes if node.name in chosen and not journal.has(node)] if plain else []
            return {node.name: Hessian() for node in layers}

        for segment, floats in side_by_side(program, needs, ctx, bool(self.correction)):
            errors: dict[str, float] = {}
            if (found := journal.get(segment.index)) is None:
                drifts: Mapping[str, Tensor] = {}
                layers = [node for node in segment.nodes if node.name in chosen]
                if layers and not plain:
                    hessians, drifts = measure(Side(program, segment), floats, ctx.samples, layers, self.importance)
                    segment.statistics |= hessians
                found, errors = self.segment(program, segment, ctx, drifts)
                journal.put(segment.index, found)
            for name, q in found.items():
                ctx.layer(layer_record(name, program.tensors[name], q, self.name, errors.get(name)))
                program.quantize_tensor(name, q)
        check_coverage(len(chosen), sum(name in program.quantized for name in chosen.values()), self.min_coverage)

    def segment(
        self, program: Program, segment: Segment, ctx: Context, drifts: Mapping[str, Tensor] = NONE
    ) -> tuple[dict[str, QTensor], dict[str, float]]:
        """The quantized weights of a segment by name, and their relative output errors."""
        found: dict[str, QTensor] = {}
        errors: dict[str, float] = {}
        factors: dict[int, tuple[Tensor, Tensor]] = {}  # layers that read the same input share its Hessian
        for node in [n for n in segment.nodes if n.name in segment.statistics]:
            ctx.node = node
            name, hessian = weight_name(node), segment.statistics[node.name]
            if name in found or name not in program.tensors:  # shared by two layers: quantized with the first
                continue
            if hessian is None or not bool(torch.isfinite(hessian).all()):
                ctx.refuse(No("no finite activations reached it", name))
                continue
            if id(hessian) not in factors:
                factors[id(hessian)] = inverse_factor(hessian, self.damp, self.act_order)
            weight = program.tensors[name]
            if node.name in drifts:
                weight = corrected(weight, drifts[node.name], factors[id(hessian)], self.correction)
            found[name], errors[name] = _gptq(
                weight, hessian, factors[id(hessian)], self.scheme, self.clip, self.refits
            )
        return found, errors


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
    return _gptq(weight, hessian, inverse_factor(hessian, damp, act_order), scheme, clip, refits)


def _gptq(
    weight: Tensor, hessian: Tensor, factor: tuple[Tensor, Tensor], scheme: Scheme, clip: float, refits: int
) -> tuple[QTensor, float]:
    w, h = weight.float(), hessian.float()

    def costed(q: QTensor) -> Candidate:
        return Candidate(q, objective(w, q, h))

    best = costed(QTensor.quantize(weight, scheme))
    scale, zero = search_grid(w, h.diagonal(), scheme, clip)
    for _ in range(1 + refits):
        codes = solve(w, *factor, scheme, scale, zero)
        solved = QTensor(scheme, tuple(w.shape), pack_bits(codes, scheme.bits), scale, zero, dtype=weight.dtype)
        best = better(costed(solved), best)
        if scheme.granularity == "tensor":
            break
        scale = refit_scale(w, h, solved)
        best = better(costed(solved.with_parts(scale=scale)), best)
    energy = ((w @ h) * w).sum().clamp(min=1e-30)
    return best.q, float((best.loss.sum() / energy).sqrt())


def inverse_factor(h: Tensor, damp: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the damped inverse Hessian in processing order, and that order.

    Channels that were never active get a unit diagonal: their columns are simply rounded.
    """
    h = h.double().clone()
    diagonal = h.diagonal()
    diagonal[diagonal <= 0] = 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(h.shape[0])
    # H = R R' with R upper is a Cholesky factorization from the last column to the first; then U = R^-1.
    backwards = order.flip(0)
    h = h[backwards][:, backwards]
    identity = torch.eye(h.shape[0], dtype=h.dtype)
    for attempt in range(8):  # a singular Hessian needs more damping
        lower, failed = torch.linalg.cholesky_ex(h + identity * (damp * 4**attempt * h.diagonal().mean()))
        if not failed:
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            return upper.float(), order
    raise PassError(f"the Hessian is not positive definite even when damped; raise damp above {damp:g}")


def corrected(weight: Tensor, drift: Tensor, factor: tuple[Tensor, Tensor], strength: float) -> Tensor:
    """Weight [n, k] moved by `strength` towards W + W D H^-1, D the drift [k, k]: what makes of X what W does of X~.

    `factor` is what `inverse_factor` gave for H: its inverse is U' U in processing order.
    """
    u, order = factor
    shift = (weight.float() @ drift)[:, order] @ u.T @ u
    return (weight.float() + strength * shift[:, torch.argsort(order)]).to(weight.dtype)


def solve(w: Tensor, u: Tensor, order: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The GPTQ recursion: codes, uint8 [n, k], on a fixed grid, columns processed in `order`.

    All is held transposed, a column of the weight in one run of memory, and a column collects the errors of those
    before it when its turn comes.
    """
    count, top = w.shape[1], scheme.levels - 1
    group = torch.arange(count) // scheme.group_of(count) if scale.shape[1] > 1 else torch.zeros(count).long()
    s = scale.float().T[group[order]].expand(-1, w.shape[0])
    z = zero.float().T[group[order]].expand_as(s) if zero is not None else torch.full_like(s, scheme.levels >> 1)
    columns = w.T[order].contiguous()
    codes = torch.empty_like(columns)
    spread, diagonal = u.T.contiguous(), u.diagonal().tolist()
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        errors = torch.empty(stop - start, w.shape[0])
        for j in range(start, stop):
            before = j - start
            column = torch.addmv(columns[j], errors[:before].T, spread[j, start:j], alpha=-1)
            code = (column / s[j]).round_().add_(z[j]).clamp_(0, top)
            codes[j] = code
            errors[before] = column.sub_(code.sub_(z[j]).mul_(s[j])).div_(diagonal[j])
        columns[stop:].addmm_(spread[stop:, start:stop], errors, alpha=-1)
    return codes[torch.argsort(order)].T.to(torch.uint8).contiguous()


def search_grid(w: Tensor, importance: Tensor, scheme: Scheme, clip: float) -> tuple[Tensor, Tensor | None]:
    """Per group, the shrunken minimum-maximum range with the least rounding error weighted by `importance` [k].

    A symmetric grid has one code more on one side; which side that is, the sign of the scale says.
    """
    size = scheme.group_of(w.shape[1])
    groups = by_group(w, size)
    low, high = groups.amin(-1), groups.amax(-1)
    if scheme.granularity == "tensor":
        low, high = low.amin().view(1, 1), high.amax().view(1, 1)
        return range_grid(low, high, scheme)
    weights = by_group(importance.clamp(min=importance.mean() * 1e-4)[None], size)
    best_error = torch.full_like(low, torch.inf)
    best_shrink, best_sign = torch.ones_like(low), torch.ones_like(low)
    steps = max(1, round((1 - clip) * 40))
    for step, sign in product(range(steps + 1), (1, -1) if scheme.symmetric else (1,)):
        shrink = 1 - (1 - clip) * step / steps
        scale, zero = range_grid(low * shrink, high * shrink, scheme)
        error = _rounding_error(groups, scheme, scale * sign, zero).pow_(2).mul_(weights).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_shrink, best_sign = torch.where(better, shrink, best_shrink), torch.where(better, sign, best_sign)
    scale, zero = range_grid(low * best_shrink, high * best_shrink, scheme)
    return scale * best_sign.to(scale.dtype), zero


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
    usable = torch.isfinite(fitted) & (fitted * q.scale.sign() > 0) & (failed == 0)[:, None]
    return torch.where(usable, fitted, q.scale.float()).to(q.scale.dtype)


def objective(w: Tensor, q: QTensor, h: Tensor) -> Tensor:
    """||WX - QX||^2 per row, float32 [n]."""
    difference = w - q.dequantize().float()
    return ((difference @ h) * difference).sum(-1)


class Candidate(NamedTuple):
    """One way to quantize a layer, and what it costs: ||WX - QX||^2 per row, float32 [n]."""

    q: QTensor
    loss: Tensor


def better(a: Candidate, b: Candidate) -> Candidate:
    """Row by row, whichever of `a` and `b` costs less; as a whole where all rows share one scale."""
    if a.q.scheme.granularity == "tensor":
        return a if a.loss.sum() <= b.loss.sum() else b
    keep = (a.loss <= b.loss)[:, None]
    parts = {}
    for name, part in a.q.parts().items():
        dtype = torch.promote_types(part.dtype, b.q.parts()[name].dtype)
        parts[name] = torch.where(keep, part.to(dtype), b.q.parts()[name].to(dtype))
    return Candidate(a.q.with_parts(**parts), torch.minimum(a.loss, b.loss))
