"""A Program's graph as JSON, and back: nothing in the text can name code outside a short list.

Values that JSON has (None, booleans, integers, finite floats, texts, lists) stand for themselves; every other one is an
object with a single key that says what it is: `{"node": "linear_3"}`, `{"dtype": "float32"}`, `{"tuple": [1, 2]}`.
"""

import json
import math
import operator
from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler import ops
from qcompiler.errors import InputError, QCompilerError
from qcompiler.program import Input, Program, Type

NAMESPACES = ("aten", "qc")
_ALLOWED = f"{', '.join(NAMESPACES)} and size arithmetic"

# Operators of these namespaces that reach outside the program: files, the terminal.
_OUTSIDE = ("aten.from_file", "aten._print")

_OPERATOR = (
    "getitem add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ invert lshift rshift"
)
_MATH = "ceil floor trunc sqrt exp log log2 sin cos tan pow"
_TORCH = "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum _sym_sqrt"

# The Python functions that arithmetic on sizes is made of.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__.lstrip('_')}.{name}": getattr(module, name)
    for module, names in ((operator, _OPERATOR), (math, _MATH), (torch, _TORCH))
    for name in names.split()
}
_NAMES = {function: name for name, function in FUNCTIONS.items()}


# -- writing -------------------------------------------------------------------------------------------------


def dump(program: Program) -> str:
    """Graph, signature and quantization specs of `program` as JSON, one line a node; without tensors and info.

    Raises InputError for a node that calls something a saved graph cannot name, or holds a value it cannot hold.
    """
    parts = {
        "inputs": [[i.name, _encode(i.type), i.default] for i in program.inputs],
        "outputs": list(program.outputs),
        "quantized": program.quantized,
    }
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items())
    nodes = ",\n".join(json.dumps(_dump_node(node), allow_nan=False) for node in program.graph.nodes)
    return f'{{{head},\n"nodes": [\n{nodes}\n]}}\n'


def _dump_node(node: fx.Node) -> dict[str, Any]:
    try:
        found: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op != "output":
            found["target"] = target_text(node.target) if node.op == "call_function" else str(node.target)
        if node.args:
            found["args"] = [_encode(arg) for arg in node.args]
        if node.kwargs:
            found["kwargs"] = {key: _encode(arg) for key, arg in node.kwargs.items()}
        return found | {key: _encode(node.meta[key]) for key in ("type", "path", "segment") if key in node.meta}
    except ValueError as error:
        raise InputError(f'node "{node.name}" cannot be saved: {error}') from error


def target_text(target: Any) -> str:
    """The name of a call target, with its overload; ValueError for one that may not be saved.

    >>> target_text(torch.ops.aten.add.Tensor), target_text(operator.getitem)
    ('aten.add.Tensor', 'operator.getitem')
    """
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        resolve(name)
        return name
    if target in _NAMES:
        return _NAMES[target]
    raise ValueError(f'it calls "{target}", which is no operator of {_ALLOWED}')


