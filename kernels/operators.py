"""The kernels as operators of PyTorch, in the namespace `qct`: what graphs call, and what torch.compile sees.

Each takes a packed record as `records.split` gives it. On a GPU its kernel runs; on the CPU its meaning does, in plain
PyTorch (or the kernel, where Triton interprets). They are opaque to Inductor: which kernel runs, and in how many
parts, depends on the number of tokens, and Inductor fuses nothing into a kernel that it did not write.

Nothing is registered when this module is imported: the first use of `qct.<name>` defines the operators.

| op | meaning |
|---|---|
| `qct.linear` | x times a packed weight transposed, plus bias |
| `qct.linear_a8` | x rounded to 8 bits or fewer, times a packed weight transposed, in those codes, plus bias |
| `qct.linear_codes` | the same over codes that are there already |
| `qct.norm_quantize` | a norm, perhaps of a sum, stored in another order and rounded |
| `qct.attend` | new keys and values stored in a cache of fixed size, and attention over what it holds |
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.kernels.attention_kvq import attention_kvq
from qcompiler.kernels.dequantize_wq import FUSED, linear_decoded
from qcompiler.kernels.kv_append import kv_append
from qcompiler.kernels.kv_cache import FloatCache
from qcompiler.kernels.kv_window import window_append
from qcompiler.kernels.linear_a8 import linear_a8
from qcompiler.kernels.linear_float8 import linear_float8
from qcompiler.kernels.linear_gguf import linear_gguf
from qcompiler.kernels.linear_nf4 import PackedCodebook, linear_nf4
from qcompiler.kernels.linear_wq import linear_wq
from qcompiler.kernels.packed_blocks import PackedBlocks
from qcompiler.kernels.packed_float8 import LEAST, PackedFloat8
from qcompiler.kernels.packed_integers import PackedIntegers, sums_of
from qcompiler.kernels.packed_weight import PackedWeight
from qcompiler.kernels.quantize import Quantized, code_dtypes, quantize
from qcompiler.kernels.records import join, join_all, numbers
from qcompiler.ops import Operators, reordered_norm
from qcompiler.rounding import E4M3, activation_scheme, codes_of
from qcompiler.scheme import Scheme

SCHEMAS = {
    "linear": "(Tensor x, Tensor[] weight, Tensor? bias=None, *, str spec) -> Tensor",
    "linear_a8": "(Tensor x, Tensor[] weight, Tensor[] grid, Tensor? bias=None, *, str spec) -> Tensor",
    "linear_codes": "(Tensor codes, Tensor scale, Tensor zero, Tensor sums, Tensor[] weight, Tensor? bias=None, "
    "*, str spec, ScalarType dtype) -> Tensor",
    "norm_quantize": "(Tensor x, Tensor? residual, Tensor[] norm, *, str spec) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "attend": "(Tensor q, Tensor k, Tensor v, Tensor(a!)[] caches, Tensor places, "
    "*, str spec, float scale, int left=-1) -> Tensor",
}

LAUNCHERS: dict[type, Callable[..., Tensor]] = {
    PackedWeight: linear_wq,
    PackedCodebook: linear_nf4,
    PackedBlocks: linear_gguf,
}
CODED: dict[type, Callable[..., Tensor]] = {PackedIntegers: linear_a8, PackedFloat8: linear_float8}


def on_kernels(x: Tensor) -> bool:
    """Whether kernels can run on x: it is on a GPU, or Triton interprets."""
    from triton import knobs

    return x.is_cuda or bool(knobs.runtime.interpret)


def run_linear(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None = None, *, spec: str) -> Tensor:
    """x [..., k] times the weight [n, k] of a record in LAUNCHERS transposed, plus bias [n]: [..., n] in x's dtype.

    The product is computed in the record's dtype. A permuted weight (act-order) takes x in its logical order.
    """
    record = join(weight, spec)
    if not on_kernels(x):
        return F.linear(x, record.unpack().dequantize().to(x.dtype), None if bias is None else bias.to(x.dtype))
    permutation = getattr(record, "permutation", None)
    inner = x if permutation is None else x.index_select(-1, permutation)
    inner = inner.to(record.dtype).contiguous()
    launch = LAUNCHERS[type(record)]
    if launch is linear_wq and inner.numel() > FUSED * inner.shape[-1]:
        launch = linear_decoded
    return launch(inner, record, bias).to(x.dtype)


def run_linear_a8(
    x: Tensor, weight: Sequence[Tensor], grid: Sequence[Tensor], bias: Tensor | None = None, *, spec: str
) -> Tensor:
    """x [..., k], rounded by the scheme of a record in CODED (static: to `grid`), times its weight, in codes."""
    record = join(weight, spec)
    if on_kernels(x):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        made = _shaped(quantize(rows, grid, record.activation, record.counted), x)
    else:
        made = _rounded(x, grid, activation_scheme(record.activation), record.counted)
    return run_linear_codes(*made, weight, bias, spec=spec, dtype=x.dtype)


def run_linear_codes(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    sums: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """Codes [..., k], as `quantize` makes them, times the weight [n, k] of a record in CODED transposed: [..., n].

    `scale` and `zero` float32 [...] are each token's, of a dynamic activation, zero of an asymmetric one and less half
    the levels too; else they are empty. `sums` [runs, ...] are those of the codes, for a weight with zero points.
    """
    record = join(weight, spec)
    if not on_kernels(codes):
        floats = isinstance(record, PackedFloat8)
        meaning = _floats_by_meaning(codes, scale, record) if floats else _by_meaning(codes, scale, zero, record)
        return (meaning if bias is None else meaning + bias).to(dtype)
    token = [part.flatten() for part in (scale, zero) if part.numel()]
    counted = sums.flatten(1) if record.counted else None
    return CODED[type(record)](codes.contiguous(), record, token, bias, dtype, sums=counted)


def run_norm_quantize(
    x: Tensor, residual: Tensor | None, norm: Sequence[Tensor], *, spec: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The norm of a NormQuantize over x (plus residual) [..., width], rounded.

    Returns codes [..., width], as `quantize` makes them; scale and zero float32 [...], and sums, as `linear_codes`
    takes them; and the sum of x and residual. What there is not is empty.
    """
    record = join(norm, spec)
    kind = activation_scheme(record.scheme)
    if on_kernels(x):
        rows = [None if part is None else part.reshape(-1, x.shape[-1]).contiguous() for part in (x, residual)]
        found = record(*rows)
        return *_shaped(found, x), x.new_empty(0) if found.added is None else found.added.view(x.shape)
    added = x if residual is None else x + residual
    order = torch.arange(x.shape[-1]) if record.order is None else record.order.long()
    normed = reordered_norm(added.float(), None, None, order, kind=record.kind, eps=record.eps) * record.weight
    normed = (normed if record.bias is None else normed + record.bias).to(x.dtype)
    grid = [part for part in (record.scale, record.zero) if part is not None]  # one for each channel
    by_channel = kind if kind.dynamic else replace(kind, granularity="channel", group_size=0)
    return *_rounded(normed, grid, by_channel, record.run), x.new_empty(0) if residual is None else added


