"""linear_wq against its meaning, qc.linear: every width, group, ragged shapes, split sums; and packing, inverted."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from qcompiler.errors import No
from qcompiler.kernels.cost import H200
from qcompiler.kernels.dequantize_wq import dequantize_wq, linear_decoded
from qcompiler.kernels.linear_wq import ACCEPTS, configure, cost, linear_wq
from qcompiler.kernels.packed_weight import PackedWeight
from qcompiler.kernels.split import Config
from qcompiler.ops import qc
from qcompiler.scheme import QTensor, Scheme
from tests import interpreter

SCHEMES = st.builds(
    "int{}:{}:{}".format,
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(["g32", "g64", "g128", "g256", "channel"]),
    st.sampled_from(["sym", "asym"]),
)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True, scope="module")
def patched() -> None:
    interpreter.install()


def weight_of(scheme: str, n: int, k: int, seed: int = 0) -> QTensor:
    """A random weight whose rows differ in size."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=random) * torch.rand(n, 1, generator=random).mul(4).exp()
    return QTensor.quantize(rows * 0.01 + 0.002, Scheme.parse(scheme))


def assert_close(out: Tensor, x: Tensor, weight: QTensor, bias: Tensor | None = None) -> None:
    """As near to exact arithmetic as weights rounded to the dtype of x allow, element by element."""
    shift = None if bias is None else bias.double()
    exact = torch.nn.functional.linear(x.double(), weight.dequantize().double(), shift)
    assert isinstance(weight.scale, Tensor)
    largest = weight.scale.double().abs().amax(1) * weight.scheme.levels  # of a product's two terms
    eps = torch.finfo(x.dtype).eps
    bound = eps * (x.double().abs().sum(-1, keepdim=True) * largest + exact.abs()) + 1e-7
    assert bool(((out - exact).abs() <= bound).all())


@settings(max_examples=25, deadline=None)
@given(SCHEMES, st.integers(1, 300), st.integers(1, 700), DTYPES)
def test_packing_is_inverted(scheme: str, n: int, k: int, dtype: torch.dtype) -> None:
    weight = weight_of(scheme, n, k)
    again = PackedWeight.pack(weight, dtype).unpack()
    assert torch.equal(again.codes, weight.codes)
    assert (again.zero is None) == (weight.zero is None)
    if weight.zero is not None:
        assert torch.equal(again.zero, weight.zero)
    assert isinstance(again.scale, Tensor)
    assert isinstance(weight.scale, Tensor)
    torch.testing.assert_close(again.scale, weight.scale.float(), rtol=torch.finfo(dtype).eps / 2, atol=0)
    if dtype == torch.float16 and weight.scale.dtype == torch.float16:
        assert torch.equal(again.scale, weight.scale.float())


@settings(max_examples=25, deadline=None)
@given(SCHEMES, st.integers(1, 20), st.integers(1, 140), st.integers(1, 600), DTYPES, st.booleans())
def test_against_the_meaning(scheme: str, tokens: int, n: int, k: int, dtype: torch.dtype, biased: bool) -> None:
    weight = weight_of(scheme, n, k)
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, k, generator=random).to(dtype)
    bias = torch.randn(n, generator=random).to(dtype) if biased else None
    packed = PackedWeight.pack(weight, dtype)
    assert_close(linear_wq(x, packed, bias), x, weight, bias)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_minima_in_place_of_zero_points(bits: int, dtype: torch.dtype) -> None:
    """As GGUF's blocks of type _1 have them."""
    weight = weight_of(f"int{bits}:g32:asym", 130, 300)
    assert isinstance(weight.scale, Tensor)
    assert weight.zero is not None
    weight = weight.with_parts(minimum=-weight.scale.float() * weight.zero.float(), zero=None)
    packed = PackedWeight.pack(weight, dtype)
    again = packed.unpack()
    assert torch.equal(again.codes, weight.codes)
    torch.testing.assert_close(again.minimum, weight.minimum, rtol=torch.finfo(dtype).eps, atol=0)
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_close(linear_wq(x, packed), x, weight)
    assert_close(linear_decoded(x, packed), x, weight)


@settings(max_examples=15, deadline=None)
@given(SCHEMES, st.integers(1, 300), st.integers(1, 600), DTYPES)
def test_decoding_gives_the_weight(scheme: str, n: int, k: int, dtype: torch.dtype) -> None:
    weight = weight_of(scheme, n, k)
    packed = PackedWeight.pack(weight, dtype)
    assert isinstance(weight.scale, Tensor)
    largest = weight.scale.float().abs().amax(1, keepdim=True) * weight.scheme.levels
    apart = (dequantize_wq(packed).float() - weight.dequantize()).abs()
    assert bool((apart <= torch.finfo(dtype).eps * largest).all())


