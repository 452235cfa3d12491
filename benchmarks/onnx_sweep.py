"""Every model that ships with the package onnx: is it imported, written back bit for bit, and lowered again?

    python benchmarks/onnx_sweep.py [--only softmax]

Writes results/onnx_sweep.json: counts, how many nodes became operators or stayed opaque, and every reason.
`imported`: captured with the inputs that ship with it; `refused` counts why not. `verbatim`: written back, the file is
the same and gives the same bits. `lowered`: the backend onnxruntime writes a graph of its own that agrees.
"""

import argparse
import collections
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from common import write
from onnx.backend.test.case.node import collect_testcases

from qcompiler.backends.onnxruntime import OnnxRuntime
from qcompiler.errors import No, QCompilerError
from qcompiler.frontends import onnx as frontend
from qcompiler.frontends.onnx_write import export
from qcompiler.program import Program
from qcompiler.target import refusals_of

KINDS = ("simple", "light", "pytorch-converted", "pytorch-operator")
Feed = dict[str, torch.Tensor]


def models(only: str) -> Iterator[tuple[str, Any, list[Any]]]:
    """Name, ModelProto and inputs in order of every model: those in files, and those made for each operator."""
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for kind in KINDS:
        for path in sorted((data / kind).glob(f"*{only}*/model.onnx")):
            files = sorted(path.parent.glob("test_data_set_0/input_*.pb"), key=_number)
            yield path.parent.name, onnx.load(path), [_array(file) for file in files]
    for case in collect_testcases(None):
        if only in case.name and case.model is not None:
            yield case.name, case.model, list(case.data_sets[0][0])


def _array(path: Path) -> Any:
    """The array in a file; None for a sequence."""
    try:
        return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))
    except Exception:  # noqa: BLE001  protobuf and numpy raise their own
        return None


def _number(path: Path) -> int:
    return int(re.findall(r"\d+", path.name)[-1])


def inputs(proto: Any, arrays: list[Any]) -> Feed:
    """The inputs that ship with a model, by name; none at all where one is no tensor of numbers."""
    held = {t.name for t in proto.graph.initializer}
    names = [v.name for v in proto.graph.input if v.name not in held]
    try:
        return {name: torch.from_numpy(np.array(a)) for name, a in zip(names, arrays, strict=False)}
    except (TypeError, ValueError):
        return {}


def run(proto: Any, feed: Feed) -> list[Any]:
    """What ONNX Runtime gives."""
    if not feed and proto.graph.input:
        return []
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: value.numpy() for name, value in feed.items()}))


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays hold the same bytes."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def verbatim(program: Program, proto: Any, feed: Feed) -> str:
    """Why the model does not come back as it was; empty if it does."""
    back = export(program)
    if back != proto:
        return "another file"
    same = all(same_bits(a, b) for a, b in zip(run(back, feed), run(proto, feed), strict=True))
    return "" if same else "other bits"


def lowered(program: Program, feed: Feed) -> str:
    """Why the backend does not give what the program gives; empty if it does."""
    backend = OnnxRuntime(threads=1)
    refusals = list(refusals_of(program, backend))
    if refusals:
        return re.sub(r"\d+", "N", refusals[0].reason)
    if not feed and program.inputs:
        return ""
    expected = program(**feed)
    with tempfile.TemporaryDirectory() as folder:
        found = backend.lower(program, Path(folder))(feed)
    for name, value in expected.items():
        answer = frontend.same(found[name], value)
        if isinstance(answer, No):
            return f"output {name}: {answer.reason}"
    return ""


def main() -> None:
    """Try them all, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    reasons: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, proto, arrays in models(options.only):
        counts["models"] += 1
        feed = inputs(proto, arrays)
        try:
            program = frontend.capture(proto, feed or None)
        except QCompilerError as error:
            reasons["refused"][_short(str(error))] += 1
            continue
        except Exception as error:  # noqa: BLE001  whatever it is, it is counted
            reasons["refused"][_short(f"{type(error).__name__}: {error}")] += 1
            continue
        counts["imported"] += 1
        opaque = program.info["onnx"]["opaque"]
        counts["nodes"] += len(proto.graph.node)
        counts["opaque nodes"] += len(proto.graph.node) if "all" in opaque else len(opaque)
        for reason in opaque.values():
            reasons["opaque"][_short(reason)] += 1
        for what in ("verbatim", "lowered"):
            try:
                why = lowered(program, feed) if what == "lowered" else verbatim(program, proto, feed)
            except Exception as error:  # noqa: BLE001
                why = _short(f"{type(error).__name__}: {error}")
            counts[what] += not why
            if why:
                named = what == "verbatim" or why.startswith("output ")
                reasons[f"not {what}"][f"{why} ({name})" if named else why] += 1
    print(dict(counts))
    write("onnx_sweep", {"counts": dict(counts)} | {name: dict(c.most_common()) for name, c in reasons.items()})


def _short(text: str) -> str:
    """A reason without what differs from model to model."""
    text = re.sub(r'"[^"]*/', '"', text.partition("\n")[0])
    text = re.sub(r"/tmp/\w+", "a folder", text)
    text = re.sub(r"test_\w+|[A-Za-z_]*/model\.onnx", "", text)
    return re.sub(r"\d+(\.\d+)?(e[+-]\d+)?", "N", text)[:140]


if __name__ == "__main__":
    main()
