"""Attention in which a query sees the newest or the first keys and values in float and the others rounded."""

from collections.abc import Sequence

import onnx_ir as ir
import torch

from qcompiler.attention import block_scheme
from qcompiler.backends.onnxruntime.activations import dynamic_grid, rounded, to_grid
from qcompiler.backends.onnxruntime.graph import sizes_of, typed
from qcompiler.backends.onnxruntime.lowering import Lowering, Unsupported
from qcompiler.backends.onnxruntime.positions import from_first_real, positions
from qcompiler.program import Type
from qcompiler.rounding import activation_scheme


def rounded_keys(
    low: Lowering, k: ir.Value, grid: Sequence[ir.Value], scheme: str, block: int, padding: ir.Value | None
) -> ir.Value:
    """Keys [batch, heads, keys, d] as a cache of this scheme holds them; see `qcompiler.attention.round_keys`."""
    if not block:
        return rounded(low, k, grid, scheme)
    kind = activation_scheme(block_scheme(scheme, block))
    if kind.code != "int":
        raise Unsupported(f"keys rounded to {scheme}")
    batch, heads, keys, width = sizes_of(k)
    if padding is not None:
        real = low.op("Unsqueeze", low.cast(padding, torch.bool), [1, 3])
        k = typed(
            low.op("Where", real, k, low.cast(0.0, torch.float32)), Type((batch, heads, keys, width), torch.float32)
        )
    count = low.size(k, 2)
    missing = low.op("Unsqueeze", low.op("Mod", low.op("Neg", count), low.graph.constant(block)), [0])
    ends = low.op("Concat", low.graph.constant([0] * 6), missing, low.graph.constant([0]), axis=0)
    cells = low.op("Reshape", low.op("Pad", k, ends), [0, 0, -1, block, width])
    cells = typed(cells, Type((batch, heads, "blocks", block, width), torch.float32))
    value = to_grid(low, cells, *dynamic_grid(low, cells, kind, axis=-2), kind)
    whole = low.op("Reshape", value, [0, 0, -1, width])
    shown = low.op("Slice", whole, [0], low.op("Unsqueeze", count, [0]), [2])
    return typed(shown, Type((batch, heads, keys, width), torch.float32))


def kept(
    low: Lowering, q: ir.Value, k: ir.Value, padding: ir.Value | None, block: int, recent: int, first: int
) -> ir.Value:
    """Boolean [1 or batch, 1, queries, keys]: whose floats a query still sees; shared by layers that ask the same."""
    queries, keys = low.size(q, 2), low.size(k, 2)
    known = ("kept", queries, keys, padding, block, recent, first)
    if known not in low.memo:
        query, key = positions(low, queries, keys)
        size = low.graph.constant(block, torch.int64)
        full = low.op("Add", low.op("Sub", key, low.op("Mod", key, size)), size)  # tokens when the key's block is full
        seen = low.op("Greater", full, low.op("Add", query, low.graph.constant(1 - recent)))
        if first:
            seen = low.op("Or", seen, low.op("Less", from_first_real(low, key, padding), low.graph.constant(first)))
        low.memo[known] = seen
    value: ir.Value = low.memo[known]
    return value
