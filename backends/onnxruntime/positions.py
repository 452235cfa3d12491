"""Positions of queries and keys in ONNX operators, and what is counted from the first real token."""

import onnx_ir as ir
import torch

from qcompiler.backends.onnxruntime.lowering import Lowering


def positions(low: Lowering, queries: ir.Value, keys: ir.Value) -> tuple[ir.Value, ir.Value]:
    """int64 [queries, 1] and [keys]: queries are the last of the keys."""
    zero, one = (low.graph.constant(n, torch.int64) for n in (0, 1))
    query = low.op("Unsqueeze", low.op("Range", low.op("Sub", keys, queries), keys, one), [1])
    return query, low.op("Range", zero, keys, one)


def from_first_real(low: Lowering, position: ir.Value, padding: ir.Value | None) -> ir.Value:
    """A position counted from each sequence's first real token: [batch, ...] where there is padding."""
    if padding is None:
        return position
    real = low.op("Cast", low.cast(padding, torch.bool), to=int(ir.DataType.INT64))
    return low.op("Sub", position, low.op("Unsqueeze", low.op("ArgMax", real, axis=1, keepdims=1), [1, 2]))
