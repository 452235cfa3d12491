"""GPTQ checkpoints: the layout bit by bit, round trips, act-order, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcompiler.compiler import compile
from qcompiler.errors import InputError, No
from qcompiler.formats import gptq
from qcompiler.scheme import QTensor, Scheme
from tests import checkpoints
from tests.checkpoints import ids, session, written

REST = "fuse, kv_cache, pack"


def bits_of(words: Tensor, start: int, count: int) -> int:
    """Field of `count` bits from bit `start` of a little-endian row of 32-bit words."""
    whole = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return whole >> start & ((1 << count) - 1)


def decoded(parts: dict[str, Tensor], bits: int, version: int) -> Tensor:
    """The weight [n, k], field by field as the specification says."""
    words, zeros, scales, index = (parts[f"x.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx"))
    k, n = len(index), scales.shape[1]
    value = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            group = int(index[column])
            code = bits_of(words[:, row], column * bits, bits)
            zero = bits_of(zeros[group], row * bits, bits) + (1 if version == 1 else 0)
            value[row, column] = float(scales[group, row]) * (code - zero)
    return value


@settings(max_examples=12, deadline=None)
@given(
    bits=st.sampled_from(gptq.BITS),
    group=st.sampled_from((8, 32, 64, 128)),
    symmetric=st.booleans(),
    version=st.sampled_from((1, 2)),
    sizes=st.tuples(st.just(32), st.sampled_from((32, 64, 96))),
    seed=st.integers(0, 99),
)
def test_the_layout_is_that_of_the_specification(
    bits: int, group: int, symmetric: bool, version: int, sizes: tuple[int, int], seed: int
) -> None:
    weight = torch.randn(sizes, generator=torch.Generator().manual_seed(seed))
    record = QTensor.quantize(weight, Scheme.parse(f"int{bits}:g{group}:{'sym' if symmetric else 'asym'}"))
    if version == 1 and record.zero is not None:
        record = record.with_parts(zero=record.zero.clamp(min=1))
    parts = gptq.pack("x", record, version)
    assert torch.equal(decoded(parts, bits, version), record.dequantize())
    assert {name: part.dtype for name, part in parts.items()} == {
        **dict.fromkeys(("x.qweight", "x.qzeros", "x.g_idx"), torch.int32),
        "x.scales": torch.float16,
    }


def test_symmetric_zero_points_are_the_words_that_readers_know() -> None:
    record = QTensor.quantize(torch.randn(32, 32), Scheme.parse("int4:g32"))
    words = {version: gptq.pack("x", record, version)["x.qzeros"] for version in (1, 2)}
    assert {hex(int(word) & 0xFFFFFFFF) for word in words[1].flatten()} == {"0x77777777"}
    assert {hex(int(word) & 0xFFFFFFFF) for word in words[2].flatten()} == {"0x88888888"}


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        ("int4:g32:sym", "gptq"),
        ("int3:g32:asym", "gptq-v2"),
        pytest.param("int4:g32:asym", "gptq-v2", marks=pytest.mark.slow),
        pytest.param("int8:channel:sym", "gptq", marks=pytest.mark.slow),
        pytest.param("int2:g32:asym", "gptq-v2", marks=pytest.mark.slow),
    ],
)
def test_a_written_folder_gives_the_same_logits_to_the_bit(scheme: str, form: str, tmp_path: Path) -> None:
    compiled = session(f"canonicalize, rtn{{scheme={scheme}}}, {REST}", bias=True)
    folder = written(compiled, form, tmp_path / "out", shard_bytes=40_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    again = compile(folder, "stored", backend="reference")
    assert torch.equal(again(ids()), compiled(ids()))
    assert again.report.coverage["quantized"] == compiled.report.coverage["quantized"]


@pytest.mark.slow
def test_gptq_itself_survives_the_format(tmp_path: Path) -> None:
    compiled = session(f"canonicalize, gptq{{scheme=int4:g32:asym}}, {REST}", tied=True)
    again = compile(written(compiled, "gptq-v2", tmp_path / "out"), "stored", backend="reference")
    assert torch.equal(again(ids()), compiled(ids()))


def test_act_order_is_a_permutation(tmp_path: Path) -> None:
    record = QTensor.quantize(torch.randn(32, 96), Scheme.parse("int4:g32"))
    groups = torch.randperm(96) // 32
    order = torch.argsort(groups, stable=True).to(torch.int32)
    parts = gptq.pack("model.x", record.with_parts(permutation=order), 1)
    assert torch.equal(parts["model.x.g_idx"], groups.to(torch.int32))
    read = one_layer(tmp_path, parts).tensors["model.x.weight"]
    assert isinstance(read, QTensor)
    assert read.permutation is not None
    assert torch.equal(read.permutation, order)
    assert torch.equal(read.codes, record.codes)
    assert torch.equal(read.dequantize(), record.with_parts(permutation=order).dequantize())


def one_layer(folder: Path, parts: dict[str, Tensor], **options: object) -> checkpoints.Checkpoint:
    """A checkpoint of one layer, read."""
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, **options}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    save_file({name: part.contiguous() for name, part in parts.items()}, folder / "model.safetensors")
    return gptq.read(folder)


def layer() -> dict[str, Tensor]:
    """A layer of version 1."""
    return gptq.pack("x", QTensor.quantize(torch.randn(32, 64), Scheme.parse("int4:g32")), 1)


def test_the_older_file_of_options_is_read(tmp_path: Path) -> None:
    one_layer(tmp_path, layer())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": True}))
    assert isinstance(gptq.read(tmp_path).tensors["x.weight"], QTensor)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"x.qzeros": torch.full((2, 4), -1, dtype=torch.int32)}, {}, "fields of ones, which readers of version 1"),
        ({"x.scales": torch.zeros(3, 32, dtype=torch.float16)}, {}, "do not fit together"),
        ({"x.scales": torch.full((2, 32), torch.nan, dtype=torch.float16)}, {}, "scales that are not finite"),
        ({"x.g_idx": torch.zeros(64, dtype=torch.int32)}, {}, "does not put 32 channels into each of 2 groups"),
        ({"x.g_idx": torch.zeros(3, dtype=torch.int32)}, {}, r"not int32 \[64\]"),
        ({"x.qweight": torch.zeros(8, 32)}, {}, "wrong types"),
        ({}, {"bits": 5}, "bits is 5; it must be 2 or 3 or 4 or 8"),
        ({}, {"group_size": "many"}, "group_size is 'many'"),
        ({}, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Tensor], options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        one_layer(tmp_path, layer() | change, **options).tensors["x.weight"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (QTensor.quantize(torch.rand(32, 64), Scheme.parse("int4:g32:asym")), "zero points of 0"),
        (QTensor.quantize(torch.randn(32, 64), Scheme.parse("int5:g32")), "it has 5 bits, not 2 or 3 or 4 or 8"),
        (QTensor.quantize(torch.randn(30, 64), Scheme.parse("int4:g32")), "30 x 64, no multiples of 32"),
        (QTensor.quantize(torch.randn(32, 64) * 1e-7, Scheme.parse("int4:g32")), "no float16 numbers"),
    ],
)
def test_what_version_1_cannot_hold_is_refused(record: QTensor, message: str) -> None:
    answer = gptq.holds(record, 1)
    assert isinstance(answer, No)
    assert message in str(answer)
    with pytest.raises(InputError, match=r'"x" cannot be stored as gptq: .*' + message):
        gptq.pack("x", record, 1)


def test_one_scheme_for_all_layers(tmp_path: Path) -> None:
    compiled = session(
        f"canonicalize, rtn{{scheme=int4:g32 include=*.mlp.*}}, rtn{{scheme=int8:g32 include=*attn*}}, {REST}"
    )
    with pytest.raises(InputError, match="one number of bits and one group size for all"):
        written(compiled, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_stayed_floats_are_named(tmp_path: Path) -> None:
    compiled = session(f"canonicalize, rtn{{scheme=int4:g32 include=*.mlp.*}}, {REST}")
    folder = written(compiled, "gptq", tmp_path / "out")
    options = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert "-:^model\\.layers\\.0\\.self_attn\\.q_proj$" in options["dynamic"]
    assert json.loads((folder / "quantize_config.json").read_text()) == options
    assert "model.layers.0.self_attn.q_proj.weight" in load_file(folder / "model.safetensors")
