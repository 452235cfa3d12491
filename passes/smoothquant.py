"""SmoothQuant: activations and weights share the difficulty of rounding (Xiao et al., arXiv 2211.10438).

A few channels of an activation are far larger than the others, and one grid for all of them wastes its codes. Dividing
each channel by a factor, and multiplying the weights that read it, evens them out; the function stays the same.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.errors import RecipeError
from qcompiler.passes.selection import BODY, select
from qcompiler.passes.smoothing import Reading, measured, readings
from qcompiler.passes.statistics import AbsMax
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divide the channels that linear layers read by s = max|x| ^ alpha / max|w| ^ (1 - alpha) (equation 4).

    The larger `alpha`, the more of the activation's range moves into the weights: the paper takes 0.5, and 0.75 where
    the loud channels are loudest; 0 scales nothing. max|w| is over all layers that read the channel. The paper smooths
    what norms make; here every site is smoothed whose factors something takes up: the values that an output projection
    reads and the hidden channels of an MLP, too. A channel that is always 0, or that nothing reads, stays. Nothing is
    rounded here: `activations` and `rtn` or `gptq` do that next.
    """

    name: ClassVar[str] = "smoothquant"
    contract: ClassVar[Contract] = Contract.EXACT

    alpha: float = 0.5
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()

    @property
    def uses_data(self) -> bool:
        return self.alpha > 0

    def plan(self) -> Pass:
        return replace(self, alpha=0.0)

    def run(self, program: Program, ctx: Context) -> None:
        """Measure the largest magnitude of every channel that is read, then scale site by site."""
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is the activation's share of the range, from 0 to 1, not {self.alpha:g}")
        found = readings(program, select(program, self.include, self.exclude, ctx), ctx)
        if self.alpha:
            for reading, largest in measured(program, found, AbsMax(), ctx):
                reading.site.scale(program, 1 / self._factors(program, reading, largest))

    def _factors(self, program: Program, reading: Reading, largest: Tensor) -> Tensor:
        """What to divide the channels by, [blocks, channels]; `largest` [k] are those of the first layer's input."""
        activations, weights = largest[reading.places].amax(1), reading.column_ranges(program)
        alive = (activations > 0) & (weights > 0)
        return torch.where(alive, activations**self.alpha / weights ** (1 - self.alpha), 1.0)
