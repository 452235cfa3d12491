"""Hadamard matrices are what they say, and the fast transform multiplies by them."""

import math

import pytest
import torch

from qcompiler.hadamard import base_order, hadamard, random_rotation, transform

# 12, 20, 44: Paley's first construction; 28, 36, 76: the second (28 by the first would need a field of 27 elements).
KNOWN = (1, 2, 4, 12, 20, 28, 36, 44, 60, 64, 76, 80, 108, 140, 200, 576, 768, 896, 1152, 1536)


@pytest.mark.parametrize("order", KNOWN)
def test_rows_are_orthogonal(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 10, 92, 172])
def test_orders_without_one(order: int) -> None:
    assert hadamard(order) is None


def test_sizes_of_models() -> None:
    """Hidden sizes and head sizes in use; base 1 is a power of two."""
    sizes = {64: 1, 80: 20, 96: 12, 576: 36, 768: 12, 896: 28, 960: 60, 2560: 20, 3584: 28, 4544: 284, 5120: 20}
    assert {size: base_order(size) for size in sizes} == sizes


@pytest.mark.parametrize("order", [1, 2, 36, 64, 92, 576])
def test_random_rotations_are_orthogonal_and_follow_the_seed(order: int) -> None:
    first, again, other = (random_rotation(order, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(first @ first.T, torch.eye(order, dtype=torch.float64))
    assert torch.equal(first, again)
    assert order < 3 or not torch.equal(first, other)


@pytest.mark.parametrize(("channels", "size"), [(8, 8), (24, 8), (36, 36), (144, 72), (5, 1), (96, 48)])
def test_the_transform_multiplies_by_the_matrix(channels: int, size: int) -> None:
    x = torch.randn(3, 2, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = hadamard(size)
    assert matrix is not None
    expected = (x.unflatten(-1, (-1, size)) @ matrix.T).flatten(-2) / math.sqrt(size)
    torch.testing.assert_close(transform(x, size), expected)


def test_half_precision_is_added_up_wide() -> None:
    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)).half()
    assert transform(x, 4096).dtype == torch.float16
    torch.testing.assert_close(transform(x, 4096), transform(x.double(), 4096).half(), atol=2e-3, rtol=2e-3)
