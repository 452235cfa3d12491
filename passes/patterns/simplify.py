"""Calls that do nothing, one spelling for each kind of call, constants, and values computed twice."""

import math
from collections.abc import Callable, Container, Iterator
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.execution import execute
from qcompiler.program import Program, Type
from qcompiler.rewrite import arguments, op_name, type_of_node

aten = torch.ops.aten
Answer = fx.Node | None  # what stands for a node from now on; None: the node itself

_FOLD_LIMIT = 2**15  # values in a constant worth computing beforehand; longer ones would bloat the file
_COPIES = {"alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy"}
_RESHAPES = {"view", "reshape", "_unsafe_view", "_reshape_copy"}
_SHAPE_ONLY = _RESHAPES | {"expand", "repeat", "flatten", "unflatten", "squeeze", "expand_copy", "view_copy"}
_CASTS = {"to", "_to_copy", "type_as", "float", "half"}


def simplify(program: Program) -> None:
    """Remove what does nothing and give each kind of call one spelling, until nothing changes."""
    changed = True
    while changed:
        changed = False
        for node in list(program.graph.nodes):
            if node.op != "call_function" or not node.users:
                continue
            with program.graph.inserting_before(node):
                answer = _simplified(program, node)
            if answer is not None:
                node.replace_all_uses_with(answer)
                changed = True
        program.clean()


def _simplified(program: Program, node: fx.Node) -> Answer:
    name, args = op_name(node), arguments(node)
    if name and does_nothing(program, node, name, args):
        first = node.args[0]
        return first if isinstance(first, fx.Node) else None
    respell = _SPELLINGS.get(name)
    return respell(program, node, args) if respell else None


def does_nothing(program: Program, node: fx.Node, name: str, args: dict[str, Any]) -> bool:
    """Whether the call returns its first argument: x.contiguous(), x + 0, dropout in eval mode, x[:], x.to(x.dtype)."""
    source, result = type_of_node(node.args[0] if node.args else None), type_of_node(node)
    if source is None or source != result:
        return False
    if name in _COPIES | _CASTS | _SHAPE_ONLY:
        return True
    if name in ("dropout", "feature_dropout", "alpha_dropout"):
        return args["train"] is False or args["p"] == 0
    if name == "native_dropout":
        return False
    if name == "slice":
        return bool(args["step"] == 1)  # as many as before, one after the other: all of them
    if name in ("add", "sub"):
        return _is_number(args["other"], 0)
    if name in ("mul", "div"):
        return _is_number(args["other"], 1) and args.get("rounding_mode") is None
    if name == "permute":
        return list(args["dims"]) == list(range(-source.rank, 0))
    if name == "transpose":
        return bool(args["dim0"] == args["dim1"])
    return False


def _is_number(value: Any, number: int) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == number


# -- one spelling ----------------------------------------------------------------------------------------------


def _cast(program: Program, node: fx.Node, args: dict[str, Any]) -> Answer:
    """x.to(dtype), x.float(), x.type_as(y)  ->  _to_copy(x, dtype=)"""
    kind = type_of_node(node)
    if kind is None or (op_name(node) == "_to_copy" and node.kwargs.keys() == {"dtype"}):
        return None
    return program.call(aten._to_copy.default, node.args[:1], {"dtype": kind.dtype}, like=node)


def _reshape(program: Program, node: fx.Node, args: dict[str, Any]) -> Answer:
    """view(x, s)  ->  reshape(x, s), which needs no contiguous x; of reshape(reshape(x, t), s) the last decides"""
    if not isinstance(args.get("size", args.get("shape")), (list, tuple)):
        return None  # a view as another dtype
    source = args["self"]
    while op_name(source) in _RESHAPES and not isinstance(source.args[1], torch.dtype):
        source = source.args[0]
    if source is args["self"] and node.target is aten.reshape.default:
        return None
    return program.call(aten.reshape.default, (source, node.args[1]), like=node)


def _transpose(program: Program, node: fx.Node, args: dict[str, Any]) -> Answer:
    """x.permute(0, 2, 1, 3), x.t(), x.mT  ->  transpose(x, 1, 2); two that undo each other are none"""
    kind = type_of_node(node)
    swapped = swapped_axes(node)
    if kind is None or swapped is None:
        return None
    source = node.args[0]
    if isinstance(source, fx.Node) and swapped_axes(source) == swapped:
        return source.all_input_nodes[0]
    if node.target is aten.transpose.int and node.args[1:] == swapped:
        return None
    return program.call(aten.transpose.int, (source, *swapped), like=node)


def swapped_axes(node: Any) -> tuple[int, int] | None:
    """The two axes that a node exchanges, smaller first, counted from the front; None if it is no exchange of two."""
    kind = type_of_node(node)
    name = op_name(node)
    if kind is None or name not in ("permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims"):
        return None
    order = list(range(kind.rank))
    if name == "permute":
        order = [d % kind.rank for d in arguments(node)["dims"]]
    elif name in ("t", "numpy_T", "mT"):
        order[-2:] = order[-2:][::-1]
    else:
        a, b = (d % kind.rank for d in node.args[1:3])
        order[a], order[b] = b, a
    moved = [i for i, d in enumerate(order) if i != d]
    return (moved[0], moved[1]) if len(moved) == 2 else None


