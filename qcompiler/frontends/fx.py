"""torch.fx.GraphModule: already a graph, but of modules and functions; torch.export brings it down to operators."""

from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.errors import InputError, No
from qcompiler.frontends import torch_module
from qcompiler.program import Program


def accepts(source: Any) -> bool | No:
    """True for a torch.fx.GraphModule."""
    return isinstance(source, fx.GraphModule) or No(f"a {type(source).__name__} is not a torch.fx.GraphModule")


def capture(source: Any, example_inputs: Any = None) -> Program:
    """Capture a GraphModule; without example inputs, they are made from the shapes its placeholders were traced with.

    Raises InputError if there are neither, else as `torch_module.capture` does.
    """
    given = _traced_inputs(source) if example_inputs is None else example_inputs
    program = torch_module.capture(source, given)
    program.info["frontend"] = "fx"
    return program


def _traced_inputs(module: fx.GraphModule) -> tuple[Tensor, ...]:
    """Tensors like those that tracing noted at the placeholders: zeros of integers, pseudo-random floats."""
    seeded = torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    for node in module.graph.find_nodes(op="placeholder"):
        noted = node.meta.get("val", node.meta.get("example_value", node.meta.get("tensor_meta")))
        if not hasattr(noted, "shape"):
            raise InputError(f'the GraphModule notes no shape for its input "{node.name}"; give example inputs')
        shape = [int(size) for size in noted.shape]
        if noted.dtype.is_floating_point:
            made.append(torch.randn(shape, generator=seeded).to(noted.dtype))
        else:
            made.append(torch.zeros(shape, dtype=noted.dtype))
    return tuple(made)
