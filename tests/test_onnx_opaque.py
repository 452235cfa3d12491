"""Weights that operators without an equivalent read, in subgraphs too: seen by passes, rounded, decoded at loading."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.compiler import capture, compile
from qcompiler.errors import BackendError
from qcompiler.frontends.onnx_write import export
from qcompiler.passes.matrices import read_by_opaque
from tests.test_onnx_frontend import model, runtime

onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
helper = onnx.helper
FLOAT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL


def chance(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lstm() -> Any:
    """A recurrent layer whose weights come in another order than they are stored in; some rows are loud."""
    nodes = [
        helper.make_node("Slice", ["w", "zero", "half", "zero"], ["front"]),
        helper.make_node("Slice", ["w", "half", "whole", "zero"], ["back"]),
        helper.make_node("Concat", ["back", "front"], ["turned"], axis=0),
        helper.make_node("Unsqueeze", ["turned", "zero"], ["stacked"]),
        helper.make_node("LSTM", ["x", "stacked", "r"], ["y"], name="recurrent", hidden_size=32),
    ]
    weights = chance(128, 48) / 8
    weights[::5] *= 30
    numbers = {"zero": np.array([0]), "half": np.array([64]), "whole": np.array([128])}
    tensors = {"w": weights, "r": chance(1, 128, 32, seed=1) / 8, **numbers}
    return model(nodes, {"x": [7, "n", 48]}, ["y"], **tensors)


def branches(shared: bool = False) -> Any:
    """An If whose branches hold a weight each: one as an initializer, one as a Constant (if `shared`, of one name)."""
    first = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["a"])], "yes", [], [onnx.ValueInfoProto(name="a")],
        [onnx.numpy_helper.from_array(chance(64, 64, seed=1), "w")],
    )  # fmt: skip
    name = "w" if shared else "v"
    constant = helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(chance(64, 64, seed=2)))
    second = helper.make_graph(
        [constant, helper.make_node("MatMul", ["x", name], ["b"])], "no", [], [onnx.ValueInfoProto(name="b")]
    )
    nodes = [helper.make_node("If", ["flag"], ["y"], name="choice", then_branch=first, else_branch=second)]
    return model(nodes, {"x": ["n", 64], "flag": (BOOL, [])}, ["y"])


def floats(path: Path) -> list[str]:
    """The large float tensors of a file, wherever they stand."""
    found, graphs = [], [onnx.load(path).graph]
    for graph in graphs:
        tensors = list(graph.initializer)
        for node in graph.node:
            graphs += [a.g for a in node.attribute if a.HasField("g")]
            tensors += [a.t for a in node.attribute if a.HasField("t")]
        found += [t.name for t in tensors if t.data_type == FLOAT and np.prod(t.dims) > 1000]
    return found


def error(proto: Any, recipe: str, feed: dict[str, torch.Tensor], folder: Path) -> float:
    """How far the compiled model is from the original; it is left in `folder`."""
    session = compile(proto, recipe, calibration=[feed], backend="onnxruntime")
    session.save(folder / "out")
    (expected,) = runtime(proto, feed)
    return float((session(**feed) - expected).norm() / expected.norm())


def test_weights_of_a_recurrent_layer(tmp_path: Path) -> None:
    """Views of a weight lead to the layer; ONNX Runtime computes them, and the floats, when it loads the file."""
    import onnxruntime as ort

    feed = {"x": torch.from_numpy(chance(7, 3, 48, seed=5))}
    assert error(lstm(), "w8a8-static", feed, tmp_path) < 0.03
    path = tmp_path / "out" / "model.onnx"
    assert not floats(path)
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 4
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["LSTM"]


def test_each_output_has_its_scale(tmp_path: Path) -> None:
    """One scale for the whole weight would round the quiet rows away."""
    feed = {"x": torch.from_numpy(chance(7, 3, 48, seed=5))}
    recipes = [f"canonicalize, rtn{{include=* opaque=int8:{grid}:sym}}" for grid in ("channel", "tensor")]
    by_row, whole = (error(lstm(), recipe, feed, tmp_path / recipe[-8:-5]) for recipe in recipes)
    assert by_row < 0.5 * whole


@pytest.mark.parametrize("flag", [True, False])
def test_weights_in_the_branches_of_an_if(flag: bool, tmp_path: Path) -> None:
    feed = {"x": torch.from_numpy(chance(5, 64, seed=3)), "flag": torch.tensor(flag)}
    assert error(branches(), "w8a8-static", feed, tmp_path) < 0.01
    path = tmp_path / "out" / "model.onnx"
    assert not floats(path)
    assert "If" in [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_what_is_lifted_means_the_same_and_goes_back(shared: bool, flag: bool) -> None:
    """A name that both branches give a value to stays where it is."""
    proto = branches(shared)
    program = capture(proto)
    feed = {"x": torch.from_numpy(chance(5, 64, seed=3)), "flag": torch.tensor(flag)}
    torch.testing.assert_close(program(**feed)["y"], runtime(proto, feed)[0])
    assert export(program) == proto
    assert len(read_by_opaque(program)) == (0 if shared else 2)


def test_a_constant_that_a_branch_gives_stays_in_it() -> None:
    def branch(name: str, seed: int) -> Any:
        value = onnx.numpy_helper.from_array(chance(40, 40, seed=seed), name)
        return helper.make_graph([], name, [], [helper.make_tensor_value_info(name, FLOAT, [40, 40])], [value])

    node = helper.make_node("If", ["flag"], ["y"], then_branch=branch("a", 1), else_branch=branch("b", 2))
    proto = model([node], {"flag": (BOOL, [])}, ["y"])
    program = capture(proto)
    for flag in (True, False):
        feed = {"flag": torch.tensor(flag)}
        assert torch.equal(program(**feed)["y"], runtime(proto, feed)[0])
    assert not read_by_opaque(program)


def test_a_change_inside_a_subgraph_is_not_written_back() -> None:
    program = capture(branches())
    name = next(name for name in program.tensors if name.endswith(".w"))
    program.tensors[name] = program.tensors[name] * 2
    with pytest.raises(BackendError, match="of a subgraph has other values"):
        export(program)
