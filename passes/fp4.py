"""FP4: weights as 4-bit floats (sign, two bits of exponent, one of fraction), block by block, as in bitsandbytes."""

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.nf4 import Nf4


@dataclass(frozen=True)
class Fp4(Nf4):
    """As nf4, with the values of bitsandbytes' 4-bit floats: 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3 and 1, and negatives."""

    name: ClassVar[str] = "fp4"
