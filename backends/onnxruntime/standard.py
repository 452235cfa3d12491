"""Quantized weights in operators of the ONNX standard: DequantizeLinear over blocks, for runtimes without others.

ONNX Runtime makes MatMulNBits of them again; what is written is the same codes, scales and zero points.
"""

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.backends.onnxruntime.graph import Stored, typed
from qcompiler.backends.onnxruntime.lowering import Lowering
from qcompiler.backends.onnxruntime.weights import Blockwise, int8_codes, row_scales, signed
from qcompiler.bits import pack_bits
from qcompiler.program import Type
from qcompiler.scheme import QTensor

KINDS = {(4, True): ir.DataType.INT4, (4, False): ir.DataType.UINT4, (8, True): ir.DataType.INT8}
KINDS[8, False] = ir.DataType.UINT8


def decoded(low: Lowering, cut: Blockwise, transposed: bool) -> ir.Value:
    """The floats of a weight without minima, [columns, rows] if transposed, else [rows, columns]."""
    columns, rows, bits = cut.weight.columns, cut.weight.rows, max(cut.bits, 4)
    signs = cut.weight.zero is None

    def turn(values: Tensor) -> Tensor:
        return values.t() if transposed else values

    shape, groups = (columns, rows)[:: 1 if transposed else -1], (cut.count, rows)[:: 1 if transposed else -1]
    name, scales = f"{cut.name}::{'T' if transposed else 'rows'}", cut.scales()
    side = Stored(groups, torch.float32, lambda: turn(scales.make()).contiguous(), f"{name}:scales")
    given = [
        low.graph.store(name, _packed(lambda: turn(_codes(cut)), shape, bits, signs, f"{name}:{bits}")),
        low.graph.store(f"{name} scales", side),
    ]
    if cut.weight.zero is not None:
        zero = cut.weight.zero
        spread = lambda: turn(cut.by_block(zero))  # noqa: E731
        given.append(low.graph.store(f"{name} zeros", _packed(spread, groups, bits, False, f"{name}:zeros")))
    made = low.op("DequantizeLinear", *given, axis=0 if transposed else 1, block_size=cut.block)
    return typed(made, Type(shape, torch.float32))


def _codes(cut: Blockwise) -> Tensor:
    """The codes, uint8 [rows, columns], in the width they are carried in: zero, if it is not given, in the middle."""
    codes = cut.weight.unpacked()
    if cut.weight.zero is None:
        codes = codes + ((1 << max(cut.bits, 4) >> 1) - (cut.weight.scheme.levels >> 1))
    return codes


def _packed(make: Callable[[], Tensor], shape: tuple[int, ...], bits: int, signs: bool, key: str) -> Stored:
    """Codes as an ONNX tensor of 4 or 8 bits, two of 4 a byte."""

    def tensor() -> Tensor:
        flat = make().contiguous().view(1, -1)
        if signs:  # the middle code is zero
            flat = (flat.to(torch.int16) - (1 << bits >> 1)).bitwise_and((1 << bits) - 1).to(torch.uint8)
        return pack_bits(flat, bits).flatten()

    return Stored(shape, torch.uint8, tensor, key, KINDS[bits, signs])


def looked_up(low: Lowering, name: str, weight: QTensor, ids: ir.Value, cut: Blockwise) -> ir.Value:
    """Rows of a table: of 8-bit codes with one scale a row only those asked for are decoded."""
    if not signed(weight):
        return low.op("Gather", decoded(low, cut, transposed=False), ids, axis=0)
    scales = row_scales(weight)
    table = Stored((weight.rows, weight.columns), torch.int8, lambda: int8_codes(weight), f"{name}::int8")
    steps = Stored((weight.rows,), torch.float32, lambda: scales, f"{name}::rows")
    codes = low.op("Gather", low.graph.store(f"{name}::int8", table), ids, axis=0)
    scale = low.op("Gather", low.graph.store(f"{name}::row scales", steps), ids, axis=0)
    return low.op("Mul", low.op("Cast", codes, to=int(ir.DataType.FLOAT)), low.op("Unsqueeze", scale, [-1]))


def codes_looked_up(low: Lowering, name: str, weight: QTensor, ids: ir.Value) -> ir.Value:
    """Rows of a table of 8-bit codes with one scale: only those asked for are decoded."""
    shape = (weight.rows, weight.columns)
    table = Stored(shape, torch.uint8, lambda: weight.unpacked().to(torch.uint8).view(shape), f"{name}::codes")
    codes = low.op("Gather", low.graph.store(f"{name}::codes", table), ids, axis=0)
    assert isinstance(weight.scale, Tensor)
    zero = torch.tensor(128) if weight.zero is None else weight.zero
    grid = weight.scale.float().reshape(()), zero.to(torch.uint8).reshape(())
    return low.op("DequantizeLinear", codes, *map(low.graph.constant, grid))


def loaded(low: Lowering, name: str, weight: QTensor) -> ir.Value:
    """The floats of 8-bit codes with one scale a row, decoded once.

    ONNX Runtime folds Cast and Mul when it loads the model, but runs DequantizeLinear each time.
    """
    shape, scales = (weight.rows, weight.columns), row_scales(weight)
    codes = Stored(shape, torch.int8, lambda: int8_codes(weight), f"{name}::rows of codes")
    steps = Stored((weight.rows, 1), torch.float32, lambda: scales.view(-1, 1), f"{name}::steps")
    floats = low.op("Cast", low.graph.store(f"{name}::rows of codes", codes), to=int(ir.DataType.FLOAT))
    made = low.op("Mul", floats, low.graph.store(f"{name}::steps", steps))
    return typed(made, Type(shape, torch.float32))
