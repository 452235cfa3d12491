"""linear_float8 against qc.integer_linear over fp8: runs of any length, split sums; and packing, inverted."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from qcompiler.errors import No
from qcompiler.kernels.cost import A100, H200
from qcompiler.kernels.linear_float8 import W4F8, W8F8, configure, cost, linear_float8, runs_on
from qcompiler.kernels.packed_float8 import PackedFloat8
from qcompiler.kernels.quantize import quantize
from qcompiler.kernels.split import Config
from qcompiler.ops import qc
from qcompiler.rounding import float8_weight
from qcompiler.scheme import QTensor, Scheme
from tests import interpreter

FP8 = "fp8:token:dynamic"
SIZES = st.sampled_from(["g32", "g64", "g128", "channel"])
WEIGHTS = SIZES.map("fp8:{}".format) | st.builds("int4:{}:{}".format, SIZES, st.sampled_from(["sym", "asym"]))


@pytest.fixture(autouse=True, scope="module")
def patched() -> None:
    interpreter.install()


def weight_of(scheme: str, n: int, k: int) -> QTensor:
    rows, kind = torch.randn(n, k, generator=torch.Generator().manual_seed(n)) + 0.2, Scheme.parse(scheme)
    return float8_weight(rows, kind) if kind.code == "fp" else QTensor.quantize(rows, kind)


def assert_close(weight: QTensor, tokens: int, dtype: torch.dtype, config: Config | None = None) -> None:
    """As near to the meaning, which adds up exactly, as adding up in float32 is."""
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, weight.columns, generator=random).to(dtype)
    bias = torch.randn(weight.shape[0], generator=random).to(dtype)
    meaning = qc.integer_linear(x, list(weight.parts().values()), [], bias, spec=weight.spec(), scheme=FP8)
    packed = PackedFloat8.pack(weight, FP8)
    made = quantize(x, [], FP8, packed.counted)
    assert made.scale is not None
    found = linear_float8(made.codes, packed, [made.scale], bias, dtype, config, made.sums)
    largest = (x.float().abs() @ weight.dequantize().abs().T).clamp(min=1.0)
    eps = max(torch.finfo(dtype).eps, 1e-5)
    assert bool(((found - meaning).float().abs() <= eps * largest).all())
    assert torch.equal(linear_float8(made.codes, packed, [made.scale], bias, dtype, config), found)  # counts by itself
    assert not packed.arrived.any()


@settings(max_examples=30, deadline=None)
@given(WEIGHTS, st.integers(1, 20), st.integers(1, 200), st.integers(1, 500))
def test_against_the_meaning(scheme: str, tokens: int, n: int, k: int) -> None:
    assert_close(weight_of(scheme, n, k), tokens, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 70, 130])
def test_any_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    assert_close(weight_of("int4:g128:asym", 128, 256), tokens, dtype)


@pytest.mark.parametrize("scheme", ["fp8:channel", "int4:channel", "int4:g64:asym"])
def test_a_split_sum_is_the_same_sum(scheme: str) -> None:
    assert_close(weight_of(scheme, 200, 1000), 5, torch.float32, Config(8, 3))


def test_outliers_cost_less_than_evenly_spaced_codes() -> None:
    """What fp8 is for: one channel a thousand times the others leaves those others' bits."""
    weight, x = weight_of("fp8:channel", 128, 128), torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1000
    exact = x @ weight.dequantize().T

    def error(rounded: Tensor) -> float:
        apart = (rounded - x)[:, 1:] @ weight.dequantize()[:, 1:].T
        return float(apart.norm() / exact.norm())

    by_fp8, by_int8 = (qc.fake_quantize(x, [], scheme=s) for s in (FP8, "int8:token:dynamic"))
    assert error(by_fp8) < 0.2 * error(by_int8)


@settings(max_examples=20, deadline=None)
@given(WEIGHTS, st.integers(1, 300), st.integers(1, 600))
def test_packing_is_inverted(scheme: str, n: int, k: int) -> None:
    weight = weight_of(scheme, n, k)
    assert torch.equal(PackedFloat8.pack(weight, FP8).unpack(), weight.unpacked())


def test_what_is_accepted() -> None:
    assert W4F8.accepts(weight_of("int4:g64:asym", 8, 128))
    assert W8F8.accepts(weight_of("fp8:channel", 8, 100))
    assert W8F8.accepts(weight_of("int8:channel", 8, 100)) == No("int8 codes, not fp8")
    assert W4F8.accepts(weight_of("fp8:channel", 8, 100)) == No("8 bits, not one of [4]")
    assert runs_on(H200)
    assert runs_on(A100) == No("products of fp8 need compute capability 8.9, and this GPU has 8.0")


def test_all_sums_can_be_split() -> None:
    assert configure(4096, 32, grouped=True, tokens=1).split > 1


def test_cost_counts_a_byte_for_each_code() -> None:
    assert cost(PackedFloat8.pack(weight_of("fp8:channel", 128, 1024), FP8), 1).moved >= 128 * 1024
