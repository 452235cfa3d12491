"""Importance matrices: both of llama.cpp's file formats, there and back, and files that are not to be trusted."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompiler.errors import InputError
from qcompiler.formats.imatrix import Imatrix

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

MATRIX = Imatrix(
    {"blk.0.attn_q.weight": torch.tensor([1.0, 4.0, 0.0]), "token_embd.weight": torch.tensor([8.0])},
    {"blk.0.attn_q.weight": 2.0, "token_embd.weight": 4.0},
    ("wiki.txt",),
    chunks=3,
    chunk_size=512,
)


@pytest.mark.parametrize("name", ["m.gguf", "m.dat"])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    MATRIX.write(tmp_path / name)
    again = Imatrix.read(tmp_path / name)
    assert again.means.keys() == MATRIX.means.keys()
    for key, mean in MATRIX.means.items():
        torch.testing.assert_close(again.means[key], mean)
    assert (again.datasets, again.chunks) == (MATRIX.datasets, MATRIX.chunks)


def test_the_gguf_form_is_llama_cpps(tmp_path: Path) -> None:
    """As read by gguf-py: names, types and metadata that llama.cpp's loader looks for."""
    MATRIX.write(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["wiki.txt"]
    assert reader.get_field("imatrix.chunk_count").contents() == 3
    assert reader.get_field("imatrix.chunk_size").contents() == 512
    assert reader.get_field("general.architecture") is None
    tensors = {t.name: t.data for t in reader.tensors}
    assert np.array_equal(tensors["blk.0.attn_q.weight.in_sum2"], [[1, 4, 0]])
    assert np.array_equal(tensors["blk.0.attn_q.weight.counts"], [[2]])


def test_the_older_form_is_spelled_out(tmp_path: Path) -> None:
    """Entries: name, calls, sums over calls; the calls of the run and the data's name may be missing."""
    entry = struct.pack("<i", 1) + b"w" + struct.pack("<ii2f", 4, 2, 8.0, 2.0)
    path = tmp_path / "m.dat"
    for tail in (b"", struct.pack("<i", 4), struct.pack("<ii", 4, 3) + b"abc"):
        path.write_bytes(struct.pack("<i", 1) + entry + tail)
        assert Imatrix.read(path).means["w"].tolist() == [2.0, 0.5]
    MATRIX.write(path)
    assert path.read_bytes()[:8] == struct.pack("<ii", 2, len("blk.0.attn_q.weight"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends or lies at byte 0"),
        (struct.pack("<i", 2**30), "ends or lies"),
        (struct.pack("<ii", 1, -5), "ends or lies"),
        (struct.pack("<ii", 1, 2) + b"\xff\xfe", "not UTF-8"),
        (struct.pack("<ii", 1, 1) + b"w" + struct.pack("<iif", 1, 1, float("nan")), "no sums of squares"),
        (struct.pack("<ii", 1, 1) + b"w" + struct.pack("<iif", 1, 1, -1.0), "no sums of squares"),
        (struct.pack("<ii", 1, 1) + b"w" + struct.pack("<iif", 0, 1, 1.0), "no sums of squares"),
        (b"GGUF" + bytes(8), "not a usable GGUF file"),
    ],
)
def test_hostile_files_get_one_sentence(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason) as error:
        Imatrix.read(path)
    assert "\n" not in str(error.value)


def test_another_gguf_file_and_a_missing_one(tmp_path: Path) -> None:
    from tests.test_gguf import write_model

    with pytest.raises(InputError, match="not of the type imatrix"):
        Imatrix.read(write_model(tmp_path / "model.gguf"))
    with pytest.raises(InputError, match="cannot read"):
        Imatrix.read(tmp_path / "none.gguf")


@pytest.mark.parametrize("name", ["m.gguf", "m.dat"])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_or_refused(name: str, data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / name
    MATRIX.write(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    said, means = "", {}
    try:
        means = dict(Imatrix.read(path).means)
    except InputError as error:
        said = str(error)
    assert "\n" not in said
    assert all(bool(torch.isfinite(mean).all()) for mean in means.values())
