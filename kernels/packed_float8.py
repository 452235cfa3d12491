"""PackedFloat8: a quantized weight in the layout of the kernel that multiplies floats of 8 bits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qcompiler.kernels.packed_integers import WIDTH, filled, tiled
from qcompiler.kernels.packed_weight import ROWS
from qcompiler.rounding import E4M3, activation_scheme, run_length
from qcompiler.scheme import QTensor, Scheme

LEAST = 2.0**-9  # the smallest number of e4m3: a code of 4 bits, alone in the low bits of a byte, is so many of it


@dataclass(frozen=True, eq=False)
class PackedFloat8:
    """A weight [n, k] of floats of 8 bits, or of integers of 4, for activations in fp8 with a scale for each token.

    - `words`: [tiles of n, products, rows, width]; float8_e4m3fn, or int8, a byte with the code of column i of the
      product's first half in its low bits, and of its second half in its high ones, and `width` half the columns
    - `factors`: float32 [runs, n, filled up]: the weight's scale, of 4 bits over LEAST
    - `zeros`: float32 [runs, n, filled up]: of 4 bits the zero points, times LEAST
    """

    scheme: Scheme
    activation: str
    shape: tuple[int, int]
    run: int
    words: Tensor
    factors: Tensor
    arrived: Tensor
    zeros: Tensor | None = None

    @classmethod
    def pack(cls, weight: QTensor, activation: str, grid: Sequence[Tensor] = ()) -> "PackedFloat8":
        """Pack a weight that `linear_float8` takes; the grid of an activation in fp8 is always its tokens' own."""
        n, k = weight.shape
        assert isinstance(weight.scale, Tensor)
        bits = weight.scheme.bits
        run = run_length(weight.scheme, activation_scheme(activation), k)
        words = tiled(weight.unpacked().short(), bits, run if run < k else WIDTH)
        groups = weight.scheme.groups(k)
        reach = words.shape[1] * (8 // bits) if run < k else 1  # runs that the tiles extend over
        scale, zeros = weight.scale.float().expand(n, groups), None
        if bits == 4:
            middle = weight.scheme.levels >> 1 if weight.zero is None else weight.zero.float()
            zeros = filled(torch.ones_like(scale) * middle * LEAST, reach)
        return cls(
            scheme=weight.scheme,
            activation=activation,
            shape=(n, k),
            run=run,
            words=words if bits == 4 else words.view(E4M3),
            factors=filled(scale / LEAST if bits == 4 else scale, reach),
            arrived=torch.zeros(-(-n // ROWS), dtype=torch.int32, device=words.device),
            zeros=zeros,
        )

    def unpack(self) -> Tensor:
        """The weight's codes, uint8 [n, k], exactly as they were packed."""
        n, k = self.shape
        words = self.words.view(torch.uint8)
        parts = [words & 15, words >> 4] if self.scheme.bits == 4 else [words]
        whole = torch.cat(parts, dim=-1).permute(0, 2, 1, 3)
        return whole.flatten(2).flatten(0, 1)[:n, :k].contiguous()

    def to(self, device: torch.device | str) -> "PackedFloat8":
        """The same on another device."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **moved)

    @property
    def counted(self) -> int:
        """Of how many columns the sums of an activation's codes are needed: a run with zero points; 0 is none."""
        return 0 if self.zeros is None else self.run

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        parts = (self.words, self.factors, self.zeros)
        return sum(part.nbytes for part in parts if part is not None)
