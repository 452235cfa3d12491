"""Files of standard operators only: checked, inferred, and run by onnx's own reference evaluator."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qcompiler import data
from qcompiler.cli import _standard_only
from qcompiler.errors import InputError
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from tests.programs import tiny_encoder, tiny_llama

pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")

from qcompiler.backends.onnxruntime import OnnxRuntime

onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
reference = pytest.importorskip("onnx.reference", reason="the extra [onnx] is not installed")
STANDARD = OnnxRuntime(opset_only=True, threads=1)
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def quantized(recipe: str, build: object = tiny_llama) -> Program:
    program: Program = build()  # type: ignore[operator]
    samples = data.check_samples(program)
    Runner(Context(samples=samples), samples).run(program, Recipe.parse(recipe).passes)
    return program


def written(program: Program, folder: Path) -> "onnx.ModelProto":
    """The file, checked and with every shape inferred."""
    STANDARD.lower(program, folder)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    proto = onnx.load(folder / "model.onnx")
    assert {node.domain for node in proto.graph.node} == {""}
    assert [entry.domain for entry in proto.opset_import] == [""]
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    return proto


WEIGHTS = [
    "rtn{scheme=int4:g16:asym include=*}",
    "rtn{scheme=int4:g32:sym include=*}",
    "rtn{scheme=int3:g16:sym include=*}",
    "rtn{scheme=int8:g16:asym include=*}",
    "rtn{scheme=int2:g16:asym include=*}",
    "activations{scheme=int8:tensor:asym include=*}, rtn{scheme=int8:channel embeddings=int8:channel}, integers",
    "activations{scheme=int8:tensor:asym include=*}, rtn{scheme=int8:channel embeddings=int8:tensor:asym}, integers",
    "activations{scheme=int8:token:asym:dynamic include=*}, rtn{scheme=int8:channel:sym include=*}, integers",
]


@pytest.mark.parametrize("recipe", ["fuse", *WEIGHTS])
@pytest.mark.parametrize("build", [tiny_llama, tiny_encoder])
def test_the_reference_evaluator_agrees(recipe: str, build: object, tmp_path: Path) -> None:
    program = quantized(recipe, build)
    proto, name = written(program, tmp_path), program.outputs[0]
    session = reference.ReferenceEvaluator(proto)
    feed = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    feed["attention_mask"][1, :3] = 0
    feed |= {"position_ids": torch.arange(9).expand(2, -1), "logits_positions": torch.arange(9)}
    taken = {i.name for i in proto.graph.input}
    known = {i.name for i in program.inputs}
    expected = program(**{n: v for n, v in feed.items() if n in known})[name]
    (found,) = session.run([name], {n: v.numpy() for n, v in feed.items() if n in taken})
    real = feed["attention_mask"].bool()
    difference = (torch.from_numpy(np.array(found)) - expected)[real]
    # A value on the edge between two codes may fall to the other side.
    assert float(difference.norm() / expected[real].norm()) < (2e-3 if "activations" in recipe else 1e-5)


def test_weights_stay_codes(tmp_path: Path) -> None:
    proto = written(quantized("rtn{scheme=int4:g16:asym include=*}"), tmp_path)
    kinds = [t.data_type for t in proto.graph.initializer]
    assert kinds.count(onnx.TensorProto.UINT4) >= 10
    assert not any(t.data_type == 1 and len(t.dims) == 2 and min(t.dims) > 16 and "embed" not in t.name
                   for t in proto.graph.initializer)  # fmt: skip


def test_decoding_over_caches(tmp_path: Path) -> None:
    program = quantized("rtn{scheme=int4:g16:asym include=*}, fuse, kv_cache")
    written(program, tmp_path)
    decoder, whole, at = STANDARD.lower(program).decoder(2, 16), program(input_ids=IDS)["logits"], 0
    for size in (4, 1, 3, 1):
        at += size
        logits, expected = decoder.step(IDS[:, at - size : at]), whole[:, at - 1]
        # ONNX Runtime makes MatMulNBits of it, which rounds activations to 8 bits.
        assert float((logits - expected).norm() / expected.norm()) < 3e-2


def test_the_command_lines_flag_keeps_the_backends_other_options() -> None:
    assert _standard_only("onnxruntime{threads=1}") == STANDARD
    with pytest.raises(InputError, match='--opset-only is for the backend "onnxruntime"; "reference" writes no ONNX'):
        _standard_only("reference")
