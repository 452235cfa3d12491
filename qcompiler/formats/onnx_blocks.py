"""Quantized matrices in ONNX graphs: what MatMulNBits, GatherBlockQuantized and DequantizeLinear read, as records.

| operator | codes | scales | zero points |
|---|---|---|---|
| MatMulNBits | uint8 [n, blocks, block * bits / 8] | [n, blocks] | uint8 [n, ceil(blocks * bits / 8)] |
| GatherBlockQuantized | uint8 [n, k * bits / 8] | [n, k / block] | likewise |
| DequantizeLinear | (u)int8 or (u)int4 [n, k] or [k, n] | of blocks, of one axis, or one | of the codes' type |

Where there are none, zero is the middle code, but in DequantizeLinear the number 0. Sources: ONNX Runtime's contrib
operators, ONNX operator sets 10 to 25.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.bits import pack_bits, unpack_bits
from qcompiler.errors import No
from qcompiler.scheme import QTensor, Scheme

CONTRIB = "com.microsoft"
FLOATS = (1, 10)  # float32, float16
# The element types of codes: bits, and whether they have a sign.
CODES = {2: (8, False), 3: (8, True), 21: (4, False), 22: (4, True), 25: (2, False), 26: (2, True)}
Get = Callable[[str], Tensor]


@dataclass(frozen=True)
class Packed:
    """Where a node keeps a matrix of `shape` [rows, columns]: its initializers by name ("" for none), and their layout.

    Groups of `block` codes run along the rows; `turned` matrices are stored [columns, rows]. Codes in a type of their
    own are `plain`, others packed into bytes; codes with a sign are stored less their middle.
    """

    op: str
    codes: str
    scale: str
    zero: str
    shape: tuple[int, int]
    bits: int
    block: int
    plain: bool = False
    signed: bool = False
    turned: bool = False

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return -(-self.shape[1] // self.block)

    def record(self, get: Get) -> QTensor:
        """The matrix; `get` gives the initializers' values, codes of 4 bits and fewer as int8 or uint8."""
        scale = self._by_row(get(self.scale))
        zero = self._zeros(get)
        middle = zero is None or bool((zero == 1 << (self.bits - 1)).all())
        kind = f"int{self.bits}:{'channel' if self.groups == 1 else f'g{self.block}'}:{'sym' if middle else 'asym'}"
        scale = scale if scale.dtype == torch.float16 else scale.float()
        zero = None if middle else zero
        return QTensor(Scheme.parse(kind), self.shape, self._stream(get(self.codes)), scale, zero, dtype=scale.dtype)

    def _stream(self, codes: Tensor) -> Tensor:
        """One bit stream a row, uint8 [rows, bytes]."""
        rows, columns = self.shape
        if self.plain:
            return pack_bits(self._unsigned(codes.T if self.turned else codes), self.bits)
        whole = codes.reshape(rows, -1)
        if whole.shape[1] * 8 == columns * self.bits:
            return whole
        return pack_bits(unpack_bits(whole, self.bits, columns), self.bits)

    def _zeros(self, get: Get) -> Tensor | None:
        """The zero points, uint8 [rows, groups]; None where they are the middle code."""
        if not self.plain:
            stored = get(self.zero).reshape(self.shape[0], -1) if self.zero else None
            return None if stored is None else unpack_bits(stored, self.bits, self.groups)
        if self.zero:
            return self._unsigned(self._by_row(get(self.zero)))
        return None if self.signed else torch.zeros(self.shape[0], self.groups, dtype=torch.uint8)

    def _unsigned(self, values: Tensor) -> Tensor:
        return (values.to(torch.int16) + ((1 << self.bits >> 1) if self.signed else 0)).to(torch.uint8).contiguous()

    def _by_row(self, values: Tensor) -> Tensor:
        """Values of groups as [rows, groups], whatever shape they are stored in."""
        rows = self.shape[0]
        if self.turned and values.dim() == 2:
            values = values.T
        return values.reshape(-1, self.groups if values.numel() > 1 else 1).expand(rows, self.groups).contiguous()

    def initializers(self, record: QTensor) -> Mapping[str, Tensor] | No:
        """The values to store for another record of the same layout; only for codes packed into bytes."""
        group = self.shape[1] if self.groups == 1 else self.block
        zero = record.zero
        if (record.shape, record.scheme.bits, record.scheme.group_of(self.shape[1])) != (self.shape, self.bits, group):
            return No(f"it is {record.scheme} {list(record.shape)}, not {self.bits} bits in groups of {group}")
        if record.permutation is not None or record.minimum is not None or record.codebook is not None or self.plain:
            return No("it is not made of scales and zero points alone")
        if (zero is not None and not self.zero) or not isinstance(record.scale, Tensor):
            return No("its zero points or scales are stored otherwise")
        if zero is None:
            zero = torch.full((1, 1), 1 << (self.bits - 1), dtype=torch.uint8)
        missing = self.groups * self.block - self.shape[1] if self.op == "MatMulNBits" else 0
        codes = torch.nn.functional.pad(record.unpacked(), (0, missing))
        found = {
            self.codes: pack_bits(codes, self.bits),
            self.scale: record.scale.expand(self.shape[0], self.groups).contiguous(),
        }
        if self.zero:
            found[self.zero] = pack_bits(zero.expand(self.shape[0], self.groups).contiguous(), self.bits)
        return found


