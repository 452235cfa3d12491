"""Sharded safetensors: streamed out, read back lazily, and not believed."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qcompiler.errors import InputError
from qcompiler.formats import shards as module
from qcompiler.formats.shards import INDEX, Shards, ShardWriter

DTYPES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.int32, torch.float32, torch.int64)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=8),
    limit=st.sampled_from((1, 60, 10**6)),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read(
    sizes: list[tuple[int, int]], limit: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    random = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{i}": torch.randint(0, 99, shape, generator=random).to(DTYPES[(i + seed) % len(DTYPES)])
        for i, shape in enumerate(sizes)
    }
    with ShardWriter(folder, limit) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor.t().contiguous().t())
    found = Shards(folder)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found.get(name), tensor)
        assert found.shape(name) == tensor.shape
    theirs = {}
    for path in folder.glob("*.safetensors"):
        theirs |= load_file(path)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())
    assert (folder / INDEX).exists() == (len(list(folder.glob("*.safetensors"))) > 1)
    assert not list(folder.glob(".*"))


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Each tensor is on disk when `add` returns: nothing of it is kept."""
    with ShardWriter(tmp_path) as writer:
        for i in range(4):
            tensor = torch.full((1000,), float(i))
            writer.add(f"t{i}", tensor)
            tensor.fill_(-1)
            assert all(like.is_meta for _, like, _ in writer._open._held)
    assert [float(Shards(tmp_path).get(f"t{i}")[0]) for i in range(4)] == [0, 1, 2, 3]


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    def fail(*tensors: torch.Tensor) -> None:
        with ShardWriter(tmp_path) as writer:
            for tensor in tensors:
                writer.add("a", tensor)

    with pytest.raises(InputError, match='two tensors are called "a"'):
        fail(torch.ones(3), torch.ones(3))
    with pytest.raises(InputError, match="cannot be stored in safetensors"):
        fail(torch.ones(3).to_sparse())
    assert not list(tmp_path.iterdir())


def index(folder: Path, places: object) -> Path:
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "../outside.safetensors"}, "is no .safetensors file beside it"),
        ({"a": "/etc/passwd"}, "is no .safetensors file beside it"),
        ({"a": 7}, "is no .safetensors file beside it"),
        ({"a": "other.safetensors"}, 'names the file "other.safetensors", which is missing'),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(places: object, message: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path.parent / "outside.safetensors")
    with pytest.raises(InputError, match=message):
        Shards(index(tmp_path, places))


def header(text: dict, data: bytes = b"") -> bytes:
    found = json.dumps(text).encode()
    return len(found).to_bytes(8, "little") + found + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(8)),
        header({n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}, bytes(4)),
        header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, bytes(8)),
    ],
    ids=["empty", "huge header", "huge tensor", "truncated", "overlapping", "gap"],
)
def test_a_damaged_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        Shards(tmp_path)


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(InputError, match='the tensor "a" stands in two files'):
        Shards(tmp_path)
    with pytest.raises(InputError, match=r"holds no \.safetensors file"):
        Shards(tmp_path / "nothing")


def test_json_is_not_believed_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    for text, message in (("[1]", "holds a list"), ("{", "is not JSON"), ("[" * 100_000, "is not JSON")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            module.read_json(path)
    monkeypatch.setattr(module, "JSON_LIMIT", 10)
    path.write_text("{" + " " * 20 + "}")
    with pytest.raises(InputError, match="too many for a file that describes a model"):
        module.read_json(path)
    with pytest.raises(InputError, match="cannot read"):
        module.read_json(tmp_path / "missing.json")
