"""linear_a8 gives qc.integer_linear to the last bit: static and dynamic activations, runs of any length, split sums."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from qcompiler.errors import No
from qcompiler.kernels.linear_a8 import W4A8, W8A8, configure, cost, linear_a8
from qcompiler.kernels.packed_integers import PackedIntegers, runs_suit
from qcompiler.kernels.split import Config
from qcompiler.ops import qc
from qcompiler.rounding import activation_scheme, codes_of, group_size
from qcompiler.scheme import QTensor, Scheme
from tests import interpreter

WEIGHTS = st.builds(
    "int{}:{}:{}".format,
    st.sampled_from([4, 8]),
    st.sampled_from(["g32", "g64", "g128", "channel"]),
    st.sampled_from(["sym", "asym"]),
)
STATIC = ["int8:tensor", "int8:tensor:asym", "int8:g32:asym", "int8:g64", "int8:g128:asym", "int4:g32:asym"]
ACTIVATIONS = st.sampled_from([*STATIC, "int8:token:dynamic", "int8:token:asym:dynamic", "int4:token:asym:dynamic"])


@pytest.fixture(autouse=True, scope="module")
def patched() -> None:
    interpreter.install()


def weight_of(scheme: str, n: int, k: int) -> QTensor:
    rows = torch.randn(n, k, generator=torch.Generator().manual_seed(n)) + 0.5
    return QTensor.quantize(rows, Scheme.parse(scheme))


def activation_of(x: Tensor, scheme: str) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
    """Stored codes of x, the grid of a static scheme, and what a dynamic one says of each token."""
    kind, k = activation_scheme(scheme), x.shape[-1]
    grid: list[Tensor] = []
    if not kind.dynamic:
        groups = -(-k // group_size(kind, k))
        random = torch.Generator().manual_seed(k)
        grid = [torch.rand(groups, generator=random) * 8 / kind.levels + 0.001]
        if not kind.symmetric:
            grid.append(torch.randint(kind.levels, (groups,), generator=random).float())
    codes, scale, zero = codes_of(x, grid, kind)
    stored = (codes - (kind.levels >> 1)).flatten(-2)[..., :k].to(torch.int8)
    if not kind.dynamic:
        return stored, grid, ()
    token = [scale.flatten(), *([] if kind.symmetric else [zero.flatten() - (kind.levels >> 1)])]
    return stored, grid, tuple(token)


def assert_equal(
    weight: QTensor, activation: str, tokens: int, dtype: torch.dtype, config: Config | None = None
) -> None:
    """The kernel's bits are the meaning's."""
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, weight.columns, generator=random).to(dtype)
    bias = torch.randn(weight.shape[0], generator=random).to(dtype)
    codes, grid, token = activation_of(x, activation)
    parts = list(weight.parts().values())
    meaning = qc.integer_linear(x, parts, grid, bias, spec=weight.spec(), scheme=activation)
    packed = PackedIntegers.pack(weight, activation, grid)
    found = linear_a8(codes, packed, token, bias, dtype, config)
    assert torch.equal(found, meaning)
    assert not packed.arrived.any()


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, ACTIVATIONS, st.integers(1, 20), st.integers(1, 200), st.integers(1, 500))
def test_to_the_last_bit(scheme: str, activation: str, tokens: int, n: int, k: int) -> None:
    weight = weight_of(scheme, n, k)
    if runs_suit(weight, activation):
        assert_equal(weight, activation, tokens, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 33, 70, 130])
def test_any_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    assert_equal(weight_of("int4:g128", 128, 256), "int8:token:asym:dynamic", tokens, dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_a_split_sum_is_the_same_sum(bits: int, kind: str) -> None:
    weight = weight_of(f"int{bits}:channel:{kind}", 200, 1000)
    assert_equal(weight, "int8:token:asym:dynamic", 5, torch.float32, Config(8, 3))


@settings(max_examples=20, deadline=None)
@given(WEIGHTS, st.integers(1, 300), st.integers(1, 600))
def test_packing_is_inverted(scheme: str, n: int, k: int) -> None:
    weight = weight_of(scheme, n, k)
    assert torch.equal(PackedIntegers.pack(weight, "int8:token:dynamic").unpack(), weight.unpacked())


def test_the_largest_sums_are_exact() -> None:
    ones = QTensor.encode(torch.full((128, 256), -128.0), Scheme.parse("int8:g128"), torch.ones(128, 2), None)
    x = torch.full((1, 256), 127.0)
    grid = [torch.ones(2), torch.zeros(2)]
    codes, scale, zero = codes_of(x + 128, grid, activation_scheme("int8:g128:asym"))
    assert codes.unique().tolist() == [255.0]
    stored = (codes - 128).flatten(-2).to(torch.int8)
    found = linear_a8(stored, PackedIntegers.pack(ones, "int8:g128:asym", grid), dtype=torch.float32)
    assert found.unique().tolist() == [-255.0 * 128 * 256]
    assert scale.unique().tolist() == [1.0]
    assert zero.unique().tolist() == [0.0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("scheme", ["g128", "channel"])
def test_the_largest_sums_with_zero_points_are_exact(bits: int, low: bool, scheme: str) -> None:
    """All codes at one end, both zero points at the other: every intermediate sum is as large as it can be."""
    top = (1 << bits) - 1
    kind = Scheme.parse(f"int{bits}:{scheme}:asym")
    zero = torch.full((128, kind.groups(256)), top if low else 0, dtype=torch.uint8)
    values = torch.full((128, 256), float(-top if low else top))
    weight = QTensor.encode(values, kind, torch.ones(zero.shape), zero)
    for point in (0.0, 255.0):
        x = torch.full((1, 256), 255.0 if point == 0 else -255.0)
        activation = "int8:g128:asym" if scheme == "g128" else "int8:tensor:asym"
        grid = [torch.ones(kind.groups(256)), torch.full((kind.groups(256),), point)]
        codes, _, _ = codes_of(x, grid, activation_scheme(activation))
        stored = (codes - 128).flatten(-2).to(torch.int8)
        found = linear_a8(stored, PackedIntegers.pack(weight, activation, grid), dtype=torch.float32)
        assert found.unique().tolist() == [x[0, 0].item() * values[0, 0].item() * 256]


def test_what_is_accepted() -> None:
    assert W4A8.accepts(weight_of("int4:g64", 8, 128))
    assert W8A8.accepts(weight_of("int8:channel", 8, 100))
    assert W8A8.accepts(weight_of("int4:g64", 8, 128)) == No("4 bits, not one of [8]")
    assert W4A8.accepts(weight_of("int4:g64:asym", 8, 128))
    assert W8A8.accepts(weight_of("int8:channel", 1, 32769))
    assert W8A8.accepts(weight_of("int8:channel", 1, 65537)) == No("k=65537 is more than 65536")
    assert W8A8.accepts(weight_of("int8:channel:asym", 1, 32769)) == No("k=32769 is more than 32768")
    assert runs_suit(weight_of("int8:channel", 8, 128), "int8:channel") == No(
        "a weight int8:channel:sym and an activation int8:channel share scales over 1 columns"
    )


def test_single_runs_are_split_and_others_not() -> None:
    assert configure(4096, 32, grouped=False, tokens=1).split > 1
    assert configure(4096, 32, grouped=True, tokens=1).split == 1


def test_cost_counts_a_byte_for_each_code() -> None:
    packed = PackedIntegers.pack(weight_of("int8:channel", 128, 1024), "int8:token:dynamic")
    assert cost(packed, 1).moved >= 128 * 1024