def packed_of(node: Any, initializers: Mapping[str, Any]) -> Packed | No:
    """How a node's matrix is stored, given the TensorProtos of the model; No for what is no record of integers."""
    reader = _READERS.get((node.domain, node.op_type))
    if reader is None:
        return No("no equivalent")
    given = {a.name: a.i for a in node.attribute}  # all that matter are integers
    inputs = [*node.input, *([""] * 6)]
    return reader(inputs, given, initializers)


def _nbits(inputs: list[str], given: Mapping[str, int], protos: Mapping[str, Any]) -> Packed | No:
    codes, scale, zero = inputs[1:4]
    n, k, bits, block = (given.get(key, 4 if key == "bits" else 0) for key in ("N", "K", "bits", "block_size"))
    if inputs[4]:
        return No("it reorders its channels (g_idx)")
    if bits not in (2, 4, 8) or n < 1 or k < 1 or block < 16:
        return No(f"its attributes are N {n}, K {k}, bits {bits}, block_size {block}")
    found = Packed("MatMulNBits", codes, scale, zero, (n, k), bits, block)
    groups = found.groups
    sizes = {codes: n * groups * block * bits // 8, scale: n * groups, zero: n * -(-groups * bits // 8)}
    return _checked(found, protos, sizes)


def _gathered(inputs: list[str], given: Mapping[str, int], protos: Mapping[str, Any]) -> Packed | No:
    codes, _, scale, zero = inputs[:4]
    bits, block = given.get("bits", 4), given.get("block_size", 128)
    shape = list(protos[codes].dims) if codes in protos else []
    axes = given.get("quantize_axis", 1), given.get("gather_axis", 0)
    if len(shape) != 2 or axes[0] not in (-1, 1) or axes[1] != 0:
        return No("it is not a lookup of rows in a matrix with blocks along them")
    if bits not in (2, 4, 8) or block < 16 or min(shape) < 1:
        return No(f"its attributes are bits {bits}, block_size {block}")
    found = Packed("GatherBlockQuantized", codes, scale, zero, (shape[0], shape[1] * 8 // bits), bits, block)
    sizes = {codes: shape[0] * shape[1], scale: shape[0] * found.groups, zero: shape[0] * -(-found.groups * bits // 8)}
    return _checked(found, protos, sizes)


def _checked(found: Packed, protos: Mapping[str, Any], sizes: Mapping[str, int]) -> Packed | No:
    """Whether the initializers of bytes are there, in the right types and sizes."""
    for name, kinds in ((found.codes, (2,)), (found.scale, FLOATS), (found.zero, (2,))):
        if not name:
            continue
        if name not in protos:
            return No(f'"{name}" is no stored tensor')
        held = int(np.prod(list(protos[name].dims), dtype=object))
        if protos[name].data_type not in kinds or held != sizes[name]:
            return No(f'"{name}" has type {protos[name].data_type} and {held} values, not {kinds} and {sizes[name]}')
    return found


def _dequantized(inputs: list[str], given: Mapping[str, int], protos: Mapping[str, Any]) -> Packed | No:
    codes, scale, zero = inputs[:3]
    if codes not in protos or scale not in protos or (zero and zero not in protos):
        return No("it decodes what was computed")
    shape, kind = list(protos[codes].dims), protos[codes].data_type
    if len(shape) != 2 or min(shape) < 1 or kind not in CODES or protos[scale].data_type not in FLOATS:
        return No("it is not a matrix of integers with float scales")
    if zero and (protos[zero].data_type != kind or list(protos[zero].dims) != list(protos[scale].dims)):
        return No("its zero points are not like its codes and scales")
    bits, signed = CODES[kind]
    axis, block = given.get("axis", 1) % 2, given.get("block_size", 0)
    steps = list(protos[scale].dims)
    if block:
        turned = axis == 0
        rows, columns = shape[::-1] if turned else shape
        groups = -(-columns // block)
        right = steps == ([groups, rows] if turned else [rows, groups])
    else:  # one scale for each row of the record, or one for all
        turned = axis == 1
        rows, columns = shape[::-1] if turned else shape
        block, right = columns, steps == [rows] or int(np.prod(steps)) == 1
    if not right:
        return No(f"its scales {steps} do not fit its codes {shape}")
    return Packed("DequantizeLinear", codes, scale, zero, (rows, columns), bits, block, True, signed, turned)


_READERS: dict[tuple[str, str], Callable[[list[str], Mapping[str, int], Mapping[str, Any]], Packed | No]] = {
    (CONTRIB, "MatMulNBits"): _nbits,
    (CONTRIB, "GatherBlockQuantized"): _gathered,
    ("", "DequantizeLinear"): _dequantized,
    ("ai.onnx", "DequantizeLinear"): _dequantized,
}


def in_floats(model: Any) -> None:
    """Let MatMulNBits compute in floats, as it is defined: an accuracy_level allows it to round activations."""
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        if node.op_type == "MatMulNBits" and len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
