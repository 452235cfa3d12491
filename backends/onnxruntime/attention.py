"""Rules for attention and rotary positions in plain ONNX operators: every window, cap, bias and sink."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from qcompiler.backends.onnxruntime.activations import rounded
from qcompiler.backends.onnxruntime.float_keys import kept, rounded_keys
from qcompiler.backends.onnxruntime.graph import dtype_of, sizes_of, typed
from qcompiler.backends.onnxruntime.lowering import Lowering, Rule
from qcompiler.backends.onnxruntime.positions import from_first_real, positions
from qcompiler.program import Type


def rope(low: Lowering, out: Type, x: ir.Value, cos: ir.Value, sin: ir.Value, interleaved: bool = False) -> ir.Value:
    """Rotate channel pairs of x [batch, heads, sequence, d] by angles [batch or 1, sequence, r / 2]."""
    half, width = sizes_of(cos)[-1], out.shape[-1]
    assert isinstance(half, int)
    assert isinstance(width, int)
    cos, sin = (low.op("Unsqueeze", low.cast(angle, out.dtype), [1]) for angle in (cos, sin))
    rest = None
    if 2 * half < width:
        x, rest = low.ops("Split", x, [2 * half, width - 2 * half], outputs=2, axis=-1)
    if interleaved:
        pairs = low.op("Reshape", x, [0, 0, -1, half, 2])
        a, b = (low.op("Gather", pairs, i, axis=-1) for i in range(2))
    else:
        a, b = low.ops("Split", x, [half, half], outputs=2, axis=-1)
    first = low.op("Sub", low.op("Mul", a, cos), low.op("Mul", b, sin))
    second = low.op("Add", low.op("Mul", b, cos), low.op("Mul", a, sin))
    if interleaved:
        both = low.op("Concat", low.op("Unsqueeze", first, [-1]), low.op("Unsqueeze", second, [-1]), axis=-1)
        turned = low.op("Reshape", both, [0, 0, -1, 2 * half])
        return turned if rest is None else low.op("Concat", turned, rest, axis=-1)
    return low.op("Concat", *(part for part in (first, second, rest) if part is not None), axis=-1)


def mask(
    low: Lowering,
    out: Type,
    like: ir.Value,
    padding: ir.Value | None,
    queries: Any,
    keys: Any,
    left: int = -1,
    right: int = -1,
    chunk: int = 0,
) -> ir.Value:
    """Boolean mask [batch or 1, 1, queries, keys] of a window and a padding mask; see `qcompiler.ops.mask`."""
    keys, queries = low.cast(keys, torch.int64), low.cast(queries, torch.int64)
    query, key = positions(low, queries, keys)
    found: list[ir.Value] = []
    distance = low.op("Sub", key, query)
    if left >= 0:
        found.append(low.op("GreaterOrEqual", distance, low.graph.constant(-left)))
    if right >= 0:
        found.append(low.op("LessOrEqual", distance, low.graph.constant(right)))
    if chunk > 0:
        found.append(same_chunk(low, padding, key, query, chunk))
    if padding is not None:
        real = low.cast(padding, torch.bool)
        found.append(low.op("Unsqueeze", real, [1, 2]))
    seen = found[0] if found else low.op("Equal", distance, distance)
    for condition in found[1:]:
        seen = low.op("And", seen, condition)
    # Up to four axes: [queries, keys], or with batch and heads before them.
    return low.op("Expand", seen, [1, 1, 1, 1])


def same_chunk(low: Lowering, padding: ir.Value | None, key: ir.Value, query: ir.Value, chunk: int) -> ir.Value:
    """Whether query and key lie in the same chunk, counted from the first real position."""
    size = low.graph.constant(chunk)
    own = [from_first_real(low, position, padding) for position in (key, query)]
    groups = [low.op("Div", low.op("Sub", x, low.op("Mod", x, size)), size) for x in own]
    return low.op("Equal", *groups)


def attention(
    low: Lowering,
    out: Type,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    given_mask: ir.Value | None = None,
    padding: ir.Value | None = None,
    bias: ir.Value | None = None,
    sinks: ir.Value | None = None,
    key_grid: Sequence[ir.Value] | None = None,
    value_grid: Sequence[ir.Value] | None = None,
    scale: float = 1.0,
    left: int = -1,
    right: int = -1,
    chunk: int = 0,
    softcap: float = 0.0,
    key: str = "",
    value: str = "",
    block: int = 0,
    recent: int = 0,
    first: int = 0,
    levels: int = 0,
) -> ir.Value:
    """softmax(q k' * scale, masked) v; see `qcompiler.attention`."""
    exact = bool(block or recent or first)  # some queries see some floats
    float_v = grouped(low, q, v) if exact and value else None
    score = scores(low, q, rounded_keys(low, k, key_grid or (), key, block, padding) if key else k, scale, out.dtype)
    if exact and key:
        near = kept(low, q, k, padding, max(block, 1), recent, first)
        score = low.op("Where", near, scores(low, q, k, scale, out.dtype), score)
    v = grouped(low, q, rounded(low, v, value_grid or (), value) if value else v)
    dtype = out.dtype
    if softcap > 0.0:
        cap = low.cast(softcap, dtype)
        score = low.op("Mul", low.op("Tanh", low.op("Div", score, cap)), cap)
    boolean = given_mask is not None and dtype_of(given_mask) == torch.bool
    for added in (bias, None if boolean else given_mask):
        if added is not None:
            score = low.op("Add", score, low.cast(added, dtype))
    # A finite minimum, not -inf: a query that sees nothing (a padded position) must not become NaN.
    lowest = low.cast(torch.finfo(dtype).min, dtype)
    if padding is not None or chunk > 0 or left >= 0 or right >= 0:
        score = low.op("Where", window(low, q, k, padding, left, right, chunk), score, lowest)
    if boolean:
        score = low.op("Where", given_mask, score, lowest)
    weights = low.op("Softmax", score, axis=-1) if sinks is None else with_sinks(low, score, sinks, out)
    if levels:
        peak = low.op("Max", low.op("ReduceMax", weights, [-1], keepdims=1), low.cast(torch.finfo(dtype).tiny, dtype))
        step = low.op("Div", peak, low.cast(float(levels), dtype))
        weights = low.op("Mul", low.op("Round", low.op("Div", weights, step)), step)
    if float_v is None:
        return low.op("MatMul", weights, v)
    near, none = kept(low, q, k, padding, 1, recent, first), low.cast(0.0, dtype)
    parts = ((low.op("Where", near, weights, none), float_v), (low.op("Where", near, none, weights), v))
    return low.op("Add", *(low.op("MatMul", share, x) for share, x in parts))


def scores(low: Lowering, q: ir.Value, k: ir.Value, scale: float, dtype: torch.dtype) -> ir.Value:
    """q k' * scale, [batch, heads, queries, keys]."""
    product = low.op("MatMul", q, low.op("Transpose", grouped(low, q, k), perm=[0, 1, 3, 2]))
    return product if scale == 1.0 else low.op("Mul", product, low.cast(scale, dtype))


def grouped(low: Lowering, q: ir.Value, x: ir.Value) -> ir.Value:
    """Keys or values of [batch, kv_heads, keys, d] repeated for each query head of their group."""
    heads, own = sizes_of(q)[1], sizes_of(x)[1]
    if heads == own:
        return x
    assert isinstance(heads, int)
    assert isinstance(own, int)
    wide = low.op("Tile", low.op("Unsqueeze", x, [2]), [1, 1, heads // own, 1, 1])
    kind = Type((sizes_of(x)[0], heads, *sizes_of(x)[2:]), dtype_of(x))
    shape = low.shape([low.size(x, 0), heads, -1, sizes_of(x)[3]])
    return typed(low.op("Reshape", wide, shape), kind)


def window(low: Lowering, q: ir.Value, k: ir.Value, padding: Any, left: int, right: int, chunk: int) -> ir.Value:
    """The mask of a window; layers with the same one share it."""
    queries, keys = sizes_of(q)[2], sizes_of(k)[2]
    key = ("window", queries, keys, padding, left, right, chunk)
    if key not in low.memo:
        low.memo[key] = mask(low, SEEN, q, padding, low.size(q, 2), low.size(k, 2), left, right, chunk)
    value: ir.Value = low.memo[key]
    return value


def with_sinks(low: Lowering, score: ir.Value, sinks: ir.Value, out: Type) -> ir.Value:
    """Softmax over the scores and one more logit for each head, whose share is dropped."""
    rows = low.op("Shape", score, start=0, end=3)
    column = low.op("Reshape", low.cast(sinks, out.dtype), [1, -1, 1, 1])
    column = low.op("Expand", column, low.op("Concat", rows, low.graph.constant([1]), axis=0))
    share = low.op("Softmax", low.op("Concat", score, column, axis=-1), axis=-1)
    return low.op("Slice", share, [0], [-1], [-1])


def cached_attention(
    low: Lowering, out: Any, q: ir.Value, k: ir.Value, v: ir.Value, past_k: ir.Value, past_v: ir.Value, *rest: Any
) -> list[ir.Value]:
    """Attention over past and new keys and values, and both caches, grown."""
    k, v = (
        typed(low.op("Concat", past, new, axis=2), kind)
        for past, new, kind in ((past_k, k, out[1]), (past_v, v, out[2]))
    )
    return [attention(low, out[0], q, k, v, *rest), k, v]


def sdpa(
    low: Lowering,
    out: Type,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    given_mask: ir.Value | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    grouped_heads: bool = False,
) -> ir.Value:
    """PyTorch's own attention operator; its causal mask starts at the first key."""
    width = sizes_of(q)[-1]
    assert isinstance(width, int)
    own = width**-0.5 if scale is None else scale
    if not causal:
        return attention(low, out, q, k, v, given_mask, scale=own)
    zero, one = (low.graph.constant(n, torch.int64) for n in (0, 1))
    rows = low.op("Unsqueeze", low.op("Range", zero, low.size(q, -2), one), [1])
    seen = low.op("LessOrEqual", low.op("Range", zero, low.size(k, -2), one), rows)
    return attention(low, out, q, k, v, typed(seen, SEEN), scale=own)


SEEN = Type(("batch", 1, "queries", "keys"), torch.bool)

RULES: dict[str, Rule] = {
    "qc.rope": rope,
    "qc.mask": mask,
    "qc.attention": attention,
    "qc.cached_attention": cached_attention,
    "aten.scaled_dot_product_attention": sdpa,
}
