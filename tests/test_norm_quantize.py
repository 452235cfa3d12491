"""norm_quantize against its meaning: qc.reordered_norm, and the codes of what it gives."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from qcompiler.kernels.norm_quantize import NormQuantize
from qcompiler.kernels.packed_integers import sums_of
from qcompiler.ops import qc
from qcompiler.rounding import activation_scheme, codes_of, group_size
from tests import interpreter

SCHEMES = ["int8:token:dynamic", "int8:token:asym:dynamic", "int4:token:asym:dynamic"]
SCHEMES += ["int8:g32", "int8:g32:asym", "int4:g32:asym", "int8:tensor", "int8:channel:asym"]


@pytest.fixture(autouse=True, scope="module")
def patched() -> None:
    interpreter.install()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SCHEMES),
    st.sampled_from(["rms", "layer"]),
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
)
def test_against_the_meaning(
    scheme: str, kind: str, tokens: int, width: int, dtype: torch.dtype, reordered: bool, adds: bool
) -> None:
    random = torch.Generator().manual_seed(width)
    x, residual = (torch.randn(2, tokens, width, generator=random) * 3 + 0.5).to(dtype)
    weight = torch.rand(width, generator=random).add(0.5).to(dtype)
    bias = torch.randn(width, generator=random).to(dtype) if kind == "layer" else None
    order = torch.randperm(width, generator=random) if reordered else None
    how = activation_scheme(scheme)
    groups = -(-width // group_size(how, width))
    grid = () if how.dynamic else (torch.rand(groups, generator=random) * 0.1 + 0.01,)
    if grid and not how.symmetric:
        grid += (torch.randint(how.levels, (groups,), generator=random).float(),)

    norm = NormQuantize.pack(weight, bias, order, grid, kind=kind, eps=1e-5, scheme=scheme)
    found = norm(x, residual if adds else None)

    added = x + residual if adds else x
    stored = torch.arange(width) if order is None else order
    normed = qc.reordered_norm(added, weight, bias, stored, kind=kind, eps=1e-5)
    codes, scale, zero = codes_of(normed, grid, how)
    apart = (found.codes.float() + how.levels // 2 - codes.flatten(-2)[..., :width]).abs()
    assert apart.max() <= 1  # where the sums' last bits decide
    assert (apart > 0).float().mean() <= 0.05 or (apart > 0).sum() <= 2
    if adds:
        assert found.added is not None
        assert torch.equal(found.added, added)
    if how.dynamic:
        assert found.scale is not None
        torch.testing.assert_close(found.scale, scale.flatten(), rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=0)
    if how.dynamic and not how.symmetric:
        assert found.zero is not None
        assert (found.zero + how.levels // 2 - zero.flatten()).abs().max() <= 1


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 200), st.sampled_from([0, 32, 256]))
def test_floats_of_8_bits_and_their_sums(tokens: int, width: int, run: int) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(width))
    weight, scheme = torch.rand(width, generator=torch.Generator().manual_seed(run)) + 0.5, "fp8:token:dynamic"
    found = NormQuantize.pack(weight, None, None, (), kind="rms", eps=1e-5, scheme=scheme, run=run)(x)
    normed = torch.nn.functional.rms_norm(x, (width,), weight, 1e-5)
    codes, scale, _ = codes_of(normed, [], activation_scheme(scheme))
    assert found.codes.dtype == torch.float8_e4m3fn
    assert found.scale is not None
    torch.testing.assert_close(found.scale, scale.flatten(), rtol=1e-5, atol=0)
    apart = (found.codes.float() != codes.flatten(-2)).float()
    assert apart.mean() <= 0.02 or apart.sum() <= 1  # where the sums' last bits decide
    torch.testing.assert_close(found.codes.float(), codes.flatten(-2), rtol=0.126, atol=2.0**-9)
    if run:
        assert found.sums is not None
        torch.testing.assert_close(found.sums, sums_of(found.codes, run), rtol=1e-5, atol=1e-3)


def test_ties_and_far_values_are_rounded_as_pytorch_rounds() -> None:
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    weight = torch.tensor([0.5, 1.5, 2.5, 1e9])
    norm = NormQuantize.pack(weight, None, None, (torch.ones(1),), kind="rms", eps=0.0, scheme="int8:tensor")
    assert norm(x).codes.tolist() == [[0, -2, 2, -128]]


def test_cost_is_that_of_reading_and_writing() -> None:
    weight = torch.ones(4096)
    norm = NormQuantize.pack(weight, None, None, (torch.ones(1),), kind="rms", eps=0.0, scheme="int8:tensor")
    assert norm.cost(2).moved == 2 * 4096 * 3
    assert norm.cost(2, residual=True).moved == 2 * 4096 * 7
