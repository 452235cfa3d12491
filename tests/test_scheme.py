"""Schemes as text, codes as bits, and QTensor against its definition written with plain loops."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.bits import pack_bits, unpack_bits
from qcompiler.errors import InputError, RecipeError
from qcompiler.scheme import QTensor, Scheme, storage_dtype

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 70))
GRIDS = st.builds(
    Scheme,
    bits=st.integers(2, 8),
    granularity=st.just("group"),
    group_size=st.integers(1, 80),
    symmetric=st.booleans(),
) | st.builds(
    Scheme,
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["tensor", "channel", "token"]),
    symmetric=st.booleans(),
    dynamic=st.booleans(),
)


def values(shape: tuple[int, ...], seed: int, kind: str = "normal") -> Tensor:
    """A weight of the kinds that break quantizers."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "zero":
            return torch.zeros(shape)
        case "constant":
            return torch.full(shape, -0.37)
        case "outlier":
            weight.view(-1)[0] = 1e4
        case "tiny":
            weight *= 1e-12
        case "huge":
            weight *= 1e20
        case "positive":
            weight = weight.abs() + 3
    return weight


KINDS = ("normal", "zero", "constant", "outlier", "tiny", "huge", "positive")


def value_at(q: QTensor, row: int, column: int) -> float:
    """The definition of one stored value, from the bytes of its row."""
    bits, first = q.scheme.bits, column * q.scheme.bits
    stream = int.from_bytes(bytes(q.codes[row].tolist()), "little")
    code = (stream >> first) & ((1 << bits) - 1)
    if q.boundaries is not None:
        group = sum(int(b) <= column for b in q.boundaries[1:].tolist())
    else:
        group = column // q.scheme.group_size if q.scheme.granularity == "group" else 0

    def pick(part: Any) -> float:
        whole = part.dequantize() if isinstance(part, QTensor) else part
        return float(whole[min(row, whole.shape[0] - 1), min(group, whole.shape[1] - 1)])

    scale = pick(q.scale)
    if q.codebook is not None:
        return float(q.codebook[code]) * scale
    if q.minimum is not None:
        return code * scale + pick(q.minimum)
    zero = pick(q.zero) if q.zero is not None else 1 << (bits - 1)
    return (code - zero) * scale


def by_definition(q: QTensor) -> Tensor:
    """The matrix a record stands for, value by value, in logical column order."""
    found = torch.empty(q.rows, q.columns, dtype=torch.float64)
    for row in range(q.rows):
        for column in range(q.columns):
            place = int(q.permutation[column]) if q.permutation is not None else column
            found[row, place] = value_at(q, row, column)
    return found


# -- Scheme --------------------------------------------------------------------------------------------------


@given(GRIDS)
def test_scheme_text_round_trip(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert str(Scheme.parse(f" {scheme} ")) == str(scheme)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("int4", "int4:channel:sym"),
        ("int4:g128", "int4:g128:sym"),
        ("int3:asym:g32", "int3:g32:asym"),
        ("int8:token:dynamic", "int8:token:sym:dynamic"),
        ("int8:tensor:static", "int8:tensor:sym"),
        ("nf4:g64", "nf4:g64:sym"),
    ],
)
def test_scheme_defaults(text: str, full: str) -> None:
    assert str(Scheme.parse(text)) == full


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", '"" is no code type; write for example int4'),
        ("four", '"four" is no code type'),
        ("int", '"int" is no code type'),
        ("int1", "a scheme has 2 to 8 bits, not 1"),
        ("int16:g32", "a scheme has 2 to 8 bits, not 16"),
        ("int4:g0", "a group size of 0 makes no sense"),
        ("int4:g-8", "a group size of -8 makes no sense"),
        ("int4:group", '"group" is not understood; parts are g<size>, tensor, channel'),
        ("int4:g1.5", '"g1.5" is not understood'),
        ("int4:", '"" is not understood'),
        ("int4:g32:odd", '"odd" is not understood'),
    ],
)
def test_bad_schemes_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as info:
        Scheme.parse(text)
    assert str(info.value).startswith(f'scheme "{text}": ')
    assert message in str(info.value)


def test_bad_fields() -> None:
    with pytest.raises(RecipeError, match='granularity "row" is none of tensor, channel, token, group'):
        Scheme(4, granularity="row")
    with pytest.raises(RecipeError, match="a group size of 32 makes no sense"):
        Scheme(4, granularity="channel", group_size=32)


