"""The walk over a program that gives an ONNX graph: fused forms where they fit, one rule an operator elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.backends.onnxruntime.graph import MICROSOFT, ONNX_DTYPES, Graph, Stored, dtype_of, sizes_of, typed
from qcompiler.errors import No
from qcompiler.program import Program, Type
from qcompiler.rewrite import named_arguments


class Unsupported(Exception):
    """Raised by a rule for a case that it cannot express; carries the No."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.no = No(reason)


@dataclass(frozen=True)
class Options:
    """How to lower: see `OnnxRuntime`, and prompt.py about `weights_given`."""

    accuracy_level: int = 4
    padding: bool = False
    max_positions: int = 8192
    opset_only: bool = False
    top: int = 0
    weights_given: bool = False


Rule = Callable[..., Any]  # (lowering, result type, *arguments in schema order) -> value or list of values
Fusion = Callable[["Lowering", fx.Node], bool | No]  # sets the values of the nodes it covers


@dataclass
class Lowering:
    """A program being lowered: the ONNX values of the nodes seen so far, and what was noted on the way.

    `rules` maps operator names (`aten.add`) to rules, `fusions` to the fused forms that are tried before them.
    `memo` holds values that several nodes share.
    """

    program: Program
    options: Options
    rules: Mapping[str, Rule]
    fusions: Mapping[str, Sequence[Fusion]]
    graph: Graph = field(default_factory=Graph)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    inputs: dict[str, ir.Value] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    refusals: list[No] = field(default_factory=list)
    node: fx.Node | None = None

    def run(self) -> dict[str, ir.Value]:
        """Lower every node; returns the outputs by name. Raises Unsupported for a node without a rule."""
        for spec, node in zip(self.program.inputs, self.program.placeholders, strict=True):
            self.values[node] = self.input(spec.name, spec.type)
        for node in self.program.graph.nodes:
            self.node = node
            if node.op == "call_function" and node not in self.values and not self.fuse(node):
                self.lower(node)
        results = self.program.output_node.args[0]
        assert isinstance(results, (tuple, list))
        return dict(zip(self.program.outputs, map(self.value, results), strict=True))

    def fuse(self, node: fx.Node) -> bool:
        """Try the fused forms that start at `node`; the reasons of those that do not fit are kept."""
        for fusion in self.fusions.get(operator_name(node), ()):
            answer = fusion(self, node)
            if answer is True:
                return True
            if isinstance(answer, No) and answer.reason:
                self.refusals.append(answer.at(node.name))
        return False

    def lower(self, node: fx.Node) -> None:
        """Lower one node by its operator's rule."""
        rule = self.rules.get(operator_name(node))
        if rule is None:
            raise Unsupported(f"{operator_name(node)} has no ONNX form here")
        kind = node.meta.get("type")
        for one in kind if isinstance(kind, tuple) else (kind,):
            if isinstance(one, Type) and one.dtype not in ONNX_DTYPES:
                raise Unsupported(f"{one.dtype} is not computed in by ONNX Runtime's CPU kernels")
        result = rule(self, kind, *map(self.argument, schema_arguments(node)))
        self.set(node, result)

    def set(self, node: fx.Node, result: Any) -> None:
        """Give `node` its value, or its list of values, with the type the program says it has."""
        kind = node.meta.get("type")
        if isinstance(result, list):
            kinds = kind if isinstance(kind, tuple) else (None,) * len(result)
            self.values[node] = [typed(v, k) if k else v for v, k in zip(result, kinds, strict=True)]
        elif isinstance(result, ir.Value):
            # A value that is passed on as it is keeps the type it has.
            self.values[node] = typed(result, kind or SCALAR) if result.type is None else result
        else:
            self.values[node] = result

    # -- arguments ---------------------------------------------------------------------------------------------

    def input(self, name: str, kind: Type) -> ir.Value:
        """The graph input of that name."""
        if name not in self.inputs:
            self.inputs[name] = self.graph.input(name, kind, DEFAULTS.get(name))
        return self.inputs[name]

    def store_input_as(self, node: fx.Node, kind: Type) -> None:
        """Let the graph input that a placeholder stands for hold values of another type, such as codes."""
        typed(self.inputs[str(node.target)], kind)

    def argument(self, argument: Any) -> Any:
        """An argument with nodes replaced by their values."""
        return fx.node.map_aggregate(argument, lambda a: self.value(a) if isinstance(a, fx.Node) else a)

    def value(self, node: fx.Node) -> Any:
        """The ONNX value (or list of values) of a node."""
        if node.op == "get_attr" and node not in self.values:
            self.values[node] = self.tensor(str(node.target))
        return self.values[node]

    def tensor(self, name: str) -> ir.Value:
        """A tensor of the program."""
        tensor = self.program.tensors[name]
        if tensor.dtype not in ONNX_DTYPES:
            raise Unsupported(f'tensor "{name}" is {tensor.dtype}, which ONNX Runtime does not compute in on a CPU')
        if tensor.numel() <= 16:
            return self.graph.constant(tensor.detach())
        return self.graph.store(name, Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor, name))

    def transposed(self, name: str) -> ir.Value:
        """A matrix of the program, transposed before it is written."""
        tensor = self.program.tensors[name]
        turned = Stored((tensor.shape[1], tensor.shape[0]), tensor.dtype, lambda: tensor.t(), f"{name}.T")
        return self.graph.store(f"{name}.T", turned)

    # -- what rules are written with ---------------------------------------------------------------------------

    def op(self, kind: str, *inputs: Any, **attributes: Any) -> ir.Value:
        """A node of the ONNX standard; numbers among its inputs become constants."""
        return self.graph.op(kind, *map(self.as_value, inputs), name=self.title, **attributes)

    def ops(self, kind: str, *inputs: Any, outputs: int, **attributes: Any) -> list[ir.Value]:
        """A node with several outputs."""
        return self.graph.ops(kind, *map(self.as_value, inputs), outputs=outputs, name=self.title, **attributes)

    def contrib(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """A node of ONNX Runtime's own operators; Unsupported where only those of the standard may be written."""
        if self.options.opset_only:
            raise Unsupported(f"{kind}, which is no operator of the ONNX standard")
        made = self.ops(kind, *inputs, outputs=outputs, domain=MICROSOFT, **attributes)
        return made[0] if outputs == 1 else made

    @property
    def label(self) -> str:
        """The name of the node being lowered."""
        return self.node.name if self.node is not None else ""

    @property
    def title(self) -> str:
        """What the ONNX nodes of the node being lowered are called: as in the ONNX model it came from, if it did."""
        if self.node is None or self.program.info.get("frontend") != "onnx":
            return self.label
        return str(self.node.meta.get("path") or self.label)

    def as_value(self, given: Any) -> ir.Value | None:
        """A value as it is, a number or a list of numbers as a constant."""
        return given if given is None or isinstance(given, ir.Value) else self.graph.constant(given)

    def cast(self, given: Any, dtype: torch.dtype) -> ir.Value:
        """A value or a number in the given dtype."""
        if not isinstance(given, ir.Value):
            return self.graph.constant(given, dtype)
        if given.type is not None and dtype_of(given) == dtype:
            return given
        made = self.op("Cast", given, to=int(ONNX_DTYPES[dtype]))
        return typed(made, Type(sizes_of(given), dtype)) if given.shape is not None else made

    def shape(self, sizes: Sequence[Any]) -> ir.Value:
        """A list of sizes, numbers or values, as an int64 vector."""
        if all(isinstance(size, int) for size in sizes):
            return self.graph.constant(list(sizes), torch.int64)
        parts = [
            self.op("Reshape", size, [1]) if isinstance(size, ir.Value) else self.graph.constant([size])
            for size in sizes
        ]
        return self.op("Concat", *parts, axis=0)

    def reshape(self, x: ir.Value, sizes: Sequence[Any], kind: Type | None = None) -> ir.Value:
        """Reshape `x`; sizes that stay where they are, and one that follows from the others, are not computed."""
        target = list(sizes)
        before = sizes_of(x) if x.shape is not None else ()
        if kind is not None:
            for i, size in enumerate(kind.shape):
                if isinstance(size, int):
                    target[i] = size
                elif i < len(before) and before[i] == size:
                    target[i] = 0
        unknown = [i for i, size in enumerate(target) if not isinstance(size, int)]
        if len(unknown) == 1 and -1 not in target:
            target[unknown[0]] = -1
        return self.op("Reshape", x, self.shape(target))

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        """The size of one axis, as an int64 number."""
        axis %= len(sizes_of(x))
        known = sizes_of(x)[axis]
        if isinstance(known, int):
            return self.graph.constant(known, torch.int64)
        key = ("size", x, axis)
        if key not in self.memo:
            vector = self.op("Shape", x, start=axis, end=axis + 1)
            self.memo[key] = typed(self.op("Squeeze", vector, [0]), SCALAR)
        value: ir.Value = self.memo[key]
        return value


SCALAR = Type((), torch.int64)
DEFAULTS = {"logits_positions": torch.tensor([-1])}  # who does not ask gets the logits of the last position


def operator_name(node: fx.Node) -> str:
    """The name rules are found by: `aten.add`, `qc.linear`, `operator.getitem`."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        return str(packet)
    return f"{getattr(target, '__module__', '').lstrip('_')}.{getattr(target, '__name__', target)}"


def schema_arguments(node: fx.Node) -> list[Any]:
    """All arguments of a call in the order of its schema, defaults included."""
    return list(named_arguments(node).values())