def run_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    caches: Sequence[Tensor],
    places: Tensor,
    *,
    spec: str,
    scale: float,
    left: int = -1,
) -> Tensor:
    """Store k and v [batch, kv_heads, 1, d] at `places` (int32 [batch]), and attend with q [batch, heads, 1, d].

    `caches` are a FloatCache, or QuantizedCaches of keys and values and perhaps a KvWindow, as `records.split_all`
    gives them. A query sees what was stored up to itself, and no more than `left` tokens before it.
    """
    records = join_all(caches, spec)
    ends = places + 1
    none = torch.zeros_like(ends)
    begins = (places - left).clamp(min=0) if left >= 0 else none
    if isinstance(records[0], FloatCache):
        return _attend_floats(q, k, v, records[0], places, begins, scale)
    dtype = torch.float16 if q.dtype == torch.float32 else q.dtype
    keys, values, *window = records
    if window:
        window_append(k.to(dtype).contiguous(), v.to(dtype).contiguous(), keys, values, window[0], none, places)
    else:
        kv_append(k.contiguous(), keys, places)
        kv_append(v.contiguous(), values, places)
    newest = q[:, :, 0].to(dtype).contiguous()
    found = attention_kvq(newest, keys, values, begins, ends, scale, window=window[0] if window else None)
    return found[:, :, None].to(q.dtype)


def _shaped(found: Quantized, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a kernel made of the rows of x [..., k], as x has them: codes, scale, zero, sums."""
    scale, zero = (_nothing(x) if part is None else part.view(x.shape[:-1]) for part in (found.scale, found.zero))
    sums = _nothing(x) if found.sums is None else found.sums.view(-1, *x.shape[:-1])
    return found.codes.view(x.shape), scale, zero, sums


def _rounded(x: Tensor, grid: Sequence[Tensor], kind: Scheme, run: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [..., k], as `quantize` makes them; scale and zero [...]; sums of runs; empty where there are none."""
    codes, scale, zero = codes_of(x, grid, kind)
    half = kind.levels >> 1 if kind.code == "int" else 0
    whole = (codes - half).flatten(-2)[..., : x.shape[-1]].to(code_dtypes(kind)[0])
    sums = sums_of(whole, run).view(-1, *x.shape[:-1]) if run else _nothing(x)
    if not kind.dynamic:
        return whole, _nothing(x), _nothing(x), sums
    middle = _nothing(x) if kind.symmetric else (zero - half).flatten(-3)
    return whole, scale.flatten(-3), middle, sums


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32)


