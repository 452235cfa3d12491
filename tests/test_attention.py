"""Attention over rounded keys and values: who sees floats, and that a cache changes nothing."""

import pytest
import torch

from qcompiler.attention import attention, cached_attention
from qcompiler.errors import RecipeError
from qcompiler.rounding import fake_quantize
from tests.test_canonicalize import random

LOW = {"key": "int4:token:asym:dynamic", "value": "int4:token:asym:dynamic"}
KIVI = {"key": "int2:channel:asym:dynamic", "value": "int2:token:asym:dynamic", "block": 4}


def qkv(tokens: int = 16) -> tuple[torch.Tensor, ...]:
    return random(2, 4, tokens, 8, seed=1), random(2, 2, tokens, 8, seed=2), random(2, 2, tokens, 8, seed=3)


def test_plain_schemes_round_keys_and_values() -> None:
    q, k, v = qkv()
    rounded = [fake_quantize(x, [], scheme="int4:token:asym:dynamic") for x in (k, v)]
    expected = attention(q, *rounded, right=0)
    assert torch.allclose(attention(q, k, v, right=0, **LOW), expected, atol=1e-6)


@pytest.mark.parametrize("how", [LOW | {"recent": 16}, LOW | {"first": 16}, KIVI | {"recent": 16}])
def test_all_floats_are_plain_attention(how: dict[str, object]) -> None:
    q, k, v = qkv()
    assert torch.allclose(attention(q, k, v, right=0, **how), attention(q, k, v, right=0), atol=1e-6)


def test_a_query_sees_the_newest_and_the_first_in_float() -> None:
    q, k, v = qkv()
    how = LOW | {"recent": 4, "first": 2}
    mixed = [
        torch.cat([x[:, :, :2], fake_quantize(x, [], scheme=LOW["key"])[:, :, 2:12], x[:, :, 12:]], 2) for x in (k, v)
    ]
    last = attention(q, k, v, right=0, **how)[:, :, -1:]
    assert torch.allclose(last, attention(q[:, :, -1:], *mixed), atol=1e-5)


def test_keys_by_channel_wait_for_a_full_block() -> None:
    q, k, v = qkv(10)
    how = KIVI | {"value": ""}
    rounded = fake_quantize(k[:, :, :8].mT, [], scheme="int2:g4:asym:dynamic").mT
    last = attention(q, k, v, right=0, **how)[:, :, -1:]
    assert torch.allclose(last, attention(q[:, :, -1:], torch.cat([rounded, k[:, :, 8:]], 2), v), atol=1e-5)


@pytest.mark.parametrize("how", [LOW, LOW | {"recent": 3, "first": 2}, KIVI, KIVI | {"recent": 5, "levels": 255}])
def test_in_pieces_it_is_the_same(how: dict[str, object]) -> None:
    q, k, v = qkv()
    whole = attention(q, k, v, right=0, **how)
    pasts, parts = (k[:, :, :0], v[:, :, :0]), []
    for start, stop in ((0, 5), (5, 6), (6, 16)):
        new = [x[:, :, start:stop] for x in (q, k, v)]
        part, *pasts = cached_attention(*new, *pasts, right=0, **how)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-5)


def test_padding_does_not_count_as_first() -> None:
    q, k, v = qkv()
    padding = torch.ones(2, 16, dtype=torch.int64)
    padding[:, :3] = 0
    how = LOW | {"first": 2}
    padded = attention(q, k, v, padding=padding, right=0, **how)[:, :, 3:]
    alone = attention(*(x[:, :, 3:] for x in (q, k, v)), right=0, **how)
    assert torch.allclose(padded, alone, atol=1e-5)


def test_padding_has_no_say_in_a_block() -> None:
    """Nobody reads the key of padding; what it holds must not change how its neighbours are rounded."""
    q, k, v = qkv()
    padding = torch.ones(2, 16, dtype=torch.int64)
    padding[:, :3] = 0
    loud = k.clone()
    loud[:, :, :3] *= 100
    quiet, other = (attention(q, x, v, padding=padding, right=0, **KIVI)[:, :, 3:] for x in (k, loud))
    assert torch.equal(quiet, other)


def test_weights_are_rounded() -> None:
    q, k, v = qkv()
    coarse, fine = (attention(q, k, v, right=0, levels=levels) for levels in (3, 255))
    exact = attention(q, k, v, right=0)
    assert (coarse - exact).norm() > 10 * (fine - exact).norm() > 0


def test_small_weights_of_a_long_row_survive_rounding() -> None:
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1000, 8), torch.randn(1, 1, 1000, 8)
    assert torch.allclose(attention(q, k, v, levels=15), v.mean(2, keepdim=True), atol=1e-5)


def test_blocks_want_a_scale_for_each_channel() -> None:
    q, k, v = qkv()
    with pytest.raises(RecipeError, match="write int4:channel:asym:dynamic"):
        attention(q, k, v, key="int4:token:asym:dynamic", block=4)
