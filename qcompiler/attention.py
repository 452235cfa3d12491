"""Attention: its mask, its meaning, and the same over a cache; keys and values may be rounded on the way.

Rounded keys and values are what a low-bit cache holds. `key` and `value` are schemes along the channels of a head
(`int8:token:asym:dynamic`, `nf4:g32:dynamic`, or static with a grid); with `block` > 0 keys are instead rounded for
each channel over blocks of that many neighbouring tokens, which `key` must then ask for: `int2:channel:asym:dynamic`
(KIVI, arXiv 2402.02750). The newest `recent` tokens a query sees, those of a block that is not full yet, and the
`first` tokens of the sequence keep their floats.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.errors import RecipeError
from qcompiler.rounding import fake_quantize, straight_through
from qcompiler.scheme import Scheme


def mask(
    like: Tensor,
    padding: Tensor | None,
    queries: int,
    keys: int,
    *,
    left: int = -1,
    right: int = -1,
    chunk: int = 0,
) -> Tensor:
    """Boolean mask [batch or 1, 1, queries, keys], True where a query may see a key.

    Queries are the last `queries` of `keys` positions. `padding` [batch, keys] is nonzero at real tokens;
    chunks are counted from the first real token. `like` gives the device.
    """
    key = torch.arange(keys, device=like.device)
    query = torch.arange(queries, device=like.device) + (keys - queries)
    distance = key[None, :] - query[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen = seen & (distance >= -left)
    if right >= 0:
        seen = seen & (distance <= right)
    seen = seen[None, None]
    if chunk > 0:
        group = torch.div(_from_first_real(key, padding), chunk, rounding_mode="floor")
        seen = seen & (group[:, None, keys - queries :, None] == group[:, None, None, :])
    if padding is not None:
        seen = seen & (padding != 0)[:, None, None, :]
    return seen


_mask = mask  # `attention` has an argument of that name


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    key_grid: Sequence[Tensor] | None = None,
    value_grid: Sequence[Tensor] | None = None,
    *,
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
) -> Tensor:
    """Attention of q [batch, heads, queries, d] over k [batch, kv_heads, keys, d], v [batch, kv_heads, keys, dv].

    Returns [batch, heads, queries, dv]. `mask` is boolean (True: may be seen) or float (added), broadcastable to
    [batch, heads, queries, keys]; `padding` [batch, keys] is nonzero at real tokens; `bias` is added to the scores;
    `sinks` [heads] are logits that take part in the softmax and carry no value. Keys and values are rounded as the
    module says, grids [kv_heads, 1, groups]. The weights after the softmax are rounded to `levels` equal steps up to
    the largest that a query has: a fused kernel rounds exp(score - largest score) and divides by the weights' sum at
    the end (SageAttention, arXiv 2410.02367, section 3.3); fixed steps of 1 / levels would lose most of a long row.
    """
    seen = None
    if padding is not None or chunk > 0 or left >= 0 or right >= 0:
        seen = _mask(q, padding, q.shape[2], k.shape[2], left=left, right=right, chunk=chunk)
    if mask is not None and mask.dtype == torch.bool:
        seen = mask if seen is None else seen & mask
    added = bias
    if mask is not None and mask.dtype != torch.bool:
        added = mask if added is None else added + mask
    rounded_k = round_keys(k, key_grid or (), key, block, padding) if key else k
    rounded_v = fake_quantize(v, value_grid or (), scheme=value) if value else v
    exact = bool(recent or first or block)  # some queries see some floats
    if softcap == 0.0 and sinks is None and not exact and not levels:
        return _sdpa(q, rounded_k, rounded_v, seen, added, scale)
    score = _scores(q, rounded_k, scale)
    if exact and key:
        near = _kept(q, k.shape[2], padding, max(block, 1), recent, first)
        score = torch.where(near, _scores(q, k, scale), score)
    if softcap > 0.0:
        score = softcap * torch.tanh(score / softcap)
    score = score if added is None else score + added
    if seen is not None:
        # A finite minimum, not -inf: a query that sees nothing (a padded position) must not become NaN.
        score = score.masked_fill(~seen, torch.finfo(score.dtype).min)
    weights = _softmax(score, sinks)
    if levels:
        step = weights.amax(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny) / levels
        weights = straight_through(weights, torch.round(weights / step) * step)
    if exact and value:
        near = _kept(q, k.shape[2], padding, 1, recent, first)
        return _mixed(weights.where(near, 0.0), v) + _mixed(weights.where(~near, 0.0), rounded_v)
    return _mixed(weights, rounded_v)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q k' * scale, float32 [batch, heads, queries, keys]."""
    return (q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2)).float() * scale


