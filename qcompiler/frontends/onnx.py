"""ONNX models: operators with an ATen equivalent become it, the others run through ONNX Runtime as they are.

Every node that a rule takes is checked on data: the original runs once with all its values as outputs, and what the
rule made must give the same from the same inputs, at two sizes of the dynamic axes. Where it does not, the node
stays opaque, and `program.info["onnx"]["opaque"]` says why.
"""

import base64
import itertools
import operator
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from qcompiler.errors import CaptureError, InputError, No, require
from qcompiler.formats.onnx_blocks import CONTRIB, in_floats
from qcompiler.formats.onnx_model import DTYPES, Source, filled, read, stored_name
from qcompiler.frontends import onnx_opset
from qcompiler.frontends import onnx_sizes as sizes
from qcompiler.frontends.onnx_graph import Builder, Call
from qcompiler.frontends.onnx_rules import CONTRIB_RULES, RULES
from qcompiler.frontends.verification import compare
from qcompiler.ops import qc
from qcompiler.program import Input, Program, Type

INTEGERS = ("bits", "ones", "zeros")  # what integer inputs are tried with
WHOLE = 1e-2  # of the largest: every node was compared by itself before, and float errors grow through a deep network
Values = dict[str, Any]  # numpy arrays by name: what ONNX Runtime takes and gives

_TYPES = {
    "float": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9,
    "float16": 10, "double": 11, "uint32": 12, "uint64": 13,
}  # fmt: skip


def accepts(source: Any) -> bool | No:
    """True for the path of an .onnx file, a ModelProto, or an onnx_ir model."""
    if isinstance(source, (str, os.PathLike)):
        return Path(source).suffix.lower() == ".onnx" or No(f'"{source}" does not end in .onnx')
    kind = type(source)
    known = (kind.__name__, kind.__module__.partition(".")[0]) in (("ModelProto", "onnx"), ("Model", "onnx_ir"))
    return known or No(f"a {kind.__name__} is no ONNX model")


def capture(source: Any, example_inputs: Any = None) -> Program:
    """The Program of an ONNX model; `onnx_write.write` writes it back.

    `example_inputs` (tensors by name or in order) are what the capture is checked with; without them, random ones.
    Raises InputError for a model that is damaged or that ONNX Runtime does not load, CaptureError for one whose
    inputs or outputs are not tensors.
    """
    model = read(source)
    try:
        watched = Watched(model)
    except InputError as refused:
        old, why, model = model, refused, onnx_opset.raised(model, refused)
        watched = Watched(model)
        onnx_opset.check(old, watched.cases(_named(watched, example_inputs)), why)
        watched.tried.clear()
    foreign = watched.foreign()
    if foreign:
        return _whole(model, watched, foreign)
    cases = watched.cases(_named(watched, example_inputs))
    types = watched.types(cases)
    builder, opaque = build(model, types, watched.inputs, cases)
    program = builder.finish()
    opaque = {i: reason for i, reason in opaque.items() if i in builder.alive()}
    if opaque and not cases:
        opaque = dict.fromkeys(opaque, "no inputs were found to check it with; give example_inputs")
    program.info = _info(model, builder, opaque, types) | {"tried": watched.tried}
    answer = _agrees(program, cases)
    if isinstance(answer, No):
        everything = dict.fromkeys(range(len(model.proto.graph.node)), f"the mapped program differs: {answer.reason}")
        builder, opaque = build(model, types, watched.inputs, [], everything)
        program = builder.finish()
        program.info = _info(model, builder, opaque, types) | {"tried": watched.tried}
    return program


def _named(watched: "Watched", example_inputs: Any) -> Values | None:
    if example_inputs is None:
        return None
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    given = (
        example_inputs
        if isinstance(example_inputs, Mapping)
        else dict(zip(watched.inputs, example_inputs, strict=False))
    )
    if set(given) != set(watched.inputs):
        raise InputError(f"example inputs {sorted(given)} were given; the model takes {sorted(watched.inputs)}")
    return {name: _sample(torch.as_tensor(value).numpy(), watched.specs[name].shape) for name, value in given.items()}


def _sample(value: Any, shape: Sequence[Any]) -> Any:
    """An example input: one of several samples, where they stand along an axis of their own or one of size 1."""
    if value.ndim == len(shape) + 1:
        return np.asarray(value[0])
    return value[:1] if value.ndim and shape[0] == 1 else value


