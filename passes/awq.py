"""AWQ: activation-aware weight quantization (Lin et al., arXiv 2306.00978).

A few channels matter more than others, and they are those with large activations. Multiplying their weights before
rounding, and dividing what makes them, makes their rounding errors smaller; the function stays the same.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.passes.selection import BODY, select
from qcompiler.passes.smoothing import Reading, measured, readings
from qcompiler.passes.statistics import Hessian
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme


@dataclass(frozen=True)
class Awq(Pass):
    """Scale the channels that linear layers read, so that rounding their weights to `scheme` costs less.

    For each symmetry site the factors are s = (root mean square of the activation) ^ alpha (section 3.2), alpha from 0
    to 1 in `steps` steps (0: no scaling), whichever gives the smallest output error of all layers that read the
    value. Where the paper takes mean magnitudes and runs the layers, this takes the Hessian x x', which gives both
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
        found = readings(program, select(program, self.include, self.exclude, ctx), ctx)
        if self.steps:
            for reading, hessian in measured(program, found, Hessian(), ctx):
                reading.site.scale(program, 1 / self._factors(program, reading, hessian))

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