def _mixed(weights: Tensor, v: Tensor) -> Tensor:
    """The values, by weight."""
    return weights.to(v.dtype) @ v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1)


def _softmax(score: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return score.softmax(-1)
    column = sinks.float().view(1, -1, 1, 1).expand(score.shape[0], -1, score.shape[2], 1)
    return torch.cat([score, column], dim=-1).softmax(-1)[..., :-1]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, added: Tensor | None, scale: float) -> Tensor:
    """The common case through PyTorch's fused attention."""
    bias = added
    if seen is not None:
        low = torch.finfo(q.dtype).min
        zero = torch.zeros((), dtype=q.dtype, device=q.device)
        bias = torch.where(seen, zero if added is None else added.to(q.dtype), low)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=grouped)


def round_keys(k: Tensor, grid: Sequence[Tensor], key: str, block: int, padding: Tensor | None = None) -> Tensor:
    """Keys [batch, heads, keys, d] as a cache of scheme `key` holds them; those of padding have no say in a range."""
    if not block:
        return fake_quantize(k, grid, scheme=key)
    if padding is not None:
        k = k.masked_fill((padding == 0)[:, None, :, None], 0.0)
    return fake_quantize(k.transpose(-1, -2), (), scheme=block_scheme(key, block)).transpose(-1, -2)


def block_scheme(key: str, block: int) -> str:
    """The scheme along the tokens of one channel; RecipeError where `key` asks for something else.

    >>> block_scheme("int2:channel:asym:dynamic", 64)
    'int2:g64:asym:dynamic'
    """
    scheme = Scheme.parse(key)
    if scheme.granularity != "channel" or not scheme.dynamic:
        raise RecipeError(
            f"keys in blocks of {block} tokens have a scale for each channel; write {scheme.code}{scheme.bits}:"
            f'channel:asym:dynamic, not "{key}"'
        )
    symmetry = "sym" if scheme.symmetric else "asym"
    return f"{scheme.code}{scheme.bits}:g{block}:{symmetry}:dynamic"


def _kept(q: Tensor, keys: int, padding: Tensor | None, block: int, recent: int, first: int) -> Tensor:
    """Boolean [batch or 1, 1, queries, keys]: whose floats a query still sees."""
    key = torch.arange(keys, device=q.device)
    query = torch.arange(q.shape[2], device=q.device) + (keys - q.shape[2])
    full = (key // block + 1) * block  # tokens there are when the key's block is full
    near = (full[None, :] > query[:, None] + 1 - recent)[None, None]
    if not first:
        return near
    return near | (_from_first_real(key, padding) < first)[:, None, None, :]


def _from_first_real(key: Tensor, padding: Tensor | None) -> Tensor:
    """Positions [keys] counted from each sequence's first real token, [batch or 1, keys]."""
    return key[None] if padding is None else key[None] - (padding != 0).long().argmax(-1)[:, None]


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    *extra: Any,
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention` of the newest queries over past [batch, kv_heads, past, d] and new keys and values.

    Returns the output and the grown caches [batch, kv_heads, past + queries, d]; `mask`, `padding` and `bias`
    span past and new keys.
    """
    k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    return attention(q, k, v, *extra, **how), k, v
