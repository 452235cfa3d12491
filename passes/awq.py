"""AWQ: activation-aware weight quantization (Lin et al., arXiv 2306.00978).

A few channels matter more than others, and they are those with large activations. Multiplying their weights before
rounding, and dividing what makes them, makes their rounding errors smaller; the function stays the same (`awq`). Then
the largest weights of each group are clipped where that makes the group's codes finer by more than it costs
(`awq_clip`). `rtn` rounds afterwards, with the same scheme.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.calibration import Needs
from qcompiler.errors import No, PassError, RecipeError
from qcompiler.passes.selection import BODY, select, weight_name
from qcompiler.passes.smoothing import Reading, measured, readings
from qcompiler.passes.statistics import Hessian
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme, by_group


@dataclass(frozen=True)
class Awq(Pass):
    """Scale the channels that linear layers read, so that rounding their weights to `scheme` costs less.

    For each symmetry site the factors are s = (root mean square of the activation) ^ alpha (section 3.2), alpha from 0
    to 1 in `steps` steps (0: no scaling), whichever gives the smallest output error of all layers that read the
    value. Where the paper takes mean magnitudes and runs the layers, this takes the Hessian x x', which gives both
    the magnitudes and the exact squared error. The weights are not rounded here: awq_clip and rtn, or gptq, do that
    next, with the same scheme.
    """

    name: ClassVar[str] = "awq"
    contract: ClassVar[Contract] = Contract.EXACT

    scheme: Scheme = Scheme.parse("int4:g128")
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()
    steps: int = 20

    @property
    def uses_data(self) -> bool:
        return self.steps > 0

    def plan(self) -> Pass:
        return replace(self, steps=0)

    def run(self, program: Program, ctx: Context) -> None:
        found = readings(program, select(program, self.include, self.exclude, ctx), ctx)
        if self.steps:
            for reading, hessian in measured(program, found, Hessian(), ctx):
                reading.scale(program, 1 / self._factors(program, reading, hessian))

    def _factors(self, program: Program, reading: Reading, hessian: Tensor) -> Tensor:
        """By how much to multiply the readers' columns, [blocks, channels]: the best of the grid."""
        places, weights = reading.places, reading.weights(program, reading.alike)
        magnitude = hessian.diagonal()[places].mean(1).sqrt().clamp(min=1e-8)
        best, least = torch.ones_like(magnitude), torch.inf
        for step in range(self.steps + 1):
            factors = magnitude ** (step / self.steps)
            factors = (factors / (factors.max() * factors.min()).sqrt()).clamp(1e-4, 1e4)
            columns = torch.ones(hessian.shape[0])
            columns[places] = factors[:, None].expand(places.shape)
            error = sum(_rounding_error(w, columns, hessian, self.scheme) for w in weights)
            if error < least:
                best, least = factors, error
        return best


def _rounding_error(weight: Tensor, columns: Tensor, hessian: Tensor, scheme: Scheme) -> float:
    """||WX - Q(W s) / s X||^2, a mean over tokens."""
    difference = QTensor.quantize(weight * columns, scheme).dequantize().float() / columns - weight
    return float(((difference @ hessian) * difference).sum())


@dataclass(frozen=True)
class AwqClip(Pass):
    """Clip the weights of each row and group to the range whose rounding gives the smallest output error.

    Ranges from the whole one down to `lowest` of it are tried in `steps` steps, as the paper's code does (its section
    3.2 names the search only). The error is the squared one of what the group alone adds to the output, a mean over
    tokens. That code leaves queries and keys out, for what their product would amplify; here they are clipped too.
    """

    name: ClassVar[str] = "awq_clip"
    contract: ClassVar[Contract] = Contract.LOSSY

    scheme: Scheme = Scheme.parse("int4:g128")
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()
    lowest: float = 0.5
    steps: int = 10

    @property
    def uses_data(self) -> bool:
        return self.steps > 0

    def plan(self) -> Pass:
        return replace(self, steps=0)

    def run(self, program: Program, ctx: Context) -> None:
        if self.scheme.granularity not in ("group", "channel"):
            raise RecipeError(f'scheme "{self.scheme}": ranges are clipped by row; write channel or a group size')
        chosen = {node: weight_name(node) for node in select(program, self.include, self.exclude, ctx)}
        if not self.steps:
            return
        if not ctx.samples:
            raise PassError("it needs calibration data; give calibration=..., or leave it out of the recipe")

        def needs(nodes: Sequence[fx.Node]) -> Needs:
            return {node.name: Hessian() for node in nodes if node in chosen}

        done: set[str] = set()
        for segment in ctx.sweep(program, needs):
            for node in [n for n in segment.nodes if n.name in segment.statistics and chosen[n] not in done]:
                ctx.node = node
                hessian = segment.statistics[node.name]
                if hessian is None:
                    ctx.refuse(No("no calibration token reached it", chosen[node]))
                    continue
                weight = program.tensors[chosen[node]]
                program.tensors[chosen[node]] = clipped(weight, hessian, self.scheme, self.lowest, self.steps)
                done.add(chosen[node])


def clipped(weight: Tensor, hessian: Tensor, scheme: Scheme, lowest: float, steps: int) -> Tensor:
    """weight [n, k] clipped by row and group, given the mean of x x' of its inputs, `hessian` [k, k]."""
    size = scheme.group_of(weight.shape[1])
    groups = by_group(weight.float(), size).transpose(0, 1)  # [groups, n, size]
    missing = -weight.shape[1] % size
    square = torch.nn.functional.pad(hessian.float(), (0, missing, 0, missing))
    blocks = square.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    best, least = groups, torch.full_like(low, torch.inf)
    for step in range(steps + 1):
        share = 1 - (1 - lowest) * step / steps
        candidate = groups.clamp(low * share, high * share)
        rounded = QTensor.quantize(candidate.flatten(0, 1), replace(scheme, granularity="channel", group_size=0))
        difference = rounded.dequantize().view_as(groups) - groups
        error = ((difference @ blocks) * difference).sum(-1, keepdim=True)
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    return best.transpose(0, 1).flatten(1)[:, : weight.shape[1]].to(weight.dtype)