def _info(model: Source, builder: Builder, opaque: Mapping[int, str], types: Mapping[str, Type]) -> dict[str, Any]:
    """Provenance, and what `onnx_write` needs: the original without the tensors that the program holds."""
    nodes, program = model.proto.graph.node, builder.program
    packed = [part for name, part in builder.packed.items() if name in program.tensors]
    held = {name for part in packed for name in (part.codes, part.scale, part.zero)}
    kept = {n: t for n, t in model.tensors.items() if stored_name(n) not in program.tensors and n not in held}
    skeleton = base64.b64encode(filled(model.proto, kept).SerializeToString()).decode()
    return {
        "source": model.name,
        "frontend": "onnx",
        "onnx": {
            "model": skeleton,
            "metadata": {entry.key: entry.value for entry in model.proto.metadata_props},
            "types": {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in types.items()},
            "opaque": {str(i): f"{nodes[i].op_type}: {reason}" for i, reason in opaque.items()},
        },
    }


class Watched:
    """The original in ONNX Runtime, with every value of its main graph as an output."""

    def __init__(self, model: Source) -> None:
        onnx = require("onnx", "onnx")
        proto = model.complete()
        in_floats(proto)
        self.outputs = [v.name for v in proto.graph.output]
        made = dict.fromkeys(name for node in proto.graph.node for name in node.output if name)
        proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in made if n not in self.outputs)
        self.session = _session(proto, model)
        self.inputs = [spec.name for spec in self.session.get_inputs()]
        self.graph = proto.graph
        self.tried: list[tuple[dict[str, int], str]] = []  # sizes and integers that the model took
        self.specs = {s.name: s for s in [*self.session.get_inputs(), *self.session.get_outputs()]}

    def foreign(self) -> str:
        """What there is in the model that torch has no tensors for; empty if nothing."""
        for name, spec in self.specs.items():
            if _dtype(spec.type) is None:
                return f'"{name}" is a {spec.type}'
        return ""

    def run(self, feed: Values) -> Values | None:
        """All values for the given inputs, or None if the model does not take them."""
        try:
            found = self.session.run(None, feed)
        except Exception:  # noqa: BLE001 - ORT raises a dozen types for inputs a model cannot use
            return None
        names = [spec.name for spec in self.session.get_outputs()]
        return feed | dict(zip(names, map(_array, found), strict=True))

    def cases(self, given: Values | None) -> list[Values]:
        """All values for the given inputs; or for random ones, at two sizes of the dynamic axes."""
        found: list[Values] = []
        if given is not None:
            values = self.run(given)
            if values is None:
                raise InputError("ONNX Runtime does not run the model with the example inputs")
            found.append(values)
        shapes = sizes.symbols(self.specs, self.inputs)
        first, seen = sizes.first_axes(shapes), sizes.seen(shapes, given or {})
        # In the second case every free axis has another size; where the model takes no such inputs, some have.
        for some, rest, integers in itertools.product((False, True), sizes.attempts(shapes, seen), self._kinds()):
            if len(found) == 2:
                break
            before = [size.items() for size, _ in self.tried] + [seen.items()]
            if rest and any(rest.items() <= one if some else rest.items() & one for one in before):
                continue
            # The first axis shrinks while the others grow, so that no size which follows from them looks like it.
            batch = 3 if 2 in [seen.get(axis) for axis in first] else 3 - len(found)
            tried = dict.fromkeys(first, batch) | rest
            values = self.run(self._random(shapes, tried, integers, len(self.tried)))
            if values is not None:
                found.append(values)
                self.tried.append((tried, integers))
        return found

    def _kinds(self) -> tuple[str, ...]:
        """What integer inputs are tried with; once, if there are none."""
        whole = any(not (_dtype(self.specs[n].type) or torch.float32).is_floating_point for n in self.inputs)
        return INTEGERS if whole else INTEGERS[:1]

    def _random(self, shapes: Any, tried: Mapping[str, int], integers: str, seed: int) -> Values:
        feed = {}
        for i, name in enumerate(self.inputs):
            shape = [tried[d] if isinstance(d, str) else d for d in shapes[name]]
            feed[name] = sizes.random(shape, _dtype(self.specs[name].type) or torch.float32, integers, i + seed)
        return feed

    def types(self, cases: Sequence[Values]) -> dict[str, Type]:
        """The Type of every value: what ONNX Runtime infers, corrected by what was seen."""
        dtypes = {name: _dtype(spec.type) or torch.uint8 for name, spec in self.specs.items()}
        return sizes.types(self.graph, self.specs, dtypes, cases)


