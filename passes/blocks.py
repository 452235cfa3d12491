"""Rounding over blocks of the flattened weight, as bitsandbytes cuts them: what nf4, fp4 and dynamic8 share."""

import abc
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompiler.codebooks import BLOCKS
from qcompiler.errors import RecipeError
from qcompiler.passes.rtn import quantize_each
from qcompiler.passes.selection import BODY, select, weight_name
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.scheme import QTensor


@dataclass(frozen=True)
class Blockwise(Pass):
    """Round weights to the values of a codebook over blocks scaled by their largest magnitude; needs no data.

    `block` is 32 to 4096 values of the flattened weight; where it does not divide the rows, blocks cross them, and few
    backends take the result.
    """

    contract: ClassVar[Contract] = Contract.LOSSY

    block: int = 64
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()
    min_coverage: float = 1.0

    @abc.abstractmethod
    def quantized(self, weight: Tensor) -> QTensor:
        """What becomes of one weight [n, k]."""

    def run(self, program: Program, ctx: Context) -> None:
        if self.block not in BLOCKS:
            raise RecipeError(f"{self.name}: block is {self.block}; it must be one of {', '.join(map(str, BLOCKS))}")
        names = dict.fromkeys(weight_name(node) for node in select(program, self.include, self.exclude, ctx))
        quantize_each(program, ctx, names, lambda _, weight: self.quantized(weight), self.name, self.min_coverage)
