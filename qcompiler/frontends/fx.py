"""torch.fx.GraphModule: already a graph, but of modules and functions; torch.export brings it down to operators."""

from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.errors import CaptureError, InputError, No
from qcompiler.frontends import torch_module
from qcompiler.frontends.exporting import Sizes
from qcompiler.program import Program


def accepts(source: Any) -> bool | No:
    """True for a torch.fx.GraphModule."""
    return isinstance(source, fx.GraphModule) or No(f"a {type(source).__name__} is not a torch.fx.GraphModule")


def capture(source: Any, example_inputs: Any = None) -> Program:
    """Capture a GraphModule; without example inputs, they are made from the shapes its placeholders were traced with.

    Raises InputError if there are neither, else as `torch_module.capture` does.
    """
    given = _traced_inputs(source) if example_inputs is None else example_inputs
    program = torch_module.capture(source, given, _noted_sizes(source))
    program.info["frontend"] = "fx"
    for node in program.linears():  # a flat graph has lost the module paths, but not the names of its weights
        weight = str(node.args[1].target)  # type: ignore[union-attr]
        node.meta["path"] = node.meta["path"] or weight.rpartition(".")[0]
    return program


def _noted_sizes(module: fx.GraphModule) -> Sizes | None:
    """The dynamic sizes that tracing noted at the placeholders, by their symbols; None if it noted none."""
    found: dict[str, dict[int, str]] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        for dim, size in enumerate(getattr(_noted(node), "shape", ())):
            if isinstance(size, torch.SymInt) and not size.node.expr.is_number:  # a number: specialised since
                if not str(size).isidentifier():
                    raise CaptureError(f'input "{node.target}" has a size of {size}, which is not a plain symbol')
                found.setdefault(str(node.target), {})[dim] = str(size)
    return found or None


def _noted(placeholder: fx.Node) -> Any:
    """What tracing noted about an input: a fake tensor, or its metadata."""
    meta = placeholder.meta
    return meta.get("val", meta.get("example_value", meta.get("tensor_meta")))


def _traced_inputs(module: fx.GraphModule) -> tuple[Tensor, ...]:
    """Tensors like those that tracing noted at the placeholders: zeros of integers, pseudo-random floats."""
    seeded = torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    for node in module.graph.find_nodes(op="placeholder"):
        noted = _noted(node)
        if not hasattr(noted, "shape"):
            raise InputError(f'the GraphModule notes no shape for its input "{node.name}"; give example inputs')
        shape = [int(size) for size in noted.shape]
        if noted.dtype.is_floating_point:
            made.append(torch.randn(shape, generator=seeded).to(noted.dtype))
        else:
            made.append(torch.zeros(shape, dtype=noted.dtype))
    return tuple(made)