def test_a_decoded_product_is_the_fused_one() -> None:
    weight = weight_of("int4:g128:asym", 128, 256)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(0)).half()
    assert_close(linear_decoded(x, PackedWeight.pack(weight)), x, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_errs_no_more_than_the_meaning(bits: int, dtype: torch.dtype) -> None:
    weight = weight_of(f"int{bits}:g128:asym", 128, 512)
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = torch.nn.functional.linear(x.double(), weight.dequantize().double())
    meaning = qc.linear(x, list(weight.parts().values()), spec=weight.spec())
    error = (linear_wq(x, PackedWeight.pack(weight, dtype)) - exact).norm() / (meaning - exact).norm()
    assert error <= (1.5 if bits == 8 else 3.0)


@pytest.mark.parametrize("tokens", [1, 8, 16, 17, 33, 64, 65, 130])
def test_any_number_of_tokens(tokens: int) -> None:
    weight = weight_of("int4:g128:asym", 128, 256)
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(0)).half()
    assert_close(linear_wq(x, PackedWeight.pack(weight)), x, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_whole_numbers_are_exact(bits: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(bits)
    weight = weight_of(f"int{bits}:g32:asym", 130, 288)
    scale = torch.tensor([0.25, 0.5, 1.0])[torch.randint(3, (130, 9), generator=random)]
    weight = weight.with_parts(scale=scale)
    x = torch.randint(-4, 5, (3, 288), generator=random).to(dtype)
    exact = torch.nn.functional.linear(x.double(), weight.dequantize().double()).to(dtype)
    assert torch.equal(linear_wq(x, PackedWeight.pack(weight, dtype)), exact)


@pytest.mark.parametrize("split", [2, 3, 5])
def test_a_split_sum_is_the_same_every_time(split: int) -> None:
    weight = weight_of("int4:g64:asym", 200, 1280)
    x = torch.randn(5, 1280, generator=torch.Generator().manual_seed(0)).half()
    packed = PackedWeight.pack(weight, columns=128)
    first, second = (linear_wq(x, packed, config=Config(8, split)) for _ in range(2))
    assert torch.equal(first, second)
    assert not packed.arrived.any()
    assert_close(first, x, weight)


def test_act_order_is_kept_beside_the_weight() -> None:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)).int()
    weight = weight_of("int4:g32:sym", 64, 256).with_parts(permutation=order)
    packed = PackedWeight.pack(weight)
    assert packed.permutation is order
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).half()
    assert_close(linear_wq(x[:, order], packed), x, weight)


def test_what_is_accepted() -> None:
    assert str(ACCEPTS).startswith("integer_codes() & bits(2, 3, 4, 8) & channel_or_group(32, 64, 128, 256) & matrix()")
    assert ACCEPTS(weight_of("int4:g128", 8, 256))
    assert ACCEPTS(weight_of("int8:channel", 8, 100))
    assert ACCEPTS(weight_of("int5:g32", 8, 64)) == No("5 bits, not one of [2, 3, 4, 8]")
    assert ACCEPTS(weight_of("int4:g48", 8, 96)) == No("groups of 48, not one of [32, 64, 128, 256]")
    nested = weight_of("int4:g32", 8, 64)
    nested = nested.with_parts(scale=QTensor.quantize(torch.rand(8, 2), Scheme.parse("int8:channel")))
    assert ACCEPTS(nested) == No("the scales are quantized themselves")
    assert ACCEPTS(QTensor.quantize(torch.randn(8, 4, 4), Scheme.parse("int4:channel"))) == No("3 axes, not 2")


def test_small_layers_are_split_and_large_ones_not() -> None:
    assert configure(4096, 4096, 256, bits=4, tokens=1).split == 4
    assert configure(65536, 4096, 256, bits=4, tokens=1).split == 1
    assert configure(4096, 4096, 256, bits=4, tokens=100).tokens == 128
    uneven = configure(128, 11008, 256, bits=4, tokens=1).split
    steps = 43
    assert (uneven - 1) * -(-steps // uneven) < steps, "the last part has nothing to do"


def test_cost_is_that_of_reading_the_weight() -> None:
    packed = PackedWeight.pack(weight_of("int4:g128", 512, 4096))
    found = cost(packed, 1)
    assert found.operations == 2 * 512 * 4096
    assert 0.5 < packed.nbytes / (512 * 4096) < 0.54
    assert found.seconds(H200) > H200.launch
