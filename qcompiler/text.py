"""The text form of a graph, as goldens, fingerprints and people read it."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx


def lines(graph: fx.Graph, inputs: Sequence[Any], outputs: Sequence[str]) -> Iterator[str]:
    """A graph as lines: one a node, readable and stable; `inputs` and `outputs` are the program's."""
    defaults = {spec.name: spec.default for spec in inputs}
    for node in graph.nodes:
        kind = node.meta.get("type")
        note = f"  # {_show_type(kind)}" if kind is not None else ""
        if node.op == "placeholder":
            default = defaults[str(node.target)]
            yield f"input {node.name}{f' = {default}' if default else ''}{note}"
        elif node.op == "call_function":
            args = [_show(a) for a in node.args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()]
            yield f"{node.name} = {target_name(node.target)}({', '.join(args)}){note}"
        elif node.op == "output":
            pairs = zip(outputs, node.args[0], strict=True)
            yield "return " + ", ".join(f"{name}={_show(value)}" for name, value in pairs)


def target_name(target: Any) -> str:
    """A call target's name: `aten.linear`, `aten.add.Tensor`, `qc.rope`, `operator.getitem`.

    >>> import operator
    >>> target_name(torch.ops.aten.linear.default), target_name(operator.mul)
    ('aten.linear', 'operator.mul')
    """
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    module = str(getattr(target, "__module__", "")).lstrip("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, str):
        return repr(value)
    return str(value)


def _show_type(kind: Any) -> str:
    return ", ".join(map(_show_type, kind)) if isinstance(kind, tuple) else str(kind)
