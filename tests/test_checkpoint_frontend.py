"""The front end of quantized checkpoints: which folders it takes, and what it says of those that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from qcompiler.compiler import capture
from qcompiler.errors import CaptureError, InputError, No
from qcompiler.formats.shards import ShardWriter
from qcompiler.frontends import checkpoint as frontend
from tests.checkpoints import ids, llama, session, written


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiled = session("canonicalize, rtn{scheme=int4:g32}", tied=False)
    return written(compiled, "gptq", tmp_path_factory.mktemp("frontend") / "gptq")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def test_it_takes_quantized_folders_alone(sound: Path, tmp_path: Path) -> None:
    assert frontend.accepts(sound) is True
    assert isinstance(frontend.accepts(torch.nn.Linear(1, 1)), No)
    assert isinstance(frontend.accepts(tmp_path / "nothing"), No)
    llama().save_pretrained(tmp_path / "float")
    answer = frontend.accepts(tmp_path / "float")
    assert isinstance(answer, No)
    assert "names no quantization_config" in str(answer)
    with pytest.raises(InputError, match="without example inputs"):
        frontend.capture(sound, {"input_ids": ids()})


def test_codes_stand_beside_the_floats(sound: Path) -> None:
    program = capture(sound)
    assert program.info["format"] == "gptq"
    assert len(program.codes) == 14
    for name, record in program.codes.items():
        assert torch.equal(record.dequantize(), program.tensors[name])


def change(folder: Path, **values: object) -> Path:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9}, "asks for num_hidden_layers = 1000000000, the tensors allow"),
        ({"num_hidden_layers": 3, "layer_types": None}, "lacks 9 tensors of the model"),
        ({"vocab_size": 100}, r"is \[96, 64\], but config.json asks for \[100, 64\]"),
        ({"model_type": "nonsense"}, "knows no model_type 'nonsense'"),
        ({"hidden_size": "many"}, "transformers makes no model of this config.json"),
    ],
)
def test_a_configuration_of_another_model_is_refused(folder: Path, values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        frontend.capture(change(folder, **values))


def extra(folder: Path, name: str, tensor: torch.Tensor) -> Path:
    """The folder with one more tensor."""
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    (folder / "more").mkdir()
    with ShardWriter(folder / "more") as writer:
        writer.add(name, tensor)
    (folder / "more" / "model.safetensors").rename(folder / "second.safetensors")
    return folder


def test_tensors_without_a_place(folder: Path, tmp_path: Path) -> None:
    second = Path(shutil.copytree(folder, tmp_path / "second"))
    with pytest.raises(CaptureError, match=r'has no place for, first "model\.more\.weight"'):
        frontend.capture(extra(folder, "model.more.weight", torch.ones(2)))
    name = "model.layers.0.self_attn.q_proj.bias"  # old tools wrote biases of zeros for every layer
    assert len(frontend.capture(extra(second, name, torch.zeros(64))).codes) == 14
