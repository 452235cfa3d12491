"""attention_kvq and kv_append against their meaning: qc.attention over rounded keys and values."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from qcompiler.errors import No
from qcompiler.kernels.attention_kvq import STEP, attention_kvq, configure, cost
from qcompiler.kernels.kv_append import QuantizedCache, accepts, kv_append
from qcompiler.ops import default_scale, qc
from qcompiler.rounding import activation_scheme, codes_of
from tests import interpreter

SCHEMES = ["int4:token:asym:dynamic", "int4:token:dynamic", "int8:token:asym:dynamic", "int8:token:dynamic"]


@pytest.fixture(autouse=True, scope="module")
def patched() -> None:
    interpreter.install()


def filled(x: Tensor, scheme: str, capacity: int) -> QuantizedCache:
    """A cache that holds x [batch, heads, tokens, d]: what kv_append writes, written by PyTorch."""
    tokens, kind = x.shape[2], activation_scheme(scheme)
    cache = QuantizedCache.empty(scheme, x.shape[0], x.shape[1], capacity, x.shape[3])
    codes, scale, zero = codes_of(x, [], kind)
    planes = codes.flatten(-2).int().unflatten(-1, (16 // kind.bits, -1)).unbind(-2)
    words = sum(plane << (j * kind.bits) for j, plane in enumerate(planes))
    cache.words[:, :, :tokens] = torch.as_tensor(words).to(torch.int16)
    both = torch.stack([scale.half(), zero.half().expand_as(scale)], dim=-1)
    cache.grids[:, :, :tokens] = both.view(torch.int32)[..., 0, 0, 0]
    return cache


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_stored_is_the_meanings_codes(scheme: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0)).add(0.2).to(dtype)
    cache = QuantizedCache.empty(scheme, 2, 3, 9, 64)
    places = torch.zeros(2, dtype=torch.int32)
    kv_append(x[:, :, :4].contiguous(), cache, places)
    kv_append(x[:, :, 4:].contiguous(), cache, places + 4)
    expected = filled(x, scheme, 9)
    assert torch.equal(cache.words, expected.words)
    assert torch.equal(cache.grids, expected.grids)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(SCHEMES),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from([(1, 1), (2, 1), (6, 2), (16, 1)]),
    st.integers(1, 2 * STEP),
    st.sampled_from([64, 128]),
    st.integers(1, 4),
)
def test_attention_over_a_cache(
    scheme: str, dtype: torch.dtype, heads: tuple[int, int], tokens: int, d: int, splits: int
) -> None:
    random = torch.Generator().manual_seed(tokens)
    q = torch.randn(2, heads[0], d, generator=random).to(dtype)
    k, v = (torch.randn(2, 2, heads[1], tokens, d, generator=random) + 0.2).to(dtype)
    padding = torch.ones(2, tokens, dtype=torch.int64)
    padding[1, : tokens // 3] = 0
    begins = torch.tensor([0, tokens // 3], dtype=torch.int32)
    ends = torch.full((2,), tokens, dtype=torch.int32)
    keys, values = (filled(x, scheme, tokens + 7) for x in (k, v))
    found = attention_kvq(q, keys, values, begins, ends, default_scale(d), splits)
    meaning = qc.attention(
        q[:, :, None].float(), k.float(), v.float(), None, padding, scale=default_scale(d), key=scheme, value=scheme
    )
    torch.testing.assert_close(found.float(), meaning[:, :, 0], rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_what_is_accepted() -> None:
    assert accepts("int4:token:asym:dynamic")
    assert accepts("int2:token:dynamic") == No("a cache of int2 codes, not int4 or int8")
    assert accepts("int8:tensor") == No("a cache of scheme int8:tensor has no scale for each token")


def test_long_caches_are_split_and_cost_their_bytes() -> None:
    assert configure(8, 32768) == 64
    assert configure(10**6, 32768) == 1
    cache = QuantizedCache.empty("int4:token:dynamic", 1, 8, 16, 128)
    assert cost(cache, 1000, 32).moved == 8 * 1000 * 2 * (64 + 4)
