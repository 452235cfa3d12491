"""SmoothQuant: activations and weights share the difficulty of rounding (Xiao et al., arXiv 2211.10438).

A few channels of an activation are far larger than the others, and one grid for all of them wastes its codes. Dividing
each channel by a factor, and multiplying the weights that read it, evens them out; the function stays the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.errors import No, RecipeError
from qcompiler.passes.selection import BODY, select, weight_name
from qcompiler.passes.smoothing import STUCK, Product, Reading, measured, products, sites_read, unreached
from qcompiler.passes.statistics import AbsMax
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divide the channels that linear layers read by s = max|x| ^ alpha / max|w| ^ (1 - alpha) (equation 4).

    The larger `alpha`, the more of the activation's range moves into the weights: the paper takes 0.5, and 0.75 where
    the loud channels are loudest; 0 scales nothing. max|w| is over all layers that read the channel. The paper smooths
    what norms make; here every site is smoothed whose factors something takes up: the values that an output projection
    reads and the hidden channels of an MLP, too. Where nothing takes them up (a norm that a residual reads as well, an
    activation function) and one channel is more than `explicit` times as loud as the median one, the value is
    multiplied at run time (0: never). A channel that is always 0, or that nothing reads, stays. Nothing is rounded
    here: `activations` and `rtn` or `gptq` do that next.
    """

    name: ClassVar[str] = "smoothquant"
    contract: ClassVar[Contract] = Contract.EXACT

    alpha: float = 0.5
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()
    explicit: float = 0.0

    @property
    def uses_data(self) -> bool:
        return self.alpha > 0

    def plan(self) -> Pass:
        return replace(self, alpha=0.0)

    def run(self, program: Program, ctx: Context) -> None:
        """Measure the largest magnitude of every channel that is read, then scale site by site."""
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is the activation's share of the range, from 0 to 1, not {self.alpha:g}")
        layers = select(program, self.include, self.exclude, ctx)
        sites = sites_read(program, layers)
        stuck = unreached(layers, sites)
        extra = products(program, stuck) if self.explicit else {}
        taken = {node for several in extra.values() for product in several for node in product.layers}
        for node in [n for n in stuck if n not in taken]:
            ctx.refuse(No(STUCK, weight_name(node)))
        found: dict[fx.Node, Sequence[Reading | Product]] = {**sites, **extra}
        if not self.alpha:
            return
        for reading, largest in measured(program, found, AbsMax(), ctx):
            if isinstance(reading, Product) and not self._is_loud(largest):
                for node in reading.layers:
                    ctx.refuse(No(f"{STUCK}, and none is loud enough to multiply at run time", weight_name(node)))
                continue
            reading.scale(program, 1 / self._factors(program, reading, largest))

    def _is_loud(self, largest: Tensor) -> bool:
        """Whether one channel stands out; `largest` are the magnitudes of all."""
        return bool(largest.max() > self.explicit * largest.median())

    def _factors(self, program: Program, reading: Reading | Product, largest: Tensor) -> Tensor:
        """What to divide the channels by, [blocks, channels]; `largest` [k] are those of the first layer's input."""
        activations, weights = largest[reading.places].amax(1), reading.column_ranges(program)
        alive = (activations > 0) & (weights > 0)
        return torch.where(alive, activations**self.alpha / weights ** (1 - self.alpha), 1.0)
