"""Choosing tokens: the most likely, and sampling with the right frequencies."""

import pytest
import torch

from qcompiler.sampling import choose


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_is_the_largest(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 2.0]], dtype=dtype)
    assert choose(logits).tolist() == [[1], [0]]


def test_sampling_has_the_frequencies_of_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, float("-inf")]).repeat(40_000, 1)
    found = choose(logits, temperature=0.7, random=torch.Generator().manual_seed(0))
    shares = torch.bincount(found[:, 0], minlength=4) / 40_000
    assert torch.allclose(shares, (logits[0] / 0.7).softmax(-1), atol=0.01)


def test_a_seed_gives_one_choice() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    draws = [choose(logits, 1.0, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)
