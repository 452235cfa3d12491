"""ONNX folders as checkpoints: what ONNX Runtime GenAI's builder and the backend write loads, and travels on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qcompiler.compiler import capture, compile
from qcompiler.convert import convert, samples
from qcompiler.errors import InputError, No
from qcompiler.formats import onnx as module
from qcompiler.formats.onnx_blocks import Packed, in_floats, packed_of
from qcompiler.frontends.onnx_write import packed
from qcompiler.scheme import QTensor
from tests import checkpoints
from tests.checkpoints import VOCABULARY, ids, llama, logits_of, save_tokenizer

onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
RECIPE = "canonicalize, rtn{scheme=int4:g32:asym}, rtn{scheme=int8:g32 include=@head}, fuse, kv_cache, pack"


def genai(model: Path, folder: Path, *options: str) -> Path:
    """What the model builder of onnxruntime-genai makes of a model, as a user calls it."""
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed; `make dev` does")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", model, "-i", model, "-o", folder]
    command += ["-p", "int4", "-e", "cpu", "-c", folder.parent / "cache", "--extra_options", "hf_token=false", *options]
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=outside, cwd=folder.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the builder's, and the model's config.json beside."""
    base = tmp_path_factory.mktemp("genai")
    llama(intermediate=128).save_pretrained(base / "model")
    save_tokenizer(base / "model", VOCABULARY)
    folder = genai(base / "model", base / "genai", "int4_block_size=32")
    shutil.copyfile(base / "model" / "config.json", folder / "config.json")
    return folder


def logits_of_onnx(folder: Path) -> torch.Tensor:
    """What ONNX Runtime computes with the folder's model, from an empty cache, without rounding activations."""
    proto = onnx.load(folder / "model.onnx")
    in_floats(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {}
    for spec in session.get_inputs():
        if spec.name.startswith("past"):
            feed[spec.name] = np.zeros((2, 2, 0, 16), np.float32)  # heads of keys, and their size
        else:
            feed[spec.name] = ids().numpy() if spec.name == "input_ids" else np.ones((2, 12), np.int64)
    return torch.from_numpy(session.run(["logits"], feed)[0])


def test_a_folder_of_the_model_builder_computes_its_logits_here(built: Path) -> None:
    program = capture(built)
    assert program.info["format"] == "onnx"
    assert {str(record.scheme) for record in program.codes.values()} == {"int4:g32:sym"}
    assert len(program.codes) == 15  # the head too
    ours = program(input_ids=ids())["logits"]
    torch.testing.assert_close(ours, logits_of_onnx(built), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(ours, llama(intermediate=128)(ids()).logits, atol=1e-3)


def test_it_travels_on_without_loss(built: Path, tmp_path: Path) -> None:
    lines = convert(built, tmp_path / "ct", "compressed-tensors", verify=True)
    assert {line.outcome for line in lines} == {"lossless", "lossless as floats"}
    torch.testing.assert_close(logits_of(tmp_path / "ct"), logits_of_onnx(built), rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match=r"scales are no float16 numbers"):
        convert(built, tmp_path / "gptq", "gptq")


def test_what_the_backend_wrote_is_read_by_its_graph_alone(tmp_path: Path) -> None:
    """A compiled folder is read by its manifest; here only the ONNX files and config.json are left of it."""
    compiled = compile(llama(tied=True), RECIPE, backend="onnxruntime", samples=4, length=16)
    compiled.save(tmp_path / "compiled")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "compiled").glob("model.onnx*"):
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps({**compiled.program.info["config"]}))
    lines = convert(folder, tmp_path / "gptq", "gptq-v2", verify=True)
    assert {line.outcome for line in lines} == {"lossless", "lossless as floats"}
    assert {line.outcome for line in convert(tmp_path / "compiled", tmp_path / "2", "gptq-v2")} == {
        line.outcome for line in lines
    }
    first, second = (checkpoints.read(tmp_path / name, "gptq-v2").tensors for name in ("gptq", "2"))
    for name in first:
        a, b = first[name], second[name]
        assert type(a) is type(b)
        values = [x.dequantize() if isinstance(x, QTensor) else x.float() for x in (a, b)]
        assert torch.equal(*values), name


def test_refusals(built: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(built, tmp_path / "copy")
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(InputError, match="'gemma2' may not be stored as they are"):
        module.read(folder)
    (folder / "config.json").unlink()
    answer = module.detect(folder)
    assert isinstance(answer, No)
    assert "no config.json beside it" in answer.reason
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": "../model.onnx"}}}))
    assert 'no file "../model.onnx"' in str(module.detect(folder))
    with pytest.raises(InputError, match="is no ONNX folder"):
        module.read(folder)


def changed(built: Path, folder: Path, op: str) -> Path:
    """A copy of the folder with a node or a matrix more."""
    shutil.copytree(built, folder)
    proto = onnx.load(folder / "model.onnx")
    if op == "matrix":
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "rotation"))
    else:
        node = onnx.helper.make_node(op, ["model.embed_tokens.weight"], ["a", "b", "c"], name="round")
        proto.graph.node.insert(0, node)
    (folder / "model.onnx.data").unlink()
    onnx.save(proto, folder / "model.onnx")
    return folder


@pytest.mark.parametrize(
    ("op", "message"),
    [("matrix", '"rotation", for which transformers'), ("DynamicQuantizeLinear", "rounds activations")],
)
def test_what_the_model_has_no_place_for_is_refused(op: str, message: str, built: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        module.read(changed(built, tmp_path / "changed", op))


def test_it_holds_what_matmul_nbits_does() -> None:
    """Of every kind of weight: what it says it holds comes back bit for bit from MatMulNBits' parts."""
    for kind, record in samples().items():
        answer, made = module.holds(record), packed(record)
        assert bool(answer) == (not isinstance(made, No)), kind
        if isinstance(made, No):
            continue
        attributes, parts = made
        names = [name if name in parts else "" for name in ("codes", "scales", "zero_points")]
        while not names[-1]:
            names.pop()
        node = onnx.helper.make_node("MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", **attributes)
        found = packed_of(node, {name: onnx.numpy_helper.from_array(value, name) for name, value in parts.items()})
        assert isinstance(found, Packed)
        back = found.record(lambda name, parts=parts: torch.from_numpy(parts[name]))
        assert torch.equal(back.dequantize(), record.dequantize()), kind
