"""Block-wise 8 bits: weights in the dynamic map of bitsandbytes (Dettmers et al., arXiv 2110.02861)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompiler.codebooks import quantize_dynamic
from qcompiler.passes.blocks import Blockwise
from qcompiler.scheme import QTensor


@dataclass(frozen=True)
class Dynamic8(Blockwise):
    """Round weights to the 256 values of the dynamic map, block by block, as `quantize_blockwise` does; needs no data.

    The map's steps grow with the magnitude, from 5.5e-7 to 0.014 of the block's largest: a block with an outlier keeps
    its small values, where even steps would lose them.
    """

    name: ClassVar[str] = "dynamic8"

    def quantized(self, weight: Tensor) -> QTensor:
        return quantize_dynamic(weight, self.block)
