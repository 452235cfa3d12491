"""Weights in the subgraphs of a node (branches of an If, the body of a Loop), lifted out to where passes see them.

A subgraph may read what its surroundings hold, so a constant means the same outside as inside.
"""

import collections
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.errors import require
from qcompiler.formats.onnx_model import DTYPES, SMALL, subgraphs


def lifted(node: Any, outer: Collection[str]) -> tuple[Any, dict[str, Tensor]]:
    """A copy of `node` whose subgraphs hold no large constants, and these by name; the node itself if there are none.

    Names that are taken outside (`outer`), or more than once inside, stay where they are, and so does what a subgraph
    gives as it is.
    """
    if not any(_constants(graph) for graph in _all(node)):
        return node, {}
    copy = type(node)()
    copy.CopyFrom(node)
    names = collections.Counter(name for graph in _all(copy) for name in _defined(graph))
    found: dict[str, Tensor] = {}
    for graph in _all(copy):
        given = {value.name for value in graph.output}
        for name, holder, item, proto in _constants(graph):
            if names[name] == 1 and name not in outer and name not in given:
                found[name] = torch.from_numpy(np.array(require("onnx", "onnx").numpy_helper.to_array(proto)))
                holder.remove(item)
    return copy, found


def _all(node: Any) -> Iterator[Any]:
    """The subgraphs of a node, and those of the nodes in them."""
    for graph in subgraphs(node):
        yield graph
        for inner in graph.node:
            yield from _all(inner)


def _constants(graph: Any) -> list[tuple[str, Any, Any, Any]]:
    """The large constants of a graph: name, the list it stands in, its entry there, and its TensorProto."""
    found = [(t.name, graph.initializer, t, t) for t in graph.initializer if _large(t)]
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            value = node.attribute[0]
            if value.name == "value" and _large(value.t):
                found.append((node.output[0], graph.node, node, value.t))
    return found


def _large(proto: Any) -> bool:
    return proto.data_type in DTYPES and int(np.prod(proto.dims)) * DTYPES[proto.data_type].itemsize > SMALL


def _defined(graph: Any) -> Iterator[str]:
    """The names that a graph gives values to."""
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (name for node in graph.node for name in node.output)
