"""linear_nf4 against its meaning, qc.linear: codebooks, groups, ragged shapes, quantized scales; packing, inverted."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from qcompiler.bits import pack_bits
from qcompiler.errors import No
from qcompiler.kernels.codebook import Tables
from qcompiler.kernels.cost import H200
from qcompiler.kernels.linear_nf4 import ACCEPTS, PackedCodebook, cost, linear_nf4
from qcompiler.kernels.split import Config
from qcompiler.ops import qc
from qcompiler.rounding import NF4
from qcompiler.scheme import QTensor, Scheme, by_group
from tests import interpreter

BOOKS = {
    "nf4": NF4,
    "fp4": tuple(sign * v / 12 for sign in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)),  # bitsandbytes
    "iq4": tuple(v / 127 for v in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),  # GGUF
}
GROUPS = st.sampled_from(["g32", "g64", "g128", "g1024", "channel"])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True, scope="module")
def patched() -> None:
    interpreter.install()


def weight_of(group: str, n: int, k: int, book: str = "nf4") -> QTensor:
    """A random weight whose rows differ in size, each value the nearest entry of the codebook."""
    random = torch.Generator().manual_seed(n)
    rows = torch.randn(n, k, generator=random) * torch.rand(n, 1, generator=random).mul(4).exp() * 0.01
    scheme, codebook = Scheme.parse(f"nf4:{group}:sym"), torch.tensor(BOOKS[book])
    groups = by_group(rows, scheme.group_of(k))
    scale = groups.abs().amax(-1)
    codes = (groups / scale[..., None]).unsqueeze(-1).sub(codebook).abs().argmin(-1).flatten(1)[:, :k]
    return QTensor(scheme, (n, k), pack_bits(codes.to(torch.uint8), 4), scale, codebook=codebook)


def doubly(weight: QTensor, group: int = 256) -> QTensor:
    """The same weight, its scales quantized as bitsandbytes does: less their mean, a table of 256, a scale for each."""
    assert isinstance(weight.scale, Tensor)
    apart = weight.scale - weight.scale.mean()
    scheme = Scheme.parse(f"fp8:g{group}:sym")
    groups = by_group(apart, scheme.group_of(apart.shape[1]))
    largest = groups.abs().amax(-1).clamp(min=1e-9)
    table = torch.linspace(-1, 1, 256).pow(3)
    codes = (groups / largest[..., None]).unsqueeze(-1).sub(table).abs().argmin(-1).flatten(1)[:, : apart.shape[1]]
    offset = weight.scale.mean().expand_as(largest).contiguous()
    codes = pack_bits(codes.to(torch.uint8), 8)
    return weight.with_parts(scale=QTensor(scheme, tuple(apart.shape), codes, largest, None, offset, table))


def assert_close(out: Tensor, x: Tensor, weight: QTensor, bias: Tensor | None = None) -> None:
    """As near to exact arithmetic as entries, scales and their products, each rounded to the dtype of x, allow."""
    shift = None if bias is None else bias.double()
    values = weight.dequantize().double()
    exact = torch.nn.functional.linear(x.double(), values, shift)
    bound = torch.finfo(x.dtype).eps * (1.6 * x.double().abs() @ values.abs().T + exact.abs()) + 1e-7
    assert bool(((out - exact).abs() <= bound).all())


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_hold_every_entry(book: str, dtype: torch.dtype) -> None:
    codebook = torch.tensor(BOOKS[book])
    tables = Tables.of(codebook, dtype)
    assert isinstance(tables, Tables)
    torch.testing.assert_close(tables.unpack(dtype), codebook.double(), rtol=torch.finfo(dtype).eps * 0.51, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=16, max_size=16), DTYPES)
def test_tables_of_any_codebook(entries: list[float], dtype: torch.dtype) -> None:
    tables = Tables.of(torch.tensor(entries), dtype)
    if isinstance(tables, No):
        assert tables == No("a codebook whose signs do not go in pairs")
        return
    assert sorted(tables.places.tolist()) == list(range(16))
    error = (tables.unpack(dtype) - torch.tensor(entries).double()).abs()
    assert float(error.max()) <= torch.finfo(dtype).eps * max(map(abs, entries))


@settings(max_examples=20, deadline=None)
@given(GROUPS, st.sampled_from(list(BOOKS)), st.integers(1, 300), st.integers(1, 700), DTYPES)
def test_packing_is_inverted(group: str, book: str, n: int, k: int, dtype: torch.dtype) -> None:
    weight = weight_of(group, n, k, book)
    again = PackedCodebook.pack(weight, dtype).unpack()
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.codebook, weight.codebook)
    torch.testing.assert_close(again.scale, weight.scale, rtol=torch.finfo(dtype).eps / 2, atol=0)


@settings(max_examples=20, deadline=None)
@given(
    GROUPS,
    st.sampled_from(list(BOOKS)),
    st.integers(1, 20),
    st.integers(1, 140),
    st.integers(1, 600),
    DTYPES,
    st.booleans(),
)
def test_against_the_meaning(
    group: str, book: str, tokens: int, n: int, k: int, dtype: torch.dtype, biased: bool
) -> None:
    weight = weight_of(group, n, k, book)
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, k, generator=random).to(dtype)
    bias = torch.randn(n, generator=random).to(dtype) if biased else None
    assert_close(linear_nf4(x, PackedCodebook.pack(weight, dtype), bias), x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_errs_no_more_than_the_meaning(dtype: torch.dtype) -> None:
    weight = weight_of("g64", 128, 512)
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = torch.nn.functional.linear(x.double(), weight.dequantize().double())
    meaning = qc.linear(x, list(weight.parts().values()), spec=weight.spec())
    error = (linear_nf4(x, PackedCodebook.pack(weight, dtype)) - exact).norm() / (meaning - exact).norm()
    assert error <= 1.6


@pytest.mark.parametrize("k", [512, 4096])
def test_scales_that_are_quantized_themselves(k: int) -> None:
    weight = doubly(weight_of("g64", 130, k), 8)
    assert isinstance(weight.scale, QTensor)
    assert ACCEPTS(weight)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0)).half()
    packed = PackedCodebook.pack(weight)
    assert_close(linear_nf4(x, packed), x, weight)
    torch.testing.assert_close(packed.unpack().scale, weight.scale.dequantize(), rtol=2**-11, atol=0)


@pytest.mark.parametrize("tokens", [33, 64, 130])
def test_any_number_of_tokens(tokens: int) -> None:
    weight = weight_of("g64", 128, 256)
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(0)).half()
    assert_close(linear_nf4(x, PackedCodebook.pack(weight)), x, weight)


def test_a_split_sum_is_the_same_every_time() -> None:
    weight = weight_of("g64", 200, 1280)
    x = torch.randn(5, 1280, generator=torch.Generator().manual_seed(0)).half()
    packed = PackedCodebook.pack(weight, columns=128)
    first, second = (linear_nf4(x, packed, config=Config(8, 3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not packed.arrived.any()
    assert_close(first, x, weight)


def test_act_order_is_kept_beside_the_weight() -> None:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)).int()
    weight = weight_of("g64", 64, 256).with_parts(permutation=order)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).half()
    assert_close(linear_nf4(x[:, order], PackedCodebook.pack(weight)), x, weight)


def test_what_is_accepted() -> None:
    assert str(ACCEPTS).startswith("bits(4) & codebook() & channel_or_group(32, 64, 128, 256, 512, 1024, 2048, 4096)")
    weight = weight_of("g64", 8, 128)
    assert ACCEPTS(weight)
    assert ACCEPTS(weight.with_parts(codebook=None)) == No("has no codebook")
    assert ACCEPTS(weight.with_parts(codebook=torch.ones(8))) == No("a codebook of 8 entries, not 16")
    lonely = torch.tensor([-1.0] + [0.5] * 15)
    assert ACCEPTS(weight.with_parts(codebook=lonely)) == No("a codebook whose signs do not go in pairs")
    assert ACCEPTS(weight_of("g48", 8, 96)) == No("groups of 48, not one of [32, 64, 128, 256, 512, 1024, 2048, 4096]")


def test_cost_is_that_of_reading_the_weight() -> None:
    packed = PackedCodebook.pack(weight_of("g64", 512, 4096))
    assert packed.nbytes == 512 * 4096 // 2 + 512 * 64 * 2 + 512 * 4
    assert cost(packed, 1).seconds(H200) > H200.launch
