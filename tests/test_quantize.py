"""quantize gives the codes of the meaning, to the last bit, in one launch; and the sums of runs of them."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from qcompiler.kernels import quantize as module
from qcompiler.kernels.packed_integers import sums_of
from qcompiler.kernels.quantize import columns_of, cost, quantize
from qcompiler.rounding import activation_scheme, codes_of, group_size
from tests import interpreter

SCHEMES = ["int8:token:dynamic", "int8:token:asym:dynamic", "int4:token:asym:dynamic", "fp8:token:dynamic"]
SCHEMES += ["int8:g32", "int8:g32:asym", "int4:g32:asym", "int8:tensor", "int8:channel:asym"]


@pytest.fixture(autouse=True, scope="module")
def patched() -> None:
    interpreter.install()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SCHEMES),
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([0, 32, 128, 512]),
)
def test_to_the_last_bit(scheme: str, tokens: int, width: int, dtype: torch.dtype, run: int) -> None:
    random = torch.Generator().manual_seed(width)
    x = (torch.randn(tokens, width, generator=random) * 3 + 0.5).to(dtype)
    x[0] = 0.0
    kind = activation_scheme(scheme)
    groups = -(-width // group_size(kind, width))
    grid = [] if kind.dynamic else [torch.rand(groups, generator=random) * 0.1 + 0.01]
    if grid and not kind.symmetric:
        grid.append(torch.randint(kind.levels, (groups,), generator=random).float())

    found = quantize(x, grid, scheme, run)

    codes, scale, zero = codes_of(x, grid, kind)
    half = 0 if kind.code == "fp" else kind.levels >> 1
    assert torch.equal(found.codes.float(), codes.flatten(-2)[..., :width] - half)
    assert (found.scale is None) == (not kind.dynamic)
    if found.scale is not None:
        assert torch.equal(found.scale, scale.flatten())
    assert (found.zero is None) == (kind.symmetric or not kind.dynamic)
    if found.zero is not None:
        assert torch.equal(found.zero, zero.flatten() - half)
    assert (found.sums is None) == (not run)
    if found.sums is not None:
        torch.testing.assert_close(found.sums, sums_of(found.codes, run), rtol=1e-5, atol=1e-3)


def test_rows_that_are_cut_up_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grid = torch.randn(3, 300), [torch.rand(10) + 0.01, torch.arange(100, 110).float()]
    whole = quantize(x, grid, "int8:g32:asym", 32)
    monkeypatch.setattr(module, "columns_of", lambda *_: 64)
    cut = quantize(x, grid, "int8:g32:asym", 32)
    assert torch.equal(cut.codes, whole.codes)
    assert whole.sums is not None
    assert cut.sums is not None
    assert torch.equal(cut.sums, whole.sums)


def test_what_shares_a_grid_or_a_sum_is_not_cut_up() -> None:
    assert columns_of("int8:g128:asym", 14336, 128) == 4096
    assert columns_of("int8:token:dynamic", 14336, 128) == columns_of("int8:tensor", 14336, 14336) == 14336


def test_cost_is_that_of_reading_and_writing() -> None:
    assert cost(2, 4096).moved == 2 * 4096 * 3
