"""GGUF's block types: records decode to the bits of gguf-py, and become the same bytes again."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.errors import No
from qcompiler.formats import gguf_types
from qcompiler.scheme import QTensor, Scheme

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

STEPS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2)} | {
    "Q5_1": (0, 2),
    "MXFP4": (),
}


def blocks_of(kind: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random blocks, uint8 [rows, bytes]: every byte is drawn, but for the float16 steps, which are finite."""
    chance, of = np.random.default_rng(seed), gguf_types.KINDS[kind]
    data = chance.integers(0, 256, (rows, blocks, of.nbytes), dtype=np.uint8)
    for start in STEPS.get(kind, (0,)):
        step = chance.normal(0, 2e-3, (rows, blocks, 1)).astype(np.float16)
        data[..., start : start + 2] = step.view(np.uint8)
    if kind == "MXFP4":
        data[..., 0] = chance.integers(0, 255, (rows, blocks))
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", gguf_types.KINDS)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_there_and_back_without_losing_a_bit(kind: str, rows: int, blocks: int, seed: int) -> None:
    data = blocks_of(kind, rows, blocks, seed)
    record = gguf_types.decode(kind, torch.from_numpy(data), (rows, blocks * gguf_types.KINDS[kind].block))
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(record.dequantize().numpy().view(np.int32), expected.view(np.int32))
    answer = gguf_types.encode(record)
    assert isinstance(answer, tuple)
    assert answer[0] == kind
    assert np.array_equal(answer[1].numpy(), data)


@pytest.mark.parametrize("kind", gguf_types.KINDS)
def test_sizes_are_those_of_gguf_py(kind: str) -> None:
    of = gguf_types.KINDS[kind]
    assert (of.block, of.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "Q6_K", "IQ4_XS"])
def test_some_rows_of_a_record_are_those_of_the_tensor(kind: str) -> None:
    columns = 2 * gguf_types.KINDS[kind].block
    record = gguf_types.decode(kind, torch.from_numpy(blocks_of(kind, 6, 2, 0)), (6, columns))
    rows = torch.tensor([4, 0, 3])
    assert record.by_row
    assert torch.equal(record.take(rows).dequantize(), record.dequantize()[rows])


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("int4:g128:sym", "Q4_0"),
        ("int3:g64:sym", "Q4_0"),
        ("int3:g32:asym", "Q4_0"),
        ("int4:g64:asym", "Q5_0"),
        ("int8:channel:sym", "Q8_0"),
        ("int6:g32:sym", "Q8_0"),
        ("int4:tensor:sym", "Q4_0"),
    ],
)
@given(rows=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_integer_codes_keep_their_values(scheme: str, kind: str, rows: int, seed: int) -> None:
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed))
    record = QTensor.quantize(weight, Scheme.parse(scheme))
    answer = gguf_types.encode(record)
    assert isinstance(answer, tuple)
    # One that counts as far as the record's codes do, or a smaller one that counts as far as it happens to need.
    assert gguf_types.KINDS[answer[0]].bits <= gguf_types.KINDS[kind].bits
    decoded = gguf.dequantize(answer[1].numpy(), gguf.GGMLQuantizationType[answer[0]])
    assert np.array_equal(decoded, record.dequantize().numpy())


@pytest.mark.parametrize(
    ("scheme", "columns", "reason"),
    [
        ("int4:g16:sym", 256, "groups of 16 in rows of 256 values are not whole blocks of 32"),
        ("int4:g128:sym", 48, "groups of 48 in rows of 48"),
        ("int8:g32:asym", 256, "Q8_0 has -128 to 127"),
    ],
)
def test_what_no_type_holds_is_refused(scheme: str, columns: int, reason: str) -> None:
    weight = torch.arange(columns).float().repeat(2, 1) - 1
    answer = gguf_types.encode(QTensor.quantize(weight, Scheme.parse(scheme)))
    assert isinstance(answer, No)
    assert reason in answer.reason


def test_scales_that_float16_would_round_are_refused() -> None:
    record = QTensor.quantize(torch.randn(2, 64), Scheme.parse("int4:g32:sym"))
    assert isinstance(record.scale, torch.Tensor)
    answer = gguf_types.encode(record.with_parts(scale=record.scale.float() * 1.0001))
    assert isinstance(answer, No)
    assert "finer than float16" in answer.reason