@given(st.integers(1, 300), st.integers(1, 300))
def test_groups_cover_a_row(size: int, columns: int) -> None:
    scheme = Scheme(4, granularity="group", group_size=size)
    assert scheme.groups(columns) == math.ceil(columns / size)
    assert scheme.group_of(columns) == min(size, columns)
    assert Scheme(4).groups(columns) == 1


# -- bits ----------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), SHAPES, st.integers(0, 99))
def test_bits_are_one_stream_least_significant_first(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    stream = pack_bits(codes, bits)
    assert stream.shape == (shape[0], math.ceil(shape[1] * bits / 8))
    for row, packed in zip(codes.tolist(), stream.tolist(), strict=True):
        number = sum(code << (i * bits) for i, code in enumerate(row))
        assert int.from_bytes(bytes(packed), "little") == number
    assert torch.equal(unpack_bits(stream, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_of_no_rows(bits: int) -> None:
    none = torch.zeros(0, 5, dtype=torch.uint8)
    assert unpack_bits(pack_bits(none, bits), bits, 5).shape == (0, 5)


# -- quantizing ----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(GRIDS, SHAPES, st.integers(0, 99), st.sampled_from(KINDS))
def test_every_value_is_rounded_to_the_nearest_code(
    scheme: Scheme, shape: tuple[int, int], seed: int, kind: str
) -> None:
    weight = values(shape, seed, kind)
    q = QTensor.quantize(weight, scheme)
    stored = q.dequantize()
    assert stored.shape == weight.shape
    assert stored.dtype == weight.dtype
    assert torch.allclose(by_definition(q), stored.double(), rtol=1e-6, atol=0)
    assert q.codes.shape == (shape[0], math.ceil(shape[1] * scheme.bits / 8))
    groups = 1 if scheme.granularity == "tensor" else scheme.groups(shape[1])
    assert isinstance(q.scale, Tensor)
    assert q.scale.shape == ((1, 1) if scheme.granularity == "tensor" else (shape[0], groups))
    assert (q.zero is None) == scheme.symmetric
    # Half a step, a little more where the stored scale and the rounded zero point cut the range short.
    step = q.scale.float().repeat_interleave(scheme.group_of(shape[1]), 1)[:, : shape[1]]
    excess = (weight - stored).abs() / step - 0.5
    assert excess.max() <= (0.01 if scheme.symmetric else 0.51) + 5e-4 * scheme.levels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    if kind == "huge" and dtype == torch.float16:
        pytest.skip("does not fit")
    weight = values((3, 40), 0, kind).to(dtype)
    stored = QTensor.quantize(weight, Scheme.parse("int8:g16")).dequantize()
    assert stored.dtype == dtype
    assert bool(stored.isfinite().all())
    assert torch.allclose(stored, weight, atol=float(weight.abs().max()) / 100, rtol=0)


def test_zero_stays_zero_and_known_values() -> None:
    weight = torch.tensor([[-8.0, 0.0, 3.5, 7.0]])
    asymmetric = QTensor.quantize(weight, Scheme.parse("int4:asym"))
    assert asymmetric.dequantize().tolist() == [[-8.0, 0.0, 4.0, 7.0]]  # 3.5 is as near to 3: even codes win
    assert asymmetric.zero is not None
    assert asymmetric.zero.tolist() == [[8]]
    symmetric = QTensor.quantize(weight, Scheme.parse("int4"))
    assert symmetric.unpacked().tolist() == [[0, 8, 11, 15]]  # the step is 16/15
    assert float(symmetric.scale[0, 0]) == pytest.approx(16 / 15, rel=1e-3)  # type: ignore[index]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(-4, 3), st.integers(0, 9))
def test_any_axis(shape: list[int], axis: int, seed: int) -> None:
    axis = max(-len(shape), min(axis, len(shape) - 1))
    weight = values(tuple(shape), seed)
    q = QTensor.quantize(weight, Scheme.parse("int6:g2:asym"), axis=axis)
    moved = QTensor.quantize(weight.movedim(axis, -1), Scheme.parse("int6:g2:asym"))
    assert torch.equal(q.dequantize(), moved.dequantize().movedim(-1, axis))
    again = QTensor.from_parts(q.parts(), q.spec())
    assert torch.equal(again.dequantize(), q.dequantize())


def test_grids_are_stored_in_half_precision_where_it_is_exact_enough() -> None:
    assert storage_dtype(torch.tensor([1.0, 0.0])) == torch.float16
    assert storage_dtype(torch.tensor([1e-6])) == torch.float32
    assert storage_dtype(torch.tensor([1e5])) == torch.float32
    assert QTensor.quantize(values((2, 8), 0, "tiny"), Scheme.parse("int4")).parts()["scale"].dtype == torch.float32


def test_what_cannot_be_quantized() -> None:
    with pytest.raises(RecipeError, match='scheme "nf4:g64:sym": only int codes can be computed from a range'):
        QTensor.quantize(torch.randn(2, 64), Scheme.parse("nf4:g64"))
    for shape in ((), (0, 4), (4, 0)):
        with pytest.raises(InputError, match=r"a weight of shape \[.*\] has no rows of values to quantize; exclude it"):
            QTensor.quantize(torch.zeros(shape), Scheme.parse("int4"))


# -- every field of the record -------------------------------------------------------------------------------


def records() -> dict[str, QTensor]:
    """One record for each way of storing."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (3, 10), dtype=torch.uint8, generator=random)
    packed, scheme = pack_bits(codes, 4), Scheme.parse("int4:g4")
    scale = torch.rand(3, 3, generator=random) + 0.1
    zero = torch.randint(0, 16, (3, 3), dtype=torch.uint8, generator=random)
    plain = QTensor(scheme, (3, 10), packed, scale)
    second = QTensor.quantize(scale, Scheme.parse("int6:asym"))
    return {
        "symmetric": plain,
        "zero": plain.with_parts(zero=zero),
        "minimum": plain.with_parts(minimum=-torch.rand(3, 3, generator=random)),
        "codebook": plain.with_parts(codebook=torch.randn(16, generator=random)),
        "boundaries": plain.with_parts(boundaries=torch.tensor([0, 1, 7, 10], dtype=torch.int32), zero=zero),
        "permutation": plain.with_parts(permutation=torch.randperm(10, generator=random).int(), zero=zero),
        "two levels": plain.with_parts(scale=second, minimum=second),
        "per tensor": plain.with_parts(scheme=Scheme.parse("int4:tensor"), scale=scale[:1, :1]),
        "per channel": plain.with_parts(scheme=Scheme.parse("int4"), scale=scale[:, :1], zero=zero[:, :1]),
        "half": plain.with_parts(dtype=torch.bfloat16),
        "other axis": QTensor(scheme, (10, 3), packed, scale, zero, axis=0),
    }


@pytest.mark.parametrize("name", records())
def test_records_stand_for_what_they_say(name: str) -> None:
    q = records()[name]
    expected = by_definition(q)
    found = q.dequantize()
    assert torch.allclose(
        (found if q.axis == -1 else found.T).double(), expected, rtol=1e-2 if name == "half" else 1e-6, atol=1e-6
    )
    assert found.shape == q.shape
    assert found.dtype == q.dtype
    for parts in (q.parts(), list(q.parts().values())):
        again = QTensor.from_parts(parts, q.spec())
        assert again.spec() == q.spec()
        assert torch.equal(again.dequantize(), found)
        assert again.nbytes == q.nbytes == sum(part.nbytes for part in q.parts().values())
    assert q.dequantized_bytes == found.nbytes


def test_names_of_nested_parts() -> None:
    assert list(records()["two levels"].parts()) == [
        *("codes", "scale.codes", "scale.scale", "scale.zero", "minimum.codes", "minimum.scale", "minimum.zero"),
    ]


def test_a_codebook_and_a_minimum() -> None:
    """As bitsandbytes' quantized scales are: a table of entries, a scale for each group, an offset."""
    codebook = torch.tensor([-1.0, 0.0, 0.25, 1.0])
    scheme, codes = Scheme.parse("nf2:g2:sym"), pack_bits(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), 2)
    scale, minimum = torch.tensor([[2.0, 4.0]]), torch.tensor([[10.0, 20.0]])
    record = QTensor(scheme, (1, 4), codes, scale, minimum=minimum, codebook=codebook)
    assert record.dequantize().tolist() == [[8.0, 10.0, 21.0, 24.0]]
