"""torch.export -> Program: weights beside the graph, named dynamic sizes, module paths, guards gone.

The part that every front end for PyTorch shares. What may go wrong is said as a CaptureError in one sentence; whether
the program computes what the module does is for `verification` to find out.
"""

import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from qcompiler import ops
from qcompiler.errors import CaptureError
from qcompiler.program import Input, Program, Type, type_of

Sizes = Mapping[str, Mapping[int, str]]  # input name -> dimension -> name of the dynamic size

# Checks that export leaves in the graph. They have no result; the sizes they speak of are verified on data instead.
_CHECKS = {
    "aten._assert_async.msg",
    "aten._assert_scalar.default",
    "aten._assert_tensor_metadata.default",
    "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default",
}
_SAME = {
    "aten.alias.default",
    "aten.detach.default",
    "aten.lift_fresh.default",
    "aten.lift_fresh_copy.default",
}
_WRAPPERS = {
    "wrap_with_set_grad_enabled": 1,
    "wrap_with_autocast": 4,
}  # where their subgraph stands in the arguments
_ROOT = "module"


class _Call(nn.Module):
    """A module, and how to call it on a flat list of tensors."""

    def __init__(self, module: nn.Module, call: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.call(*inputs)


def export(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    sizes: Sizes,
    call: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    *,
    defaults: Mapping[str, str] | None = None,
    limits: Mapping[str, int] | None = None,
) -> Program:
    """Export `call(inputs)`, which runs `module` (in eval mode) and names its outputs, as a Program.

    `inputs` are example tensors by name; `sizes` names their dynamic dimensions (equal names are equal sizes), the
    others are fixed. `defaults` are the Input defaults, `limits` the largest dynamic sizes, where there are any.
    Raises CaptureError where the module cannot be exported.
    """
    ops.load()
    outputs: list[str] = []

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        found = call(dict(zip(inputs, values, strict=True)))
        outputs[:] = found
        return tuple(found.values())

    root = _Call(module, flat)
    ranges = {name: {"min": 1, "max": limit} for name, limit in (limits or {}).items() if limit}
    with torch.no_grad(), evaluating(module), _quiet():
        try:
            exported = _trace(root, inputs, sizes, ranges)
        except Exception as error:  # noqa: BLE001  a stranger's module may raise anything while it is traced
            exported = _trace_again(root, inputs, sizes, ranges, error)
    return _Lifter(exported, list(inputs), outputs, sizes, defaults or {}).program()


def _trace(
    root: nn.Module,
    inputs: Mapping[str, Tensor],
    sizes: Sizes,
    ranges: Mapping[str, Any],
    *,
    proven: bool = True,
) -> ExportedProgram:
    """Export with the named dynamic sizes within their ranges, to a graph where no node writes to its arguments.

    `proven`: refuse a module with conditions on sizes that export cannot prove within the ranges.
    """
    names = {name for named in sizes.values() for name in named.values()}
    dims = {name: Dim(name, **ranges.get(name, {})) if proven else Dim.DYNAMIC for name in names}
    shapes = tuple({d: dims[n] for d, n in sizes.get(name, {}).items()} or None for name in inputs)
    exported = torch.export.export(
        root,
        tuple(inputs.values()),
        dynamic_shapes={"inputs": shapes},
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=not proven,
    )
    return exported.run_decompositions({}) if _changes_tensors(exported.graph_module) else exported


def _trace_again(
    root: nn.Module, inputs: Mapping[str, Tensor], sizes: Sizes, ranges: Mapping[str, Any], error: Exception
) -> ExportedProgram:
    """A second try for a module whose conditions on sizes export could not prove.

    The conditions are dropped: whether they hold is verified on data. A size that became a constant has no second try.
    """
    if "Constraints violated" in str(error) and "specialized" not in str(error):
        try:
            return _trace(root, inputs, sizes, ranges, proven=False)
        except Exception as again:  # noqa: BLE001  as above
            error = again
    raise CaptureError(f"torch.export cannot trace this module: {first_line(error)}") from error


def check_weights(model: nn.Module) -> None:
    """CaptureError if a parameter holds NaN, or nothing at all, or is on a GPU."""
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise CaptureError(f'the weight "{name}" has no data; load the model before capturing it')
        if tensor.device.type != "cpu":
            raise CaptureError(
                f'the weight "{name}" is on {tensor.device}, and programs are made on the CPU: capture model.cpu(); '
                "the backend triton brings it back to a GPU, and torch.compile takes the model where it is"
            )
        if bool(tensor.isnan().any()):
            raise CaptureError(f'the weight "{name}" holds NaN; the file is damaged or training diverged')


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """All submodules in eval mode, and as they were before afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _quiet() -> Iterator[None]:
    """Export's own log of a failed attempt is not the user's to read; our error says it in a sentence."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx", "torch._dynamo")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def first_line(error: BaseException) -> str:
    """The kind of an error and its first line, with the next where that says what the first announces."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and "Constraints violated" in lines[0] else 1])
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def _changes_tensors(graph_module: fx.GraphModule) -> bool:
    """Whether any node writes to its arguments; passes want a graph where each value is made once."""
    for part in graph_module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                schema = getattr(node.target, "_schema", None)
                if schema is not None and schema.is_mutable:
                    return True
    return False


class _Lifter:
    """Copies an exported graph into a Program's: parameters become get_attr, wrappers are inlined, checks dropped."""

    def __init__(
        self,
        exported: ExportedProgram,
        names: Sequence[str],
        outputs: Sequence[str],
        sizes: Sizes,
        defaults: Mapping[str, str],
    ) -> None:
        self.exported = exported
        self.names = names
        self.outputs = outputs
        self.sizes = sizes
        self.defaults = defaults
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.inputs: list[Input] = []
        self.symbols: dict[str, str] = {}
        self.lifted: dict[str, fx.Node] = {}  # tensor name -> its get_attr node
        self.stored: dict[fx.Node, str] = {}  # placeholder -> tensor name
        self.named: dict[str, fx.Node] = {}  # name of a dynamic size -> the node that reads it

    def program(self) -> Program:
        """The Program; its dead nodes and unused tensors are gone."""
        env: dict[fx.Node, Any] = {}
        self._place_inputs(env)
        self._copy(self.exported.graph_module, env)
        values = self._outputs(env)
        self.graph.output(values)
        program = Program(self.graph, self.tensors, tuple(self.inputs), tuple(self.outputs))
        program.clean()
        program.verify()
        return program

    def _place_inputs(self, env: dict[fx.Node, Any]) -> None:
        """Placeholders for the user's inputs; everything else is remembered by its tensor's name."""
        placeholders = [n for n in self.exported.graph.nodes if n.op == "placeholder"]
        canonical = _canonical_names(self.exported)
        given = iter(self.names)
        for node, spec in zip(placeholders, self.exported.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                env[node] = self._input(next(given), node)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                self.stored[node] = canonical[str(spec.target)]
            else:
                raise CaptureError(
                    f'the module holds "{spec.target}", a {spec.kind.name.lower()}; programs hold tensors only'
                )

    def _input(self, name: str, old: fx.Node) -> fx.Node:
        value = old.meta["val"]
        for dim, size in self.sizes.get(name, {}).items():
            self.symbols[str(value.shape[dim])] = size
        node = self.graph.placeholder(name)
        kind = type_of(value, self.symbols)
        assert isinstance(kind, Type)
        node.meta = {"type": kind, "path": ""}
        self.inputs.append(Input(name, kind, self.defaults.get(name, "")))
        return node

    def _copy(self, source: fx.GraphModule, env: dict[fx.Node, Any]) -> None:
        """Copy the calls of `source`, whose placeholders stand in `env` already."""
        for node in source.graph.nodes:
            if node.op == "call_function":
                self._call(source, node, env)
            elif node.op == "get_attr":
                env[node] = operator.attrgetter(node.target)(source)
            elif node.op not in ("placeholder", "output"):
                raise CaptureError(f'"{node.name}" is a {node.op}, which a program cannot hold')

    def _call(self, source: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        name = str(node.target)
        if name in _CHECKS:
            return
        if name in _SAME:
            env[node] = self._value(node.args[0], env)
        elif name in _WRAPPERS:
            env[node] = self._inline(node, _WRAPPERS[name], env)
        elif node.target is operator.getitem and isinstance(env.get(node.args[0]), tuple):  # type: ignore[arg-type]
            env[node] = env[node.args[0]][node.args[1]]  # type: ignore[index]
        elif (size := self._size(node, env)) is not None:
            env[node] = size
        else:
            args, kwargs = self._value(node.args, env), self._value(node.kwargs, env)
            env[node] = self.graph.create_node("call_function", node.target, args, kwargs, node.name)
            env[node].meta = {"type": type_of(node.meta.get("val"), self.symbols), "path": _path(node)}

    def _size(self, node: fx.Node, env: dict[fx.Node, Any]) -> fx.Node | None:
        """The one node of a named size, read from the first input that has it; None for any other node.

        Export reads a size wherever it likes, also from inputs that a later pass makes longer than the ids.
        """
        if str(node.target) != "aten.sym_size.int":
            return None
        source, dim = self._value(node.args, env)
        name = source.meta["type"].shape[dim]
        first = next((i for i in self.inputs if name in i.type.shape), None)
        if not isinstance(name, str) or first is None:
            return None
        if name not in self.named:
            place = next(n for n in self.graph.nodes if n.op == "placeholder" and n.target == first.name)
            made = self.graph.call_function(torch.ops.aten.sym_size.int, (place, first.type.shape.index(name)))
            made.meta = {"type": None, "path": ""}
            self.named[name] = made
        return self.named[name]

    def _inline(self, node: fx.Node, at: int, env: dict[fx.Node, Any]) -> tuple[Any, ...]:
        """The results of a wrapped subgraph: under no_grad it means what its body means."""
        if "autocast" in str(node.target) and node.args[2]:
            raise CaptureError(f'"{node.name}" runs under autocast, whose casts are not in the graph; turn it off')
        body = env[node.args[at]]  # type: ignore[index]
        inner = dict(zip(body.graph.find_nodes(op="placeholder"), self._value(node.args[at + 1 :], env), strict=True))
        self._copy(body, inner)
        results = self._value(body.graph.output_node().args[0], inner)
        return tuple(results)

    def _value(self, argument: Any, env: dict[fx.Node, Any]) -> Any:
        return fx.node.map_aggregate(argument, lambda a: self._node(a, env) if isinstance(a, fx.Node) else a)

    def _node(self, old: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if old in self.stored:
            return self._tensor(self.stored[old])
        value = env[old]
        if isinstance(value, Tensor):  # a constant inside a wrapped subgraph
            name = f"constants.{old.name}"
            self.tensors[name] = value
            return self._tensor(name)
        return value

    def _tensor(self, name: str) -> fx.Node:
        if name not in self.lifted:
            known = self.exported.state_dict | self.exported.constants
            tensor = self.tensors.setdefault(name, known[name] if name in known else known[f"{_ROOT}.{name}"])
            self.tensors[name] = tensor.detach()
            node = self.lifted[name] = self.graph.get_attr(name)
            node.meta = {"type": Type(tuple(tensor.shape), tensor.dtype), "path": name.rpartition(".")[0]}
        return self.lifted[name]

    def _outputs(self, env: dict[fx.Node, Any]) -> tuple[Any, ...]:
        specs = self.exported.graph_signature.output_specs
        if changed := [s.target for s in specs if s.kind != OutputKind.USER_OUTPUT]:
            raise CaptureError(f'the module writes to "{changed[0]}" when it runs; a program has no state of its own')
        values = self.exported.graph.output_node().args[0]
        return tuple(self._value(value, env) for value in values)


def _canonical_names(exported: ExportedProgram) -> dict[str, str]:
    """Each stored tensor's name without our wrapper's prefix; tensors that are one memory share the first name."""
    names: dict[str, str] = {}
    first: dict[Any, str] = {}
    for target, tensor in (exported.state_dict | exported.constants).items():
        name = target.removeprefix(f"{_ROOT}.")
        if isinstance(tensor, Tensor) and tensor.numel():
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            name = first.setdefault(key, name)
        names[target] = name
    return names


def _path(node: fx.Node) -> str:
    """The path of the innermost module a node was made in."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return path.removeprefix(_ROOT).removeprefix(".")
