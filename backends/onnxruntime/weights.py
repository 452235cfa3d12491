"""Quantized weights as ONNX Runtime's block-wise operators take them: codes moved, never rounded again."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qcompiler.backends.onnxruntime.graph import Stored
from qcompiler.bits import pack_bits
from qcompiler.errors import No
from qcompiler.scheme import QTensor
from qcompiler.target import Accept, Answer, Kernel, without

BLOCKS = (256, 128, 64, 32, 16)
WIDTHS = (2, 4, 8)


def block_size(weight: QTensor) -> int:
    """The fastest block that no group boundary cuts, or the group size itself where that is hardly slower.

    A group of several blocks is written with its scale repeated. 0 if there is no such block.
    """
    columns = weight.columns
    if weight.boundaries is not None:
        edges = [int(edge) for edge in weight.boundaries[1:-1]]
    elif weight.scheme.granularity == "group":
        size = weight.scheme.group_size
        edges = list(range(size, columns, size))
    else:
        edges = []
    whole = [block for block in BLOCKS if all(edge % block == 0 for edge in edges)]
    costs = block_costs(carried(weight), columns)
    best = min(whole, key=costs.__getitem__, default=0)
    own = weight.scheme.group_size if weight.scheme.granularity == "group" else 0
    return own if own in whole and costs[own] <= 1.2 * costs[best] else best


def block_costs(bits: int, columns: int) -> dict[int, float]:
    """Nanoseconds a thousand weights by block size, in rows of about so many columns: see benchmarks/blocks.py."""
    by_columns = measured()[str(bits)]
    nearest = min(by_columns, key=lambda known: abs(math.log(int(known) / columns)))
    return {int(block): cost for block, cost in by_columns[nearest].items()}


@functools.cache
def measured() -> dict[str, dict[str, dict[str, float]]]:
    """Nanoseconds a thousand weights, by bits, columns and block size."""
    found: dict[str, dict[str, dict[str, float]]] = json.loads(Path(__file__).with_name("blocks.json").read_text())
    return found


def carried(weight: QTensor) -> int:
    """The width in which codes are carried: the next that ONNX Runtime has."""
    return next(width for width in WIDTHS if width >= weight.scheme.bits)


def integers(weight: QTensor) -> Answer:
    """Whether the values are scale * (code - zero), or scale * code + minimum, along the last axis."""
    if weight.codebook is not None:
        return No("its codes stand for the entries of a codebook")
    if weight.scheme.code != "int":
        return No(f"codes of type {weight.scheme.code}")
    if len(weight.shape) != 2 or weight.axis not in (-1, 1):
        return No("it is not a matrix with groups along its rows")
    return True


def blocks(weight: QTensor) -> Answer:
    """Whether the groups are whole blocks."""
    return block_size(weight) > 0 or No(
        f"groups of {weight.scheme.group_size} are not whole blocks of {' or '.join(map(str, reversed(BLOCKS)))}"
    )


BLOCKWISE = Accept("integers & groups of whole blocks", lambda w: blocks(w) if integers(w) else integers(w))
UNORDERED = without("permutation")
ONE_GRID = Accept(
    "8-bit integers with one scale",
    lambda w: (w.scheme.bits == 8 and w.scheme.granularity == "tensor") or No(f"{w.scheme} has several scales"),
)
MATMUL = Kernel("MatMulNBits", "qc.linear", BLOCKWISE & without("minimum"))
MATMUL_MINIMA = Kernel("MatMulNBits + block sums", "qc.linear", BLOCKWISE)
GATHER_CODES = Kernel(
    "Gather and DequantizeLinear", "qc.embedding", BLOCKWISE & ONE_GRID & UNORDERED & without("minimum")
)
GATHER = Kernel("GatherBlockQuantized", "qc.embedding", BLOCKWISE & UNORDERED & without("minimum"))
GATHER_MINIMA = Kernel("GatherBlockQuantized + minima", "qc.embedding", BLOCKWISE & UNORDERED)
FLOAT_MATMUL = Kernel("MatMul (dequantized when written)", "qc.linear", Accept("anything", lambda w: True))
FLOAT_GATHER = Kernel("Gather (dequantized when written)", "qc.embedding", Accept("anything", lambda w: True))
KERNELS = (MATMUL, MATMUL_MINIMA, FLOAT_MATMUL, GATHER_CODES, GATHER, GATHER_MINIMA, FLOAT_GATHER)


def signed(weight: QTensor) -> bool | No:
    """Whether DequantizeLinear stands for a weight of 8 bits with one scale a row."""
    whole = weight.scheme.granularity in ("channel", "tensor") and weight.zero is None and weight.minimum is None
    plain = weight.scheme.bits == 8 and weight.scheme.code == "int" and isinstance(weight.scale, Tensor)
    return (whole and plain) or No(f"weights of int8:channel:sym, not {weight.scheme}")


def row_scales(weight: QTensor) -> Tensor:
    """The scale of each row, float32 [rows]."""
    assert isinstance(weight.scale, Tensor)
    return weight.scale.float().expand(weight.rows, 1).flatten().contiguous()


def int8_codes(weight: QTensor) -> Tensor:
    """The codes as signed numbers, int8 [rows, columns]."""
    return (weight.unpacked().to(torch.int16) - 128).to(torch.int8)


@dataclass(frozen=True)
class Blockwise:
    """A quantized matrix cut into blocks: what is written, and how it is to be read.

    `bits` is the width the codes are carried in (the next of 2, 4, 8), `block` the block size, `count` the blocks
    in a row; the last may reach beyond the row, where its codes stand for zero.
    """

    name: str
    weight: QTensor
    bits: int
    block: int

    @classmethod
    def of(cls, name: str, weight: QTensor) -> "Blockwise":
        """Cut `weight`, called `name`; a kernel that accepts it must have been found."""
        return cls(name, weight, carried(weight), block_size(weight))

    @property
    def count(self) -> int:
        """Blocks in a row."""
        return -(-self.weight.columns // self.block)

    @property
    def key(self) -> str:
        """What tells the written bytes apart from those of other tensors."""
        return f"{self.name}:{self.bits}:{self.block}"

    def codes(self, *shape: int) -> Stored:
        """The codes, uint8, in the given shape of rows * count * (block * bits / 8) bytes."""
        return Stored(shape, torch.uint8, lambda: self._codes().view(shape), f"{self.key}:codes")

    @property
    def blob(self) -> int:
        """Bytes of one block's codes."""
        return self.block * self.bits // 8

    def scales(self) -> Stored:
        """float32 [rows, count]."""
        shape = (self.weight.rows, self.count)
        return Stored(shape, torch.float32, lambda: self.by_block(self._scale()), f"{self.key}:scales")

    def zeros(self) -> Stored | None:
        """Zero points, packed like the codes: uint8 [rows, ceil(count * bits / 8)]; None if all are the middle."""
        if self.weight.zero is None:
            return None
        zero = self.weight.zero
        shape = (self.weight.rows, -(-self.count * self.bits // 8))
        return Stored(shape, torch.uint8, lambda: pack_bits(self.by_block(zero), self.bits), f"{self.key}:zeros")

    def corrections(self, transposed: bool) -> Stored:
        """What the middle code stands for in each group, float32 [groups, rows] if transposed, else by block.

        With minima the values are scale * (code - middle) + (minimum + middle * scale): the first term is what
        the operators compute without zero points, the second is added; no minimum is ever rounded.
        """
        groups = self.weight.scheme.groups(self.weight.columns)
        rows = self.weight.rows
        if transposed:
            make: Callable[[], Tensor] = lambda: self._middle().expand(rows, groups).t()  # noqa: E731
            return Stored((groups, rows), torch.float32, make, f"{self.key}:corrections.T")
        return Stored(
            (rows, self.count), torch.float32, lambda: self.by_block(self._middle()), f"{self.key}:corrections"
        )

    def _middle(self) -> Tensor:
        minimum = self.weight.minimum
        assert minimum is not None
        low = minimum.dequantize() if isinstance(minimum, QTensor) else minimum.float()
        return low + (self.weight.scheme.levels >> 1) * self._scale()

    def _scale(self) -> Tensor:
        scale = self.weight.scale
        return scale.dequantize() if isinstance(scale, QTensor) else scale.float()

    def by_block(self, values: Tensor) -> Tensor:
        """Values of groups [rows or 1, groups or 1] as values of blocks [rows, count]."""
        groups = self.weight.group_index()[:: self.block].clamp(max=values.shape[-1] - 1)
        return values.expand(self.weight.rows, -1)[:, groups].contiguous()

    def _codes(self) -> Tensor:
        weight, rows = self.weight, self.weight.rows
        filled = weight.columns == self.count * self.block
        if filled and self.bits == weight.scheme.bits:
            return weight.codes  # one bit stream a row, cut into whole bytes by the blocks
        codes = weight.unpacked()
        if weight.zero is None:
            # The operators take the middle code for zero: 4 of the 8 codes of 3 bits becomes 8 of 16.
            codes = codes + ((1 << self.bits >> 1) - (weight.scheme.levels >> 1))
        if not filled:
            ends = self.by_block(weight.zero)[:, -1:] if weight.zero is not None else None
            missing = (rows, self.count * self.block - weight.columns)
            zero = codes.new_full(missing, 1 << self.bits >> 1) if ends is None else ends.expand(missing)
            codes = torch.cat([codes, zero], dim=1)
        return pack_bits(codes.to(torch.uint8), self.bits)
