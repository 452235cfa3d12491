"""attention_kvq and kv_append against their meaning: qc.attention over rounded keys and values."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from qcompiler.errors import InputError, No
from qcompiler.kernels.attention_kvq import attention_kvq, configure, cost
from qcompiler.kernels.kv_append import kv_append
from qcompiler.kernels.kv_cache import QuantizedCache, accepts, nf4, suits, windowed
from qcompiler.kernels.kv_window import window_append
from qcompiler.ops import default_scale, qc
from qcompiler.rounding import NF4, activation_scheme, codes_of, group_size, grouped
from tests import interpreter

SCHEMES = [
    *("int4:token:asym:dynamic", "int4:token:dynamic", "int8:token:asym:dynamic", "int8:token:dynamic"),
    *("int3:token:asym:dynamic", "int3:g64:dynamic", "nf4:token:dynamic", "nf4:g32:dynamic"),
    *("int4:g32:asym:dynamic", "int8:g64:asym:dynamic"),
]
WINDOWED = [  # keys, values, block
    ("int4:token:asym:dynamic", "int4:token:asym:dynamic", 0),
    ("int4:channel:asym:dynamic", "int4:g32:asym:dynamic", 32),
    ("int4:channel:dynamic", "int4:token:dynamic", 64),
    ("int3:channel:asym:dynamic", "int3:g32:asym:dynamic", 128),
    ("int3:token:dynamic", "int3:token:asym:dynamic", 0),
    ("nf4:channel:dynamic", "nf4:g32:dynamic", 64),
    ("int8:channel:asym:dynamic", "int8:token:asym:dynamic", 32),
]


@pytest.fixture(autouse=True, scope="module")
def patched() -> None:
    interpreter.install()


def codes_by_meaning(x: Tensor, scheme: str) -> Tensor:
    """Codes of x [..., d], uint8, as qcompiler.rounding has them."""
    kind = activation_scheme(scheme)
    if kind.code == "int":
        return codes_of(x, [], kind)[0].flatten(-2).to(torch.uint8)
    values = grouped(x.float(), group_size(kind, x.shape[-1]))
    shares = values / values.abs().amax(-1, keepdim=True)
    book = torch.tensor(NF4)
    return torch.bucketize(shares, (book[1:] + book[:-1]) / 2).flatten(-2).to(torch.uint8)


def fill(cache: QuantizedCache, x: Tensor, scheme: str) -> None:
    """What kv_append writes for x [batch, heads, tokens, d], from token 0 on, written by PyTorch."""
    tokens, kind = x.shape[2], activation_scheme(scheme)
    codes = codes_by_meaning(x, scheme).int()
    values = grouped(x.float(), group_size(kind, x.shape[-1]))
    scale, zero = values.abs().amax(-1), torch.zeros(())
    if kind.code == "int":
        scale, zero = (part.squeeze(-1) if part.dim() else part for part in codes_of(x, [], kind)[1:])
    else:
        codes = nf4(torch.float16).places[codes].int()
    both = torch.stack([scale.half(), zero.half().expand_as(scale)], dim=-1).view(torch.int32).squeeze(-1)
    cache.grids[:, :, :tokens] = both.view(cache.grids[:, :, :tokens].shape)
    whole = cache.words[:, :, :tokens].int() & 0xFFFF
    for j, plane in enumerate(codes.unflatten(-1, (cache.planes, -1)).unbind(-2), cache.place):
        if kind.bits != 3:
            whole |= plane << (j * kind.bits)
        elif j < 15:
            whole[..., j // 5, :] |= plane << (3 * (j % 5))
        else:
            for word in range(3):
                whole[..., word, :] |= (plane >> (2 - word) & 1) << 15
    cache.words[:, :, :tokens] = whole.to(torch.int16)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_stored_is_the_meanings_codes(scheme: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    new = [torch.randn(2, 1, 5, 128, generator=random).add(0.2).to(dtype) for _ in range(2)]
    caches = QuantizedCache.pair(scheme, scheme, 2, 1, 9, 128)
    places = torch.tensor([0, 2], dtype=torch.int32)
    for x, cache in zip(new, caches, strict=True):
        kv_append(x[:, :, :4].contiguous(), cache, places)
        kv_append(x[:, :, 4:].contiguous(), cache, places + 4)
    for x, cache in zip(new, caches, strict=True):
        assert cache.d == 128
        found = torch.stack([cache.codes()[0, :, :5], cache.codes()[1, :, 2:7]])
        assert torch.equal(found, codes_by_meaning(x, scheme))
        kind = activation_scheme(scheme)
        if kind.code == "int":
            scale, zero = (part.half().expand(2, 1, 5, cache.groups, 1) for part in codes_of(x, [], kind)[1:])
            grids = torch.cat([scale, zero], dim=-1).view(torch.int32).squeeze(-1)
            stored = cache.grids.view(2, 1, 9, cache.groups)
            assert torch.equal(torch.stack([stored[0, :, :5], stored[1, :, 2:7]]), grids)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(SCHEMES),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from([(1, 1), (2, 1), (6, 2), (16, 1)]),
    st.integers(1, 150),
    st.sampled_from([64, 128]),
    st.integers(1, 4),
)
def test_attention_over_a_cache(
    scheme: str, dtype: torch.dtype, heads: tuple[int, int], tokens: int, d: int, splits: int
) -> None:
    if not suits(scheme, scheme, d):
        d = 128
    q, k, v = random_tokens(tokens, heads, d, dtype)
    padding, begins = padding_of(tokens)
    ends = torch.full((2,), tokens, dtype=torch.int32)
    caches = QuantizedCache.pair(scheme, scheme, 2, heads[1], tokens + 7, d)
    for x, cache in zip((k, v), caches, strict=True):
        fill(cache, x, scheme)
    found = attention_kvq(q, *caches, begins, ends, default_scale(d), splits)
    assert_meant(found, (q, k, v), padding, key=scheme, value=scheme)


def random_tokens(tokens: int, heads: tuple[int, int], d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(tokens)
    q = torch.randn(2, heads[0], d, generator=random).to(dtype)
    k, v = (torch.randn(2, 2, heads[1], tokens, d, generator=random) + 0.2).to(dtype)
    return q, k, v


def padding_of(tokens: int) -> tuple[Tensor, Tensor]:
    """The mask of two sequences, the second of which begins with padding, and where they begin."""
    padding = torch.ones(2, tokens, dtype=torch.int64)
    padding[1, : tokens // 3] = 0
    return padding, torch.tensor([0, tokens // 3], dtype=torch.int32)


def assert_meant(found: Tensor, given_: tuple[Tensor, Tensor, Tensor], padding: Tensor, **how: Any) -> None:
    """The output is that of qc.attention over float32 numbers, to what 16 bits allow."""
    q, k, v = (part.float() for part in given_)
    scale = default_scale(q.shape[-1])
    meaning = qc.attention(q[:, :, None], k, v, None, padding, scale=scale, **how)
    torch.testing.assert_close(found.float(), meaning[:, :, 0], rtol=0, atol=8 * torch.finfo(found.dtype).eps)


@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from(WINDOWED),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(1, 140),
    st.integers(0, 20),
    st.integers(0, 5),
    st.integers(1, 3),
    st.integers(0, 12),
)
def test_a_window_of_floats(
    kind: tuple[str, str, int], dtype: torch.dtype, tokens: int, recent: int, first: int, splits: int, later: int
) -> None:
    key, value, block = kind
    q, k, v = random_tokens(tokens, (4, 1), 128, dtype)
    padding, begins = padding_of(tokens)
    caches = QuantizedCache.pair(key, value, 2, 1, -(-tokens // 128) * 128, 128)
    keys, values, window = windowed(caches, dtype, recent, first, block)
    start = max(tokens - later, 0)
    for low, high in ((0, start), *((i, min(i + 5, tokens)) for i in range(start, tokens, 5))):
        if high > low:
            new = (x[:, :, low:high].contiguous() for x in (k, v))
            places = torch.full((2,), low, dtype=torch.int32)
            window_append(*new, keys, values, window, begins, places, fresh=low == 0)
    ends = torch.full((2,), tokens, dtype=torch.int32)
    found = attention_kvq(q, keys, values, begins, ends, default_scale(128), splits, window)
    assert_meant(found, (q, k, v), padding, key=key, value=value, block=block, recent=recent, first=first)


def test_too_many_new_tokens_at_once() -> None:
    scheme = "int4:token:asym:dynamic"
    keys, values, window = windowed(QuantizedCache.pair(scheme, scheme, 1, 1, 64, 64), torch.float16, 8, ahead=4)
    new = torch.zeros(1, 1, 5, 64, dtype=torch.float16)
    zeros = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(InputError, match="5 new tokens at once, into a window with room for 4"):
        window_append(new, new, keys, values, window, zeros, zeros)


def test_what_is_accepted() -> None:
    assert accepts("int4:token:asym:dynamic")
    assert accepts("int2:token:dynamic") == No("a cache of int2 codes, not int4 or int8")
    assert suits("int3:token:asym:dynamic", "int3:g32:dynamic", 128)
    assert suits("int3:token:dynamic", "int3:token:dynamic", 64) == No("heads of 64 channels")
    assert suits("nf4:g32:dynamic", "nf4:g32:dynamic", 128)
    assert suits("int4:channel:dynamic", "int4:g32:dynamic", 128, block=64)
    assert suits("int2:token:dynamic", "int2:token:dynamic", 128) == No(
        "a cache of int2 codes, not int3, int4, int8 or nf4"
    )
    assert suits("int4:tensor", "int4:tensor", 128) == No("a cache of static ranges")
    assert suits("int4:token:dynamic", "int4:token:dynamic", 128, block=48) == No(
        "keys of int4:token:dynamic over blocks of 48 tokens, not one scale for each channel over 32, 64 or 128"
    )
    assert suits("int8:g32:dynamic", "int8:g32:dynamic", 128) == No(
        "a cache of scheme int8:g32:sym:dynamic, whose groups are not one to four of whole planes of 64"
    )
    assert accepts("int8:tensor") == No("a cache of scheme int8:tensor has no scale for each token")


def test_long_caches_are_split_and_cost_their_bytes() -> None:
    assert configure(8, 32768) == 64
    assert configure(10**6, 32768) == 1
    cache = QuantizedCache.empty("int4:token:dynamic", 1, 8, 16, 128)
    assert cost(cache, 1000, 32).moved == 8 * 1000 * 2 * (64 + 4)