def _by_meaning(whole: Tensor, scale: Tensor, zero: Tensor, record: Any) -> Tensor:
    """What linear_a8 computes, run by run, float32 [..., n]; `whole` int8 [..., k] are codes less half the levels."""
    kind, lift = activation_scheme(record.activation), 16 if record.scheme.bits == 4 else 1
    n, k = record.shape
    steps = (record.unpack().double() - (record.scheme.levels >> 1)) * lift
    if record.zeros is not None:
        steps -= record.zeros[:, :n].double().repeat_interleave(record.run, 0)[:k].T
    total = torch.zeros(*whole.shape[:-1], n, device=whole.device)
    for run, start in enumerate(range(0, k, record.run)):
        stop = min(start + record.run, k)
        sums = whole[..., start:stop].double() @ steps[:, start:stop].T
        share = record.starts[run, :n].double()
        if not kind.symmetric:
            sums = sums - share * zero[..., None] if kind.dynamic else sums + share
        factor = record.factors[run, :n] * scale[..., None] if kind.dynamic else record.factors[run, :n]
        total += sums.float() * factor
    return total


def _floats_by_meaning(codes: Tensor, scale: Tensor, record: PackedFloat8) -> Tensor:
    """What linear_float8 computes, float32 [..., n]."""
    n, k = record.shape
    values = record.unpack()
    steps = values.view(E4M3).float()
    if record.zeros is not None:
        steps = values * LEAST - record.zeros[:, :n].repeat_interleave(record.run, 0)[:k].T
    factors = record.factors[:, :n].repeat_interleave(record.run, 0)[:k].T
    product: Tensor = (codes.float() @ (steps * factors).T) * scale[..., None]
    return product


def _attend_floats(
    q: Tensor, k: Tensor, v: Tensor, held: FloatCache, places: Tensor, begins: Tensor, scale: float
) -> Tensor:
    """Attention over float caches of fixed size: what is not there yet, or not seen any more, is masked."""
    batch = torch.arange(q.shape[0], device=q.device)
    for new, cache in ((k, held.keys), (v, held.values)):
        cache[batch, :, places.long()] = new[:, :, 0].to(cache.dtype)
    at = torch.arange(held.keys.shape[2], device=q.device)
    seen = (at <= places[:, None]) & (at >= begins[:, None])
    grouped = q.shape[1] != held.keys.shape[1]
    keys, values = held.keys.to(q.dtype), held.values.to(q.dtype)
    mask = seen[:, None, None]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _fake_linear(x, weight, bias=None, *, spec):
    return x.new_empty((*x.shape[:-1], numbers(spec)["shape"][0]))


def _fake_linear_a8(x, weight, grid, bias=None, *, spec):
    return x.new_empty((*x.shape[:-1], numbers(spec)["shape"][0]))


def _fake_linear_codes(codes, scale, zero, sums, weight, bias=None, *, spec, dtype):
    return codes.new_empty((*codes.shape[:-1], numbers(spec)["shape"][0]), dtype=dtype)


def _fake_norm_quantize(x, residual, norm, *, spec):
    known = numbers(spec)
    kind, run = activation_scheme(known["scheme"]), known["run"]
    token = [
        x.new_empty(x.shape[:-1], dtype=torch.float32) if there else _nothing(x)
        for there in (kind.dynamic, kind.dynamic and not kind.symmetric)
    ]
    stored, summed = code_dtypes(kind)
    sums = x.new_empty((-(-x.shape[-1] // run), *x.shape[:-1]), dtype=summed) if run else _nothing(x)
    return x.new_empty(x.shape, dtype=stored), *token, sums, x.new_empty(0 if residual is None else x.shape)


def _fake_attend(q, k, v, caches, places, *, spec, scale, left=-1):
    return q.new_empty((*q.shape[:3], v.shape[-1]))


qct = Operators(
    "qct",
    SCHEMAS,
    {name: globals()[f"run_{name}"] for name in SCHEMAS},
    {name: globals()[f"_fake_{name}"] for name in SCHEMAS},
)
