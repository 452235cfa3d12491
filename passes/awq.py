"""AWQ: activation-aware weight quantization (Lin et al., arXiv 2306.00978).

A few channels matter more than others, and they are those with large activations. Multiplying their weights before
rounding, and dividing what makes them, makes their rounding errors smaller; the function stays the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.calibration import Needs
from qcompiler.errors import No, PassError
from qcompiler.passes.selection import BODY, select, weight_name
from qcompiler.passes.statistics import Hessian
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme
from qcompiler.sites import Kind, Site, find


@dataclass(frozen=True)
class Awq(Pass):
    """Scale the channels that linear layers read, so that rounding their weights to `scheme` costs less.

    For each symmetry site the factors are s = (root mean square of the activation) ^ alpha (section 3.2), alpha from 0
    to 1 in `steps` steps (0: no scaling), whichever gives the smallest output error of all layers that read the
    channels. Where the paper takes mean magnitudes and runs the layers, this takes the Hessian x x', which gives both
    the magnitudes and the exact squared error. The weights are not rounded here: rtn or gptq does that next, with the
    same scheme.
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
        if not ctx.samples and self.steps:
            raise PassError("it needs calibration data; give calibration=..., or leave awq out of the recipe")
        layers = {weight_name(node): node for node in select(program, self.include, self.exclude, ctx)}  # in order
        sites: dict[fx.Node, list[tuple[Site, list[int]]]] = {}
        reached: set[str] = set()
        for site in find(program, Kind.SCALE):
            readers = [i for i, use in enumerate(site.uses) if use.power < 0 and use.tensor in layers]
            if readers:
                names = [site.uses[i].tensor for i in readers]
                reached.update(names)
                sites.setdefault(layers[names[0]], []).append((site, readers))
        for name in layers:
            if name not in reached:
                ctx.refuse(No("no factor can pass to what makes its channels", name))

        if not self.steps:
            return

        def needs(nodes: Sequence[fx.Node]) -> Needs:
            return {node.name: Hessian() for node in nodes if node in sites}

        for segment in ctx.sweep(program, needs):
            for node in [n for n in segment.nodes if n in sites]:
                ctx.node = node
                hessian = segment.statistics[node.name]
                for site, readers in sites[node] if hessian is not None else ():
                    site.scale(program, 1 / self._factors(program, site, readers, hessian))

    def _factors(self, program: Program, site: Site, readers: Sequence[int], hessian: Tensor) -> Tensor:
        """By how much to multiply the readers' columns, [blocks, channels]: the best of the grid."""
        places = site.positions[readers[0]]
        magnitude = hessian.diagonal()[places].mean(1).sqrt().clamp(min=1e-8)
        weights = [program.tensors[site.uses[i].tensor].float() for i in readers]
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