def _session(proto: Any, model: Source) -> Any:
    """An ONNX Runtime session without optimizations; InputError if the runtime refuses the model."""
    onnx, onnxruntime = require("onnx", "onnx"), require("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = ["CPUExecutionProvider"]
    try:
        if sum(t.nbytes for t in model.tensors.values()) < 1 << 30:
            return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=providers)
        with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:  # protobuf ends at 2 GB
            path = Path(folder, "model.onnx")
            onnx.save_model(proto, path, save_as_external_data=True, location="data")
            return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ORT raises a dozen types for models it cannot use
        reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", str(error)).partition("\n")[0]
        raise InputError(f"ONNX Runtime cannot load {model.name}: {reason}") from error


def _array(value: Any) -> Any:
    """A value of ONNX Runtime's as an array that torch takes: its uint64 has a type number that torch refuses."""
    array = np.asarray(value)
    return array.view(array.dtype.str)


def _dtype(text: str) -> torch.dtype | None:
    match = re.fullmatch(r"tensor\((\w+)\)", text)
    return DTYPES.get(_TYPES.get(match[1], 0)) if match else None


def build(
    model: Source, types: Mapping[str, Type], inputs: Sequence[str], cases: Sequence[Values],
    opaque: Mapping[int, str] | None = None,
) -> tuple[Builder, dict[int, str]]:  # fmt: skip
    """The builder of the program, and why nodes stayed opaque, by their index.

    Every mapped node is checked on `cases`; without cases none is mapped, unless `opaque` says which are not.
    """
    builder = Builder(model, types)
    builder.inputs(inputs)
    checked = [{builder.values[n]: torch.from_numpy(case[n]) for n in inputs} for case in cases]
    refused: dict[int, str] = {}
    for index, node in enumerate(model.proto.graph.node):
        builder.place = node.name or f"{node.op_type}_{index}"
        if node.output[0] in builder.constants:
            value = torch.from_numpy(np.array(builder.constants[node.output[0]]))
            builder.values[node.output[0]] = builder.constant(node.output[0], value)
            continue
        known = None if opaque is None else opaque.get(index)
        if known is None and node.output[0] in builder.dequantized:
            continue
        if known is None and (cases or opaque is not None):
            answer = _mapped(builder, node, index, checked, cases)
            if not isinstance(answer, No):
                continue
            known = answer.reason
        refused[index] = known or "nothing to check it with"
        builder.opaque(index)
        for env, case in zip(checked, cases, strict=True):
            env.update({builder.values[n]: torch.from_numpy(case[n]) for n in node.output if n})
    return builder, refused


def _mapped(
    builder: Builder, node: Any, index: int, checked: Sequence[dict[fx.Node, Any]], cases: Sequence[Values]
) -> bool | No:
    """Try the node's rule and check what it made; a No leaves the graph as it was."""
    rule = {"": RULES, "ai.onnx": RULES, CONTRIB: CONTRIB_RULES}.get(node.domain, {}).get(node.op_type)
    if rule is None:
        return No("no equivalent")
    before = set(builder.program.graph.nodes)
    try:
        made = rule(Call(builder, node))
        if not isinstance(made, No):
            made = [made] if isinstance(made, fx.Node) else list(made)
            answer = _right(builder, node, made, checked, cases)
            made = answer if isinstance(answer, No) else made
    except Exception as error:  # noqa: BLE001 - a rule that trips over a strange node costs an opaque node, not the model
        made = No(f"{type(error).__name__}: {str(error)[:80]}")
    fresh = [n for n in builder.program.graph.nodes if n not in before]
    if isinstance(made, No):
        for dead in reversed(fresh):
            builder.program.graph.erase_node(dead)
            for env in checked:
                env.pop(dead, None)
        return made
    builder.origin.update(dict.fromkeys(fresh, index))
    names = [name for name in node.output if name]
    builder.values |= dict(zip(names, made, strict=True))
    for name, value in zip(names, made, strict=True):
        if value in fresh:
            value.meta["type"] = builder.types[name]
    return True


