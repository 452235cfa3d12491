"""Where a step of decoding spends its time: the same graph with parts of it taken out, alternating step by step.

    python benchmarks/decode_parts.py FOLDER [--rounds 9]

A part's time is the median of what a step saves without it: constants stand where it was. Two sessions of each graph
are open, in any order, since equal sessions differ a little. A profiler is no use here: what it adds to every operator
is more than small operators take. Writes results/decode_parts.json.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from common import write
from cpu_page import write_page
from onnx import GraphProto, NodeProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from onnxruntime_bench import Folder, usual

BEHIND, STEPS, COPIES = 16, 64, 2
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
    opened = [("", cut_down(options, ""))]  # slower than what is opened after it, and therefore only kept
    order = ["", *counts] * COPIES
    random.shuffle(order)
    opened += [(kind, cut_down(options, kind)) for kind in order]
    engines = opened[1:]
    samples: dict[str, list[float]] = {kind: [] for kind in ("", *counts)}
    for i in range(options.rounds + 1):
        found = alternating(engines)
        if i:  # the first is thrown away
            for kind, times in found.items():
                samples[kind].extend(times)
    recipe = json.loads((options.model / "manifest.json").read_text(encoding="utf-8"))["recipe"]
    parts = {kind: {"count": count, "ms": saved(samples[""], samples[kind])} for kind, count in counts.items()}
    step = statistics.median(samples[""])
    figures = {"model": recipe, "rounds": options.rounds, "step_ms": round(step, 3), "parts": parts}
    print(parts, write("decode_parts", figures))
    write_page()


def alternating(engines: Sequence[tuple[str, Folder]]) -> dict[str, list[float]]:
    """Milliseconds of each step, a mean over the engines of one kind; all take it in turns, in another order each."""
    found: dict[str, list[float]] = {}
    for _, engine in engines:
        engine.start(BEHIND + STEPS)
    order = list(engines)
    for i in range(BEHIND + STEPS):
        random.shuffle(order)
        times: dict[str, float] = dict.fromkeys((kind for kind, _ in engines), 0.0)
        for kind, engine in order:
            start = time.perf_counter()
            engine.step([i], i + 1)
            times[kind] += (time.perf_counter() - start) * 1000 / COPIES
        if i >= BEHIND:
            for kind, ms in times.items():
                found.setdefault(kind, []).append(ms)
    return found


def saved(whole: Sequence[float], without: Sequence[float]) -> float:
    """The median difference."""
    return round(statistics.median(a - b for a, b in zip(whole, without, strict=True)), 3)


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
    settings = usual(options.threads)
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # the others need the cores
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it would fold what is constant
    with tempfile.TemporaryDirectory() as place:
        for data in options.model.glob("*.data"):
            (Path(place) / data.name).hardlink_to(data)
        onnx.save(model, Path(place) / "model.onnx")
        return Folder(argparse.Namespace(model=Path(place)), settings)


def leave_out(graph: GraphProto, kind: str) -> None:
    """Take out the nodes of a kind: what else reads them reads an input of theirs, or a constant of the same shape."""
    taken = [node for node in graph.node if kind_of(node) == kind]
    renamed = dict(read_instead(graph, node) for node in taken)
    renamed |= {node.output[3]: node.input[1] for node in taken if node.op_type == NORM}
    kept = [node for node in graph.node if node not in taken]
    for node in kept:
        node.input[:] = [followed(name, renamed) for name in node.input]
    graph.ClearField("node")
    graph.node.extend(kept)
    dropped = [end for end in graph.output if end.name in renamed]
    for end in dropped:  # of the head: its logits are an output
        graph.node.append(helper.make_node("Identity", [renamed[end.name]], [end.name]))
    if kind == "attention":  # and with it the caches
        for ends, prefix in ((graph.input, "past_"), (graph.output, "present_")):
            others = [end for end in ends if not end.name.startswith(prefix)]
            del ends[:]
            ends.extend(others)


def followed(name: str, renamed: dict[str, str]) -> str:
    """The value that stands for `name` in the end."""
    while name in renamed:
        name = renamed[name]
    return name


def read_instead(graph: GraphProto, node: NodeProto) -> tuple[str, str]:
    """A node's output, and what has its shape in a step of one token."""
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "MatMulNBits":
        return node.output[0], constant(graph, np.zeros((1, 1, sizes["N"]), np.float32))
    if node.op_type == ATTENTION:
        width = next(end for end in graph.input if end.name == node.input[3]).type.tensor_type.shape.dim[3].dim_value
        return node.output[0], constant(graph, np.zeros((1, 1, sizes["num_heads"] * width), np.float32))
    return node.output[0], node.input[1 if node.op_type == NORM else 0]


def constant(graph: GraphProto, value: np.ndarray) -> str:
    """The name of an initializer that holds `value`."""
    name = f"stand-in.{value.shape}"
    if all(known.name != name for known in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(value, name))
    return name


if __name__ == "__main__":
    main()
