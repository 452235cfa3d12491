"""hqq: zero points that forgive outliers, never worse than the min-max grid in its own norm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.errors import RecipeError
from qcompiler.passes.hqq import Hqq, hqq
from qcompiler.scheme import QTensor, Scheme


def weights(seed: int, rows: int = 16, columns: int = 128) -> Tensor:
    """Values with the long tails that weights have."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=random) * torch.rand(rows, columns, generator=random).pow(2)


def norm(weight: Tensor, record: QTensor, p: float = 0.7) -> float:
    return float((weight - record.dequantize()).abs().pow(p).sum())


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 999),
    bits=st.sampled_from((2, 3, 4)),
    group=st.sampled_from((32, 64, 48)),
    whole=st.booleans(),
)
def test_it_is_better_than_rounding_to_the_min_max_grid(seed: int, bits: int, group: int, whole: bool) -> None:
    weight = weights(seed)
    scheme = Scheme.parse(f"int{bits}:g{group}:asym")
    plain, fitted = QTensor.quantize(weight, scheme), hqq(weight, scheme, whole=whole)
    assert norm(weight, fitted) <= norm(weight, plain) * (1.0 if whole else 1.002)  # minima are stored in 16 bits
    if not whole:
        assert norm(weight, fitted) < norm(weight, plain)
    assert torch.equal(fitted.scale, plain.scale)
    assert (fitted.zero is None, fitted.minimum is None) == (not whole, whole)


def test_at_three_bits_the_squared_error_gains_too() -> None:
    weight = weights(0, 64, 256)
    scheme = Scheme.parse("int3:g64:asym")
    lost = {
        n: float((weight - q.dequantize()).square().sum())
        for n, q in (("rtn", QTensor.quantize(weight, scheme)), ("hqq", hqq(weight, scheme)))
    }
    assert lost["hqq"] < lost["rtn"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": Scheme.parse("int4:g64:sym")}, "has no zero points by group to fit; write for example int4:g64"),
        ({"norm": 1.5}, "norm 1.5 must be above 0 and at most 1"),
        ({"turns": 0}, "turns 0 at least 1"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Hqq(**options).run(None, None)  # type: ignore[arg-type]
