"""Rounded activations: grids, codes, and integer arithmetic that floats can check."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.errors import RecipeError
from qcompiler.ops import qc
from qcompiler.rounding import NF4, activation_scheme, fake_quantize, float8_weight, integer_linear, run_length
from qcompiler.scheme import QTensor, Scheme
from tests.test_canonicalize import random


@given(
    bits=st.integers(2, 8),
    size=st.sampled_from(["token", "g4", "g32", "g5"]),
    symmetry=st.sampled_from(["sym", "asym"]),
    channels=st.integers(1, 70),
)
@settings(deadline=None, max_examples=40)
def test_no_value_moves_by_more_than_half_a_step(bits: int, size: str, symmetry: str, channels: int) -> None:
    x = random(2, 3, channels, seed=channels)
    rounded = fake_quantize(x, [], scheme=f"int{bits}:{size}:{symmetry}:dynamic")
    assert rounded.shape == x.shape
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert bool(((rounded - x).abs() <= step + 1e-6).all())  # half of one, and half of one for a rounded zero point


def test_the_whole_code_range_is_used() -> None:
    """The official RPTQ code divides by 2^b: its top code does not exist."""
    x = torch.tensor([[-0.6, 0.2, 1.0]])
    rounded = fake_quantize(x, [], scheme="int4:token:asym:dynamic")
    assert torch.allclose(rounded[0, 2], torch.tensor(1.0), atol=0.04)
    assert (
        len(torch.unique(fake_quantize(torch.linspace(-0.6, 1, 999)[None], [], scheme="int4:token:asym:dynamic"))) == 16
    )


def test_a_token_is_rounded_by_itself() -> None:
    x = random(2, 5, 32)
    whole = fake_quantize(x, [], scheme="int4:g8:asym:dynamic")
    assert torch.equal(whole[:, 3:4], fake_quantize(x[:, 3:4], [], scheme="int4:g8:asym:dynamic"))


def test_static_grids_broadcast_over_heads() -> None:
    x = random(2, 3, 5, 8)  # [batch, heads, tokens, d]
    scale = torch.tensor([[[0.1, 0.2]], [[0.3, 0.4]], [[0.5, 0.6]]])
    rounded = fake_quantize(x, [scale], scheme="int8:g4:sym")
    steps = rounded / scale.repeat_interleave(4, -1)
    assert torch.allclose(steps, steps.round(), atol=1e-4)


def test_nf4_values_are_quantiles() -> None:
    rounded = fake_quantize(torch.linspace(-1, 1, 101)[None], [], scheme="nf4:token:dynamic")
    assert torch.equal(rounded.unique(), torch.tensor(NF4))


def test_fp8_values_are_those_of_e4m3() -> None:
    """Scaled so that the largest is 448: then multiples of 2^-9 near zero, and three bits of mantissa above."""
    x = torch.tensor([[448.0, -3.0, 17.0, 0.0021, 0.0]])
    assert fake_quantize(x, [], scheme="fp8:token:dynamic").tolist() == [[448.0, -3.0, 16.0, 2.0**-9, 0.0]]
    wide = random(3, 64) * 7
    rounded = fake_quantize(wide, [], scheme="fp8:token:dynamic")
    step = (wide.abs() / 16).clamp(min=float(wide.abs().max()) / 448 * 2**-10)
    assert bool(((rounded - wide).abs() <= step * 1.0001).all())
    assert torch.equal(fake_quantize(torch.zeros(1, 4), [], scheme="fp8:token:dynamic"), torch.zeros(1, 4))


@pytest.mark.parametrize("weight", ["fp8:channel", "fp8:g16", "int4:g16:asym"])
def test_floats_of_8_bits_give_what_floats_give(weight: str) -> None:
    x, w, kind = random(3, 64), random(24, 64), Scheme.parse(weight)
    q = float8_weight(w, kind) if kind.code == "fp" else QTensor.quantize(w, kind)
    if kind.code == "fp":
        assert float((q.dequantize() - w).norm() / w.norm()) < 0.03
        assert len(q.unpacked().unique()) > 60  # and not the few that evenly spaced ones would need
    found = integer_linear(x, list(q.parts().values()), [], spec=q.spec(), scheme="fp8:token:dynamic")
    expected = F.linear(fake_quantize(x, [], scheme="fp8:token:dynamic"), q.dequantize())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_weights_have_floats_of_8_bits_or_none() -> None:
    with pytest.raises(RecipeError, match="floats are stored as fp8:channel or fp8:g<size>"):
        float8_weight(torch.ones(2, 4), Scheme.parse("fp4:channel"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int8:tensor:dynamic", "make a token depend on its neighbours"),
        ("int8:token", "can only be dynamic"),
        ("fp4:g32", "int2 to int8, fp8 or nf4"),
        ("fp8:token:asym:dynamic", "write fp8:token:dynamic"),
        ("fp8:tensor", "write fp8:token:dynamic"),
        ("nf4:g32", "write nf4:token:dynamic"),
    ],
)
def test_schemes_that_make_no_sense(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        activation_scheme(text)


ACTIVATIONS = (
    *("int8:token:asym:dynamic", "int8:g16:asym:dynamic", "int4:g32:sym:dynamic"),
    *("int8:tensor:asym", "int8:g16:asym"),
)


@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([32, 64, 96]),
    weight=st.sampled_from(["int4:g16:asym", "int4:g32:sym", "int8:channel:sym", "int3:g32:asym", "int8:tensor:asym"]),
    activation=st.sampled_from(
        [
            "int8:token:asym:dynamic",
            "int8:g16:asym:dynamic",
            "int4:g32:sym:dynamic",
            "int8:tensor:asym",
            "int8:g16:asym",
        ]
    ),
    biased=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_integers_give_what_floats_give(rows: int, columns: int, weight: str, activation: str, biased: bool) -> None:
    x, w = random(rows, 3, columns, seed=columns), random(24, columns, seed=rows)
    bias = random(24, seed=3) if biased else None
    q, grid = QTensor.quantize(w, Scheme.parse(weight)), static(x, activation)
    assert run_length(Scheme.parse(weight), Scheme.parse(activation), columns)
    parts = list(q.parts().values())
    found = integer_linear(x, parts, grid, bias, spec=q.spec(), scheme=activation)
    expected = F.linear(fake_quantize(x, grid, scheme=activation).double(), q.dequantize().double())
    expected = expected if bias is None else expected + bias
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, qc.integer_linear(x, parts, grid, bias, spec=q.spec(), scheme=activation))


def static(x: Tensor, scheme: str) -> list[Tensor]:
    """A grid for x, if the scheme wants one."""
    kind = Scheme.parse(scheme)
    if kind.dynamic:
        return []
    groups = 1 if kind.granularity == "tensor" else kind.groups(x.shape[-1])
    step = (x.max() - x.min()) / (kind.levels - 1)
    return [step.expand(groups).clone(), (-x.min() / step).round().expand(groups).to(torch.uint8).clone()]


def test_sums_are_exact_where_float32_would_round() -> None:
    """Products of 8-bit codes over 4096 columns pass 2^24: a float32 sum would lose the last ones."""
    x, w = torch.full((1, 4096), 1.0), torch.full((1, 4096), 1.0)
    x[0, 0], w[0, 1] = -1.0, 0.99
    q = QTensor.quantize(w, Scheme.parse("int8:channel:asym"))
    parts = list(q.parts().values())
    found = integer_linear(x, parts, [], spec=q.spec(), scheme="int8:token:asym:dynamic")
    exact = fake_quantize(x, [], scheme="int8:token:asym:dynamic").double() @ q.dequantize().double().T
    assert abs(float(found) / float(exact) - 1) < 2e-7


def test_groups_that_do_not_nest_have_no_runs() -> None:
    assert run_length(Scheme.parse("int4:g48"), Scheme.parse("int8:g32"), 96) == 0
    assert run_length(Scheme.parse("int4:g64"), Scheme.parse("int8:g16"), 128) == 16