def _split(program: Program, node: fx.Node, args: dict[str, Any]) -> Answer:
    """x.chunk(2, -1), x.split(64, -1)  ->  split_with_sizes(x, [64, 64], -1)"""
    kinds = node.meta.get("type")
    if not isinstance(kinds, tuple) or node.target is aten.split_with_sizes.default:
        return None
    sizes = [kind.shape[args["dim"]] for kind in kinds if isinstance(kind, Type)]
    if len(sizes) != len(kinds) or not all(isinstance(size, int) for size in sizes):
        return None
    return program.call(aten.split_with_sizes.default, (args["self"], sizes, args["dim"]), like=node)


def _cat(program: Program, node: fx.Node, args: dict[str, Any]) -> Answer:
    """cat([x, x[..., d:]], -1) whose second part is empty  ->  cat([x], -1)  ->  x"""
    parts = args["tensors"]
    kinds = [type_of_node(part) for part in parts]
    # A part of shape [0] joins anything: torch.cat allows it whatever the others' rank.
    empty = [kind is not None and (kind.shape == (0,) or kind.shape[args["dim"]] == 0) for kind in kinds]
    kept = [part for part, nothing in zip(parts, empty, strict=True) if not nothing]
    if len(kept) == 1 and type_of_node(kept[0]) == type_of_node(node):
        return kept[0]  # type: ignore[no-any-return]
    if len(kept) == len(parts) or not kept:
        return None
    return program.call(aten.cat.default, (kept, args["dim"]), like=node)


def _arithmetic(program: Program, node: fx.Node, args: dict[str, Any]) -> Answer:
    """x * c with a stored single number c  ->  x * number; 2 + x  ->  x + 2; 1 * x  ->  x"""
    kind = type_of_node(node)
    left, right = args["self"], args["other"]
    if op_name(node) in ("add", "mul") and _number(program, left) is not None and args.get("alpha", 1) == 1:
        left, right = right, left
    number = _number(program, right)
    source = type_of_node(left)
    if number is None or source is None or kind is None or source != kind:
        return None
    if (left, right) == (args["self"], args["other"]) and number is right:
        return None
    return program.call(node.target, (left, number, *node.args[2:]), node.kwargs, like=node)


def _outer(program: Program, node: fx.Node, args: dict[str, Any]) -> Answer:
    """matmul(x [..., m, 1], y [..., 1, n])  ->  x * y"""
    x, y, kind = type_of_node(node.args[0]), type_of_node(node.args[1]), type_of_node(node)
    if x is None or y is None or kind is None or not kind.rank == x.rank == y.rank or kind.rank < 2:
        return None
    if x.shape[-1] != 1 or y.shape[-2] != 1:
        return None
    return program.call(aten.mul.Tensor, node.args, like=node)


