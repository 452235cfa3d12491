"""Where a step of decoding spends its time: the same graph with parts of it taken out, alternating in one run.

    python benchmarks/decode_parts.py FOLDER [--rounds 9]

A part's time is the median of what each round saves without it. A profiler is no use here: what it adds to every
operator is more than small operators take. Writes results/decode_parts.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from common import write
from cpu_page import write_page
from onnx import GraphProto, NodeProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from onnxruntime_bench import Folder

NORM, ATTENTION = "SkipSimplifiedLayerNormalization", "GroupQueryAttention"
SMALL = {"QuickGelu": "activations", NORM: "norms and sums", ATTENTION: "attention"}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FOLDER", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    graph = onnx.load(options.model / "model.onnx", load_external_data=False).graph
    kinds = [kind for node in graph.node if (kind := kind_of(node))]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    engines = {kind: cut_down(options, kind) for kind in ("", *counts)}
    samples: dict[str, list[float]] = {kind: [] for kind in engines}
    for i in range(options.rounds + 1):  # the first is thrown away
        for kind, engine in list(engines.items())[:: 1 if i % 2 else -1]:
            samples[kind].append(engine.decode(list(range(16)), 64) / 64 * 1000)
    whole = samples[""][1:]
    recipe = json.loads((options.model / "manifest.json").read_text(encoding="utf-8"))["recipe"]
    parts = {
        kind: {
            "count": count,
            "ms": round(statistics.median(a - b for a, b in zip(whole, samples[kind][1:], strict=True)), 3),
        }
        for kind, count in counts.items()
    }
    figures = {"model": recipe, "rounds": options.rounds, "step_ms": round(statistics.median(whole), 3)}
    print(parts, write("decode_parts", figures | {"parts": parts}))
    write_page()


def kind_of(node: NodeProto) -> str:
    """What a node is counted as; empty for what is never taken out."""
    if node.op_type == "MatMulNBits":
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        return f"{sizes['bits']}-bit matrices {sizes['N']} x {sizes['K']}"
    return SMALL.get(node.op_type, "")


def cut_down(options: argparse.Namespace, kind: str) -> Folder:
    """The graph without the operators of a kind, opened; its weights are read from where they are."""
    model = onnx.load(options.model / "model.onnx", load_external_data=False)
    if kind:
        leave_out(model.graph, kind)
    with tempfile.TemporaryDirectory() as place:
        for data in options.model.glob("*.data"):
            (Path(place) / data.name).hardlink_to(data)
        onnx.save(model, Path(place) / "model.onnx")
        return Folder(argparse.Namespace(model=Path(place), threads=options.threads))


def leave_out(graph: GraphProto, kind: str) -> None:
    """Replace the nodes of a kind by nearly nothing of the same shape."""
    taken = [node for node in graph.node if kind_of(node) == kind]
    renamed = {
        node.output[i]: node.input[1] for node in taken if node.op_type == NORM for i in (0, 3)[: len(node.output)]
    }
    renamed |= {node.output[0]: node.input[0] for node in taken if node.op_type == "QuickGelu"}
    nodes = [new for node in graph.node for new in (stand_in(graph, node) if node in taken else [node])]
    for node in nodes:
        node.input[:] = [followed(name, renamed) for name in node.input]
    graph.ClearField("node")
    graph.node.extend(nodes)
    if kind == "attention":  # and with it the caches
        for ends, prefix in ((graph.input, "past_"), (graph.output, "present_")):
            kept = [end for end in ends if not end.name.startswith(prefix)]
            del ends[:]
            ends.extend(kept)


def followed(name: str, renamed: dict[str, str]) -> str:
    """The value that stands for `name` in the end."""
    while name in renamed:
        name = renamed[name]
    return name


def stand_in(graph: GraphProto, node: NodeProto) -> Iterator[NodeProto]:
    """Cheap nodes that give values of the same shape as `node`; none where its input does."""
    if node.op_type == ATTENTION:
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        queries, keys = sizes["num_heads"], sizes["kv_num_heads"]
        width = next(end for end in graph.input if end.name == node.input[3]).type.tensor_type.shape.dim[3].dim_value
        split = constant(graph, np.array([queries * width, 2 * keys * width]))
        yield helper.make_node("Split", [node.input[0], split], [node.output[0], f"{node.output[0]}.rest"], axis=-1)
    elif node.op_type == "MatMulNBits":
        rows = next(attribute.i for attribute in node.attribute if attribute.name == "N")
        largest = f"{node.output[0]}.largest"
        yield helper.make_node("ReduceMax", [node.input[0], constant(graph, np.array([-1]))], [largest])
        zeros = constant(graph, np.zeros((1, 1, rows), np.float32))
        yield helper.make_node("Add", [largest, zeros], [node.output[0]])


def constant(graph: GraphProto, value: np.ndarray) -> str:
    """The name of an initializer that holds `value`."""
    name = f"stand-in.{value.shape}.{value.dtype}.{value.flat[0]}"
    if all(known.name != name for known in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(value, name))
    return name


if __name__ == "__main__":
    main()