def _encode(value: Any) -> Any:
    """A value as JSON; ValueError for one of a kind a saved graph cannot hold."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case list():
            return [_encode(v) for v in value]
        case fx.Node():
            return {"node": value.name}
        case Type():
            return {"type": [_name(value.dtype), *value.shape]}
        case tuple():
            return {"tuple": [_encode(v) for v in value]}
        case dict():
            return {"dict": [[_encode(k), _encode(v)] for k, v in value.items()]}
        case slice():
            return {"slice": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
        case complex():
            return {"complex": [_encode(value.real), _encode(value.imag)]}
        case EllipsisType():
            return {"ellipsis": None}
        case torch.dtype() | torch.layout() | torch.memory_format():
            return {type(value).__name__: _name(value)}
        case torch.device():
            return {"device": str(value)}
    raise ValueError(f"it holds a {type(value).__name__}")


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


# -- reading -------------------------------------------------------------------------------------------------


def load(text: str, tensors: Mapping[str, Tensor]) -> Program:
    """The program that `dump` wrote, over the given tensors.

    Raises InputError for a text that is damaged or names something that programs may not call.
    """
    try:
        found: dict[str, Any] = json.loads(text)
        program = Program(
            _load_graph(found["nodes"]),
            dict(tensors),
            tuple(Input(name, _decode(kind, {}), default) for name, kind, default in found["inputs"]),
            tuple(found["outputs"]),
            quantized=found["quantized"],
        )
        program.verify()
        for name in program.quantized:
            program.qtensor(name)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, QCompilerError) as error:
        raise InputError(f"the graph is damaged ({type(error).__name__}: {error})") from error
    return program


def _load_graph(entries: list[dict[str, Any]]) -> fx.Graph:
    ops.load()
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in entries:
        name, op = entry["name"], entry["op"]
        try:
            nodes[name] = _load_node(graph, entry, nodes)
        except (ValueError, RuntimeError) as error:  # torch.device raises the latter
            raise InputError(f'node "{name}" ({op}) cannot be loaded: {error}') from error
    return graph


def _load_node(graph: fx.Graph, entry: Mapping[str, Any], nodes: Mapping[str, fx.Node]) -> fx.Node:
    name, op = entry["name"], entry["op"]
    # torch.fx writes these names into Python source when a graph is printed or compiled.
    kwargs = {key: _decode(arg, nodes) for key, arg in entry.get("kwargs", {}).items()}
    if bad := next((text for text in (name, *kwargs) if not text.isidentifier()), None):
        raise ValueError(f'"{bad}" is no name')
    if name in nodes:
        raise ValueError("there are two of that name")
    if op not in ("placeholder", "get_attr", "call_function", "output"):
        raise ValueError(f'"{op}" is none of placeholder, get_attr, call_function, output')
    target = "output" if op == "output" else entry["target"]
    if op == "call_function":
        target = resolve(target)
    args = tuple(_decode(arg, nodes) for arg in entry.get("args", ()))
    node = graph.create_node(op, target, args, kwargs, name=name)
    node.name = name  # fx may have found another one, for example for a Python builtin
    node.meta = {key: _decode(entry[key], nodes) for key in ("type", "path", "segment") if key in entry}
    return node


def resolve(name: str) -> Callable[..., Any]:
    """The function of a target name; ValueError for any that programs may not call, or that does not exist.

    >>> resolve("operator.mul")(2, 3)
    6
    >>> resolve("os.system")
    Traceback (most recent call last):
    ...
    ValueError: programs may not call "os.system", only operators of aten, qc and size arithmetic
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if namespace not in NAMESPACES or f"{namespace}.{packet}" in _OUTSIDE:
        raise ValueError(f'programs may not call "{name}", only operators of {_ALLOWED}')
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    # TorchScript's own functions, such as aten.save, look like operators; they have no kernels.
    if not overload or not isinstance(found, torch._ops.OpOverload) or not torch._C._dispatch_has_kernel(found.name()):
        raise ValueError(f'there is no operator "{name}" in torch {torch.__version__}')
    return found


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The value that `_encode` wrote; ValueError for an unknown kind."""
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            if content not in nodes:
                raise ValueError(f'it uses "{content}", which does not come before it')
            return nodes[content]
        case "type":
            return Type(tuple(content[1:]), _attribute(content[0], torch.dtype))
        case "tuple":
            return tuple(_decode(v, nodes) for v in content)
        case "dict":
            return {_decode(k, nodes): _decode(v, nodes) for k, v in content}
        case "slice":
            return slice(*(_decode(v, nodes) for v in content))
        case "complex":
            return complex(*(_decode(v, nodes) for v in content))
        case "float":
            return float(content)
        case "ellipsis":
            return ...
        case "dtype" | "layout" | "memory_format":
            return _attribute(content, getattr(torch, kind))
        case "device":
            return torch.device(content)
    raise ValueError(f'it holds a value of the unknown kind "{kind}"')


def _attribute(name: str, kind: type) -> Any:
    """The dtype, layout or memory format of that name."""
    found = getattr(torch, name, None)
    if not isinstance(found, kind):
        raise ValueError(f'torch has no {kind.__name__} "{name}"')
    return found