def _number(program: Program, value: Any) -> int | float | None:
    """A plain number, also one that is stored as a tensor without dimensions."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    stored = program.tensor_of(value)
    if stored is None or stored.dim() != 0 or stored.dtype in (torch.bool, torch.complex64, torch.complex128):
        return None
    return stored.item()


def _squeeze(program: Program, node: fx.Node, args: dict[str, Any]) -> Answer:
    """squeeze(unsqueeze(x, d), d)  ->  x"""
    source = args["self"]
    inner = source.args[0] if op_name(source) == "unsqueeze" else None
    return inner if type_of_node(inner) == type_of_node(node) and _same_axis(node, source) else None


def _same_axis(node: fx.Node, source: fx.Node) -> bool:
    return node.target is aten.squeeze.dim and arguments(node)["dim"] == arguments(source)["dim"]


def _not(program: Program, node: fx.Node, args: dict[str, Any]) -> Answer:
    """~x of booleans  ->  logical_not(x); logical_not(logical_not(x))  ->  x"""
    kind, source = type_of_node(node), args["self"]
    if kind is None or kind != type_of_node(source) or kind.dtype != torch.bool:
        return None
    if op_name(source) in ("logical_not", "bitwise_not") and type_of_node(source.args[0]) == kind:
        return source.all_input_nodes[0]  # type: ignore[no-any-return]
    if node.target is aten.logical_not.default:
        return None
    return program.call(aten.logical_not.default, (source,), like=node)


def _copy(program: Program, node: fx.Node, args: dict[str, Any]) -> Answer:
    """copy(x, y), which is y in the shape of x  ->  y"""
    return args["src"] if type_of_node(args["src"]) == type_of_node(node) else None


def _scattered(program: Program, node: fx.Node, args: dict[str, Any]) -> Answer:
    """slice_scatter(slice_scatter(empty, a, d, 0, n), b, d, n)  ->  cat([a, b], d)"""
    inner, dim = args["self"], args["dim"]
    if op_name(inner) != "slice_scatter" or args["step"] != 1:
        return None
    before, kinds = arguments(inner), [type_of_node(n) for n in (node, inner.args[1], args["src"])]
    if op_name(before["self"]) not in ("new_empty", "empty", "empty_like") or before["dim"] != dim or None in kinds:
        return None
    whole, first, second = (kind.shape[dim] for kind in kinds if kind is not None)
    spans = [(before["start"] or 0, before["end"]), (args["start"] or 0, args["end"])]
    if before["step"] != 1 or not all(isinstance(size, int) for size in (whole, first, second)):
        return None
    if [slice(*span).indices(whole)[:2] for span in spans] != [(0, first), (first, whole)]:
        return None
    return program.call(aten.cat.default, ([before["src"], args["src"]], dim), like=node)


_SPELLINGS: dict[str, Callable[[Program, fx.Node, dict[str, Any]], Answer]] = {
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(("permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("chunk", "split"), _split),
    **dict.fromkeys(("add", "sub", "mul", "div"), _arithmetic),
    **dict.fromkeys(("logical_not", "bitwise_not"), _not),
    **dict.fromkeys(("matmul", "bmm"), _outer),
    "copy": _copy,
    "slice_scatter": _scattered,
    "cat": _cat,
    "squeeze": _squeeze,
}


# -- constants and common subexpressions -----------------------------------------------------------------------


def fold_constants(program: Program) -> int:
    """Compute what depends on stored tensors alone, where the result is small; returns how many were computed."""
    constant: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        if is_pure(node) and all(n.op == "get_attr" or n in constant for n in node.all_input_nodes) and _small(node):
            constant[node] = None
    wanted = [n for n in constant if any(user not in constant for user in n.users)]
    for node in wanted:
        _store(program, node, _evaluated(program, node, constant))
    program.clean()
    return len(wanted)


def _small(node: fx.Node) -> bool:
    kinds = [type_of_node(n) for n in (node, *node.all_input_nodes)]
    return all(
        kind is not None
        and all(isinstance(size, int) for size in kind.shape)
        and math.prod(s for s in kind.shape if isinstance(s, int)) <= _FOLD_LIMIT
        for kind in kinds
    )


def _evaluated(program: Program, node: fx.Node, constant: Container[fx.Node]) -> Tensor:
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        execute(_cone(node, constant), env, program.tensors)
    value: Tensor = env[node]
    return value.clone(memory_format=torch.contiguous_format)


def _cone(node: fx.Node, constant: Container[fx.Node]) -> list[fx.Node]:
    """The constant calls that `node` is computed from, itself last."""
    found: dict[fx.Node, None] = {}

    def visit(n: fx.Node) -> None:
        if n in constant and n not in found:
            for source in n.all_input_nodes:
                visit(source)
            found[n] = None

    visit(node)
    return list(found)


def _store(program: Program, node: fx.Node, value: Tensor) -> fx.Node:
    """Put a stored tensor in the place of `node`; it is named after the one tensor it was computed from."""
    sources = {str(n.target) for n in _ancestors(node) if n.op == "get_attr"}
    stem = f"{sources.pop()}_folded" if len(sources) == 1 else f"constants.{node.name}"
    name = next(n for n in _candidates(stem) if n not in program.tensors)
    program.tensors[name] = value
    with program.graph.inserting_before(node):
        new = program.get(name, node)
    node.replace_all_uses_with(new)
    return new


def _candidates(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}_{i}" for i in range(2, 2**31))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def is_pure(node: fx.Node) -> bool:
    """Whether a call gives the same value each time and does nothing else."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", "") in ("_operator", "operator", "math")
    tags = node.target.tags
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in tags


def merge_equal(program: Program) -> int:
    """Compute equal expressions once; returns how many calls went."""
    first: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(program.graph.nodes):
        if node.op != "get_attr" and not is_pure(node):
            continue
        key = (node.op, node.target, _key(node.args), _key(node.kwargs))
        other = first.setdefault(key, node)
        if other is not node and other.meta.get("type") == node.meta.get("type"):
            other.meta["path"] = _common(other.meta.get("path", ""), node.meta.get("path", ""))
            node.replace_all_uses_with(other)
            merged += 1
    program.clean()
    return merged


def _key(value: Any) -> Any:
    """A hashable form in which 0, 0.0 and False differ."""
    if isinstance(value, dict):
        return tuple((name, _key(v)) for name, v in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, slice):
        return (slice, _key((value.start, value.stop, value.step)))
    return (type(value), value)


def _common(a: str, b: str) -> str:
    """The module that both paths lie in.

    >>> _common("model.layers.0.self_attn", "model.layers.1.self_attn")
    'model.layers'
    """
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(a.split("."), b.split("."), strict=False))
    return ".".join(word for word, _ in shared)
