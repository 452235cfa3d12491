"""The ONNX front end: what ONNX Runtime computes, written back as it was, and files that are not to be trusted."""

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.errors import BackendError, CaptureError, InputError, No
from qcompiler.frontends import onnx as frontend
from qcompiler.frontends.onnx_write import export, packed, write
from qcompiler.ops import qc
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme

onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
helper, numpy_helper, FLOAT, INT64 = onnx.helper, onnx.numpy_helper, 1, 7

aten = torch.ops.aten


def model(nodes: list[Any], inputs: dict[str, Any], outputs: list[str], opset: int = 17, **tensors: Any) -> Any:
    """A model of some nodes; an input is a shape (float) or a pair of type and shape."""
    kinds = {n: s if isinstance(s, tuple) else (FLOAT, s) for n, s in inputs.items()}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in kinds.items()],
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def runtime(proto: Any, feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What ONNX Runtime gives."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(v) for v in session.run(None, {n: t.numpy() for n, t in feed.items()})]


def targets(program: Program) -> set[Any]:
    return {node.target for node in program.calls()}


def silero(name: str) -> Path:
    """A file of the package silero-vad, which can be found without torchaudio, but not imported."""
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package silero-vad is not installed; `make dev` installs it")
    return Path(spec.submodule_search_locations[0]) / "data" / name


@pytest.fixture
def mlp() -> Any:
    chance = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "v", "b"], ["y"], name="second", transB=1),
    ]
    weights = {"w": chance.normal(size=(64, 48)), "v": chance.normal(size=(10, 48)), "b": chance.normal(size=10)}
    proto = model(nodes, {"x": ["n", 64]}, ["y"], **{n: w.astype(np.float32) for n, w in weights.items()})
    proto.doc_string = "a doc string"
    helper.set_model_props(proto, {"author": "nobody"})
    return proto


def test_accepts(mlp: Any) -> None:
    assert frontend.accepts("a/model.onnx") is True
    assert frontend.accepts(mlp) is True
    assert isinstance(frontend.accepts("model.gguf"), No)
    assert isinstance(frontend.accepts(torch.nn.Linear(1, 1)), No)


def test_products_become_linear_layers(mlp: Any) -> None:
    program = frontend.capture(mlp)
    program.verify()
    assert [node.target for node in program.calls()] == [
        aten.linear.default,
        aten.relu.default,
        aten.linear.default,
    ]
    assert program.tensors["w"].shape == (48, 64)  # [n, k], as linear layers want it
    x = torch.randn(3, 64)
    torch.testing.assert_close(program(x=x)["y"], runtime(mlp, {"x": x})[0], rtol=1e-4, atol=1e-4)


def test_types_keep_dynamic_names(mlp: Any) -> None:
    program = frontend.capture(mlp)
    assert [str(node.meta["type"]) for node in program.calls()] == [
        "float32[n, 48]",
        "float32[n, 48]",
        "float32[n, 10]",
    ]
    assert [node.meta["path"] for node in program.calls()] == ["first", "relu", "second"]


def test_unchanged_model_is_written_verbatim(mlp: Any, tmp_path: Path) -> None:
    write(frontend.capture(mlp), tmp_path / "back.onnx")
    assert onnx.load(tmp_path / "back.onnx") == mlp
    assert [file.name for file in tmp_path.iterdir()] == ["back.onnx"]


def test_changed_tensor_is_written(mlp: Any) -> None:
    program = frontend.capture(mlp)
    program.tensors["w"] = program.tensors["w"] * 2
    x = torch.randn(3, 64)
    torch.testing.assert_close(runtime(export(program), {"x": x})[0], program(x=x)["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int4:g16:asym", "int4:g32", "int8:g64:asym", "int8:g64", "int2:g16:asym"])
def test_quantized_linear_layers_are_written_as_matmul_nbits(mlp: Any, scheme: str) -> None:
    program = frontend.capture(mlp)
    for name in ("w", "v"):
        program.quantize_tensor(name, QTensor.quantize(program.tensors[name], Scheme.parse(scheme)))
    made = export(program)
    assert [node.op_type for node in made.graph.node] == ["MatMulNBits", "Relu", "MatMulNBits"]
    assert [node.name for node in made.graph.node] == ["first", "relu", "second"]
    assert "w" not in [tensor.name for tensor in made.graph.initializer]
    x = torch.randn(3, 64)
    torch.testing.assert_close(runtime(made, {"x": x})[0], program(x=x)["y"], rtol=1e-4, atol=1e-4)


