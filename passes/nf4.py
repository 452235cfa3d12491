"""NF4: weights as quantiles of a normal distribution, block by block (QLoRA, arXiv 2305.14314)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompiler.codebooks import quantize_blocks
from qcompiler.passes.blocks import Blockwise
from qcompiler.scheme import QTensor


@dataclass(frozen=True)
class Nf4(Blockwise):
    """Round weights to the nearest of 16 values over blocks scaled by their largest magnitude; needs no data.

    `block` is 32 to 4096 values of the flattened weight, as in bitsandbytes; where it does not divide the rows, blocks
    cross them, and few backends take the result. `double` quantizes the blocks' scales to 8 bits too: 4.13 bits a
    weight instead of 4.5 with blocks of 64.
    """

    name: ClassVar[str] = "nf4"

    double: bool = False

    def quantized(self, weight: Tensor) -> QTensor:
        return quantize_blocks(weight, self.name, self.block, self.double)
