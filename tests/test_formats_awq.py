"""AWQ checkpoints: gemm and gemv, against the specification read nibble by nibble."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qcompiler.compiler import compile
from qcompiler.errors import InputError, No
from qcompiler.formats import awq
from qcompiler.scheme import QTensor, Scheme
from tests.checkpoints import ids, session, written

# Where AutoAWQ's reader takes column n of eight from: the nibble of this number.
NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)


def nibble(word: Tensor, i: int) -> int:
    return int(word) >> (4 * i) & 15


def gemm(parts: dict[str, Tensor], group: int) -> Tensor:
    words, zeros, scales = (parts[f"x.{name}"] for name in ("qweight", "qzeros", "scales"))
    k, n = words.shape[0], 8 * words.shape[1]
    value = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            place, g = (row // 8, NIBBLE[row % 8]), column // group
            code, zero = nibble(words[column, place[0]], place[1]), nibble(zeros[g, place[0]], place[1])
            value[row, column] = (code - zero) * float(scales[g, row])
    return value


def gemv(parts: dict[str, Tensor], group: int) -> Tensor:
    words, zeros, scales = (parts[f"x.{name}"] for name in ("qweight", "qzeros", "scales"))
    n, k = words.shape[0], 8 * words.shape[1]
    value = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            g = column // group
            code, zero = nibble(words[row, column // 8], column % 8), nibble(zeros[row, g // 8], g % 8)
            value[row, column] = (code - zero) * float(scales[row, g])
    return value


@settings(max_examples=10, deadline=None)
@given(
    group=st.sampled_from((32, 64)),
    symmetric=st.booleans(),
    kind=st.sampled_from(("gemm", "gemv")),
    n=st.sampled_from((8, 24)),
    seed=st.integers(0, 99),
)
def test_the_layout_is_that_of_the_specification(group: int, symmetric: bool, kind: str, n: int, seed: int) -> None:
    weight = torch.randn(n, 128, generator=torch.Generator().manual_seed(seed))
    record = QTensor.quantize(weight, Scheme.parse(f"int4:g{group}:{'sym' if symmetric else 'asym'}"))
    parts = awq.pack("x", record, kind)
    assert torch.equal({"gemm": gemm, "gemv": gemv}[kind](parts, group), record.dequantize())


@pytest.mark.parametrize("form", ["awq", pytest.param("awq-gemv", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", [pytest.param("int4:g32:sym", marks=pytest.mark.slow), "int4:g32:asym"])
def test_a_written_folder_gives_the_same_logits_to_the_bit(scheme: str, form: str, tmp_path: Path) -> None:
    compiled = session(f"canonicalize, rtn{{scheme={scheme}}}, fuse, kv_cache, pack")
    folder = written(compiled, form, tmp_path / "out")
    assert torch.equal(compile(folder, "stored", backend="reference")(ids()), compiled(ids()))
    options = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert options["version"] == form.replace("awq-", "").replace("awq", "gemm")
    assert options["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize(
    ("scheme", "shape", "kind", "message"),
    [
        ("int3:g32", (8, 64), "gemm", "it has 3 bits, not 4"),
        ("int4:g48", (8, 64), "gemm", "groups of 48"),
        ("int4:g32", (9, 64), "gemm", "9 x 64 is not made of words of 8"),
        ("int4:g16", (8, 64), "gemv", "gemv has groups of 32, 64 or 128, not 16"),
    ],
)
def test_what_it_cannot_hold_is_refused(scheme: str, shape: tuple[int, int], kind: str, message: str) -> None:
    record = QTensor.quantize(torch.randn(shape), Scheme.parse(scheme))
    assert isinstance(awq.holds(record, kind), No)
    with pytest.raises(InputError, match=message):
        awq.pack("x", record, kind)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"x.scales": torch.full((2, 8), torch.inf, dtype=torch.float16)}, {}, "not finite numbers"),
        ({"x.qzeros": torch.zeros(3, 1, dtype=torch.int32)}, {}, "do not fit together"),
        ({}, {"bits": 3}, "bits is 3; it must be 4"),
        ({}, {"version": "marlin"}, "AWQ version 'marlin' is not read"),
        ({}, {"group_size": 48}, "do not fit together"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Tensor], options: dict, message: str, tmp_path: Path) -> None:
    record = QTensor.quantize(torch.randn(8, 64), Scheme.parse("int4:g32:asym"))
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", **options}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    save_file(awq.pack("x", record, "gemm") | change, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        awq.read(tmp_path).tensors["x.weight"]