def test_what_matmul_nbits_cannot_hold_is_refused(mlp: Any) -> None:
    program = frontend.capture(mlp)
    program.quantize_tensor("w", QTensor.quantize(program.tensors["w"], Scheme.parse("int3:g16")))
    with pytest.raises(BackendError, match="3 bits, not 2, 4 or 8"):
        export(program)
    assert isinstance(packed(QTensor.quantize(torch.randn(4, 480), Scheme.parse("int4:channel"))), No)


def test_another_graph_is_refused(mlp: Any) -> None:
    program = frontend.capture(mlp)
    (relu,) = program.calls(aten.relu.default)
    program.replace(relu, aten.sigmoid.default, relu.args)
    with pytest.raises(BackendError, match="cannot be written back"):
        export(program)


def test_a_program_from_elsewhere_is_refused(mlp: Any) -> None:
    program = frontend.capture(mlp)
    program.info.clear()
    with pytest.raises(InputError, match="not captured from an ONNX model"):
        export(program)


def test_onnx_ir_model(mlp: Any) -> None:
    ir = pytest.importorskip("onnx_ir", reason="the extra [onnx] is not installed")
    x = torch.randn(2, 64)
    torch.testing.assert_close(
        frontend.capture(ir.from_proto(mlp))(x=x)["y"], runtime(mlp, {"x": x})[0], rtol=1e-4, atol=1e-4
    )


def test_dynamic_reshape_follows_the_input() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["batch"]),
        helper.make_node("Unsqueeze", ["batch", "axes"], ["front"]),
        helper.make_node("Concat", ["front", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    constants = {"zero": np.int64(0), "axes": np.array([0]), "rest": np.array([-1, 4])}
    proto = model(nodes, {"x": ["batch", 6, 2]}, ["y"], **constants)
    program = frontend.capture(proto)
    assert targets(program) == {aten.sym_size.int, aten.reshape.default}
    for batch in (1, 5):
        x = torch.randn(batch, 6, 2)
        assert torch.equal(program(x=x)["y"], runtime(proto, {"x": x})[0])


def test_old_softmax_over_several_axes_stays_opaque() -> None:
    node = helper.make_node("Softmax", ["x"], ["y"], axis=1)
    old, new = (model([node], {"x": [2, 3, 4]}, ["y"], opset=opset) for opset in (11, 13))
    assert targets(frontend.capture(new)) == {aten.softmax.int}
    program = frontend.capture(old)
    assert qc.onnx in targets(program)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(program(x=x)["y"], runtime(old, {"x": x})[0])


def test_integer_division_is_towards_zero() -> None:
    proto = model([helper.make_node("Div", ["a", "b"], ["y"])], {"a": (INT64, [2]), "b": (INT64, [2])}, ["y"])
    feed = {"a": torch.tensor([-7, 7]), "b": torch.tensor([2, -2])}
    assert torch.equal(frontend.capture(proto, feed)(**feed)["y"], torch.tensor([-3, -3]))


def test_a_rule_that_errs_costs_an_opaque_node(monkeypatch: pytest.MonkeyPatch, mlp: Any) -> None:
    monkeypatch.setitem(frontend.RULES, "Relu", lambda call: call.emit(aten.sigmoid.default, call.value(0)))
    program = frontend.capture(mlp)
    assert qc.onnx in targets(program)
    assert "differs by" in program.info["onnx"]["opaque"]["1"]
    assert export(program) == mlp


def test_weights_shared_by_product_and_lookup() -> None:
    table = np.random.default_rng(0).normal(size=(50, 24)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h"]),
        helper.make_node("Transpose", ["table"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "t"], ["y"]),
    ]
    proto = model(nodes, {"ids": (INT64, ["b", "s"])}, ["y"], table=table)
    program = frontend.capture(proto)
    assert aten.embedding.default in targets(program)
    ids = torch.randint(0, 50, (2, 5))
    torch.testing.assert_close(program(ids=ids)["y"], runtime(proto, {"ids": ids})[0])
    assert export(program) == proto


def test_branches_see_outer_values() -> None:
    def branch(op: str) -> Any:
        return helper.make_graph([helper.make_node(op, ["x", "c"], ["r"])], op, [], [onnx.ValueInfoProto(name="r")])

    node = helper.make_node("If", ["which"], ["y"], then_branch=branch("Add"), else_branch=branch("Mul"))
    proto = model([node], {"x": [4], "which": (9, [])}, ["y"], c=np.full(4, 3, np.float32))
    program = frontend.capture(proto)
    x = torch.randn(4)
    assert torch.equal(program(x=x, which=torch.tensor(True))["y"], x + 3)
    assert torch.equal(program(x=x, which=torch.tensor(False))["y"], x * 3)
    assert export(program) == proto


def test_custom_domain_and_functions_stay_as_they_are() -> None:
    twice = helper.make_function("my", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
                                 [helper.make_opsetid("", 17)])  # fmt: skip
    proto = model([helper.make_node("Twice", ["x"], ["y"], domain="my")], {"x": [3]}, ["y"])
    proto.functions.append(twice)
    proto.opset_import.append(helper.make_opsetid("my", 1))
    program = frontend.capture(proto)
    x = torch.randn(3)
    assert torch.equal(program(x=x)["y"], 2 * x)
    assert export(program) == proto


def test_sequences_inside_make_the_whole_model_opaque() -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["s"]),
        helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=0),
    ]
    proto = model(nodes, {"x": ["n", 2]}, ["y"])
    program = frontend.capture(proto)
    x = torch.randn(3, 2)
    assert torch.equal(program(x=x)["y"], torch.cat([x, x]))
    assert "seq(tensor(float))" in program.info["onnx"]["whole"]
    assert export(program) == proto