def _right(
    builder: Builder, node: Any, made: Sequence[fx.Node], checked: Sequence[dict[fx.Node, Any]], cases: Sequence[Values]
) -> bool | No:
    """Whether the nodes made give what ONNX Runtime gave, from the same inputs."""
    seen: dict[fx.Node, list[Any]] = {}
    for env, case in zip(checked, cases, strict=True):
        for name, value in zip([n for n in node.output if n], made, strict=True):
            expected = torch.from_numpy(case[name])
            answer = same(_evaluate(value, env, builder.program.tensors, seen), expected)
            if isinstance(answer, No):
                return answer
            env[value] = expected
    for inner, values in seen.items():
        if inner.meta["type"] is None:
            inner.meta["type"] = _seen_type(inner.name, values)
    return True


def _evaluate(
    node: fx.Node, env: dict[fx.Node, Any], tensors: Mapping[str, Tensor], seen: dict[fx.Node, list[Any]]
) -> Any:
    """The value of a node, from the nearest values that are known."""
    if node in env:
        return env[node]
    if node.op == "get_attr":
        return tensors[str(node.target)]
    known = {used: _evaluate(used, env, tensors, seen) for used in node.all_input_nodes}
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda a: known[a] if isinstance(a, fx.Node) else a)
    with torch.no_grad():
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    seen.setdefault(node, []).append(env[node])
    return env[node]


def _seen_type(name: str, values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, (tuple, list)):
        return tuple(_seen_type(f"{name}_{i}", [v[i] for v in values]) for i in range(len(first)))
    if not isinstance(first, Tensor):
        return None
    shapes = list(zip(*(v.shape for v in values), strict=True))
    return Type(tuple(s[0] if len(set(s)) == 1 else f"{name}_{i}" for i, s in enumerate(shapes)), first.dtype)


def same(got: Any, expected: Tensor, loose: float = 0.0) -> bool | No:
    """Whether two values agree: integers and booleans exactly, floats to 1e-4 of the largest, NaN where NaN is.

    `loose` is another tolerance for floats.
    """
    if not isinstance(got, Tensor):
        return No("it gives no tensor")
    if expected.dtype.is_floating_point and got.dtype == expected.dtype and got.shape == expected.shape:
        odd = ~expected.isfinite()
        if not torch.equal(torch.nan_to_num(got[odd], 7.0), torch.nan_to_num(expected[odd], 7.0)):
            return No("it differs where values are not finite")
        got, expected = got.masked_fill(odd, 0), expected.masked_fill(odd, 0)
    answer = compare(got, expected, loose=loose)
    return answer if isinstance(answer, No) else True


def _agrees(program: Program, cases: Sequence[Values]) -> bool | No:
    """Whether the whole program gives what the original gave."""
    for case in cases:
        found = program(**{spec.name: torch.from_numpy(case[spec.name]) for spec in program.inputs})
        for name, value in found.items():
            answer = same(value, torch.from_numpy(case[name]), WHOLE)
            if isinstance(answer, No):
                return No(f'output "{name}": {answer.reason}')
    return True


def _whole(model: Source, watched: Watched, reason: str) -> Program:
    """The whole model as one opaque node, because it holds values that are no tensors of torch's."""
    for name in [*watched.inputs, *watched.outputs]:
        if _dtype(watched.specs[name].type) is None:
            raise CaptureError(f"{model.name}: {reason}; a program takes and gives tensors only")
    types = watched.types([])
    program = Program(fx.Graph(), {}, (), tuple(watched.outputs))
    nodes: Iterator[fx.Node] = (program.graph.placeholder(name) for name in watched.inputs)
    values = list(nodes)
    for name, node in zip(watched.inputs, values, strict=True):
        node.meta["type"] = types[name]
    program.inputs = tuple(Input(name, types[name]) for name in watched.inputs)
    data = bytearray(model.complete().SerializeToString())
    program.tensors["onnx.model"] = torch.frombuffer(data, dtype=torch.uint8)
    how: dict[str, Any] = {"op": "model", "dtype": torch.float32}
    call = program.graph.call_function(qc.onnx, (program.get("onnx.model"), values), how)
    call.meta["type"] = tuple(types[name] for name in watched.outputs)
    items = []
    for i, name in enumerate(watched.outputs):
        items.append(program.graph.call_function(operator.getitem, (call, i)))
        items[-1].meta["type"] = types[name]
    program.graph.output(tuple(items))
    program.info = {"source": model.name, "frontend": "onnx", "onnx": {"whole": reason, "opaque": {"all": reason}}}
    return program