def test_sequences_outside_are_refused() -> None:
    proto = model([helper.make_node("SequenceConstruct", ["x"], ["y"])], {"x": [2]}, ["y"])
    with pytest.raises(CaptureError, match="takes and gives tensors only"):
        frontend.capture(proto)


@pytest.mark.parametrize("name", ["silero_vad", "silero_vad_16k_op15", "silero_vad_half", "silero_vad_op18_ifless"])
def test_silero(name: str, tmp_path: Path) -> None:
    path = silero(f"{name}.onnx")
    original = onnx.load(path)
    half = name.endswith("half")
    kind = torch.float16 if original.graph.input[0].type.tensor_type.elem_type == 10 else torch.float32
    sound = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    feed = {"input": sound.to(kind), "state": torch.zeros(2, 1, 128).to(kind)}
    feed |= {} if half else {"sr": torch.tensor(16000)}
    program = frontend.capture(path, feed)
    expected = runtime(original, feed)
    for got, reference in zip(program(**feed).values(), expected, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5)
    write(program, tmp_path / "back.onnx")
    written = onnx.load(tmp_path / "back.onnx")
    assert written == original
    assert all(torch.equal(a, b) for a, b in zip(runtime(written, feed), expected, strict=True))


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_encoder_exported_by_torch(dynamo: bool, tmp_path: Path) -> None:
    if dynamo:
        pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs it")
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64, vocab_size=99)
    bert = BertModel(config, add_pooling_layer=False).eval()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            states: torch.Tensor = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
            return states

    ids = torch.randint(0, 99, (2, 9))
    names, path = ["input_ids", "attention_mask"], tmp_path / "bert.onnx"
    sizes = {0: "batch", 1: "sequence"}
    how = (
        {"dynamic_shapes": (sizes, sizes), "verbose": False}
        if dynamo
        else {"dynamic_axes": dict.fromkeys(names, sizes)}
    )
    torch.onnx.export(Encoder(), (ids, torch.ones_like(ids)), path, dynamo=dynamo, input_names=names, **how)
    program = frontend.capture(path)
    assert len(program.linears()) == 12
    ids = torch.randint(0, 99, (3, 6))
    feed = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3])}
    (expected,) = runtime(onnx.load(path), feed)[:1]
    torch.testing.assert_close(next(iter(program(**feed).values())), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(runtime(export(program), feed)[0], expected)


def shipped() -> Iterator[Path]:
    """Folders of small models with inputs and outputs that ship with onnx."""
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    return (
        path.parent
        for kind in ("pytorch-converted", "pytorch-operator")
        for path in sorted((data / kind).glob("*/model.onnx"))
    )


def test_models_that_ship_with_onnx() -> None:
    passed = 0
    for folder in shipped():
        try:
            program = frontend.capture(folder / "model.onnx")
        except InputError as error:
            assert "NOT_IMPLEMENTED" in str(error), folder  # noqa: PT017 - ONNX Runtime has no kernels for opset 6
            continue
        read = [
            [numpy_helper.to_array(onnx.load_tensor(f)) for f in sorted(folder.glob(f"test_data_set_0/{kind}_*.pb"))]
            for kind in ("input", "output")
        ]
        feed = {spec.name: torch.from_numpy(np.array(v)) for spec, v in zip(program.inputs, read[0], strict=True)}
        for got, expected in zip(program(**feed).values(), read[1], strict=True):
            torch.testing.assert_close(
                got, torch.from_numpy(np.array(expected)), rtol=1e-3, atol=1e-4, equal_nan=True, msg=folder.name
            )
        original = onnx.load(folder / "model.onnx")
        if original.opset_import[0].version > 6:  # for older ones ONNX Runtime has few kernels: they are converted
            assert export(program) == original, folder
        passed += 1
    assert passed > 60


# -- files that are not to be trusted ------------------------------------------------------------------------


def external(mlp: Any, folder: Path) -> Path:
    """The model with its weights in a file beside it."""
    copy = onnx.ModelProto.FromString(mlp.SerializeToString())  # saving changes the model
    onnx.save_model(copy, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return folder / "m.onnx"


def test_external_data(mlp: Any, tmp_path: Path) -> None:
    program = frontend.capture(external(mlp, tmp_path))
    x = torch.randn(2, 64)
    torch.testing.assert_close(program(x=x)["y"], runtime(mlp, {"x": x})[0], rtol=1e-4, atol=1e-4)
    write(program, tmp_path / "back.onnx")
    assert torch.equal(runtime(onnx.load(tmp_path / "back.onnx"), {"x": x})[0], runtime(mlp, {"x": x})[0])


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("location", "../m.data", "outside the model's folder"),
        ("location", "/etc/passwd", "outside the model's folder"),
        ("location", "", "outside the model's folder"),
        ("location", "other.data", "is missing"),
        ("offset", str(2**62), "is not in"),
        ("offset", "-8", "is not in"),
        ("offset", "many", "not a number"),
        ("length", "4", "is not in"),
        ("length", str(2**62), "is not in"),
    ],
)
def test_hostile_external_data(mlp: Any, tmp_path: Path, key: str, value: str, reason: str) -> None:
    path = external(mlp, tmp_path)
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=reason) as error:
        frontend.capture(path)
    assert "\n" not in str(error.value)


def test_external_data_through_a_link(mlp: Any, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = external(mlp, inside)
    (inside / "m.data").rename(tmp_path / "m.data")
    (inside / "m.data").symlink_to(tmp_path / "m.data")
    with pytest.raises(InputError, match="outside the model's folder"):
        frontend.capture(path)


def _cycle(proto: Any) -> None:
    proto.graph.node[0].input[0] = "y"


def _gone(proto: Any) -> None:
    del proto.graph.node[1]


def _twice(proto: Any) -> None:
    proto.graph.node.add().CopyFrom(proto.graph.node[1])


def _output(proto: Any) -> None:
    proto.graph.output[0].name = "nowhere"


def _huge(proto: Any) -> None:
    proto.graph.initializer[0].dims[:] = [2**40, 2**40]


def _negative(proto: Any) -> None:
    proto.graph.initializer[0].dims[:] = [-64, -48]


def _kind(proto: Any) -> None:
    proto.graph.initializer[0].data_type = 999


def _operator(proto: Any) -> None:
    proto.graph.node[1].op_type = "Frobnicate"


def _opset(proto: Any) -> None:
    del proto.opset_import[:]


DAMAGE = {
    _cycle: "before anything produces it",
    _gone: "before anything produces it",
    _twice: "produced twice",
    _output: "nothing produces its output",
    _huge: "holds 3072 numbers",
    _negative: "has shape",
    _kind: "unknown element type 999",
    _operator: "Frobnicate",
    _opset: "no opset",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damaged_model_gets_one_sentence(mlp: Any, damage: Any, tmp_path: Path) -> None:
    damage(mlp)
    (tmp_path / "m.onnx").write_bytes(mlp.SerializeToString())
    with pytest.raises(InputError, match=DAMAGE[damage]) as error:
        frontend.capture(tmp_path / "m.onnx")
    assert "\n" not in str(error.value)


def test_cut_or_missing_file(mlp: Any, tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", mlp.SerializeToString()
    with pytest.raises(InputError, match="cannot read"):
        frontend.capture(path)
    for end in (0, 1, 10, 100, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(InputError):
            frontend.capture(path)


def test_damaged_bytes_are_read_or_refused(mlp: Any, tmp_path: Path) -> None:
    data, path, chance = mlp.SerializeToString(), tmp_path / "m.onnx", random.Random(0)
    structure = [i for i in range(len(data)) if i < 200 or i > len(data) - 200]
    for _ in range(100):
        damaged = bytearray(data)
        damaged[chance.choice(structure)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            frontend.capture(path)
        except (InputError, CaptureError):
            continue


def test_wrong_example_inputs(mlp: Any) -> None:
    with pytest.raises(InputError, match="the model takes"):
        frontend.capture(mlp, {"z": torch.zeros(1)})
    with pytest.raises(InputError, match="example inputs"):
        frontend.capture(mlp, {"x": torch.zeros(2, 3)})
