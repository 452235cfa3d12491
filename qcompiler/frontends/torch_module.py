"""Any torch.nn.Module with example inputs.

Sizes become dynamic where the module allows it: the first dimension of its inputs (the batch), and the second of token
ids and of [batch, sequence, channels]. What had to stay fixed, and why, is in the program's info.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompiler.errors import CaptureError, InputError, No
from qcompiler.frontends import huggingface
from qcompiler.frontends.exporting import Sizes, check_weights, evaluating, export
from qcompiler.frontends.verification import Case, verify
from qcompiler.program import Program

Outputs = dict[str, Tensor]


def accepts(source: Any) -> bool | No:
    """True for a torch.nn.Module that no other front end knows better."""
    if not isinstance(source, nn.Module):
        return No(f"a {type(source).__name__} is not a torch.nn.Module")
    if isinstance(source, fx.GraphModule):
        return No("a GraphModule is captured by the front end fx")
    if huggingface.accepts(source):
        return No("a transformers model is captured by the front end huggingface")
    return True


def capture(source: Any, example_inputs: Any = None, sizes: Sizes | None = None) -> Program:
    """Capture a module called with `example_inputs`: a tensor, a tuple of tensors, or a dict of them by parameter name.

    The module runs in eval mode and is left as it was, as is the global random state. `sizes` names the dynamic
    dimensions where they are known, else they are tried. Outputs are named by their keys if it returns a dict, else
    "output" or "output_<i>". Raises InputError for unusable example inputs, CaptureError if the module cannot be
    exported or its export does not reproduce it.
    """
    inputs = named_inputs(source, example_inputs)
    check_weights(source)
    run = _runner(source, inputs)
    refused: list[str] = []
    ways = _ways(inputs) if sizes is None else [("the sizes it was traced with", sizes)]
    with evaluating(source), torch.random.fork_rng(devices=[]):
        for way, sizes in ways:
            try:
                program = export(source, _enlarged(inputs, sizes), sizes, run)
            except CaptureError as error:
                refused.append(f"{way}: {error}")
                continue
            answer = verify(program, run, _cases(inputs, sizes))
            if not isinstance(answer, No):
                program.info = _info(source, way, answer, refused)
                return program
            refused.append(f"{way}: {answer}")
    raise CaptureError(f"{type(source).__name__} could not be captured. " + ". ".join(refused))


def named_inputs(module: nn.Module, example_inputs: Any) -> dict[str, Tensor]:
    """Example inputs by the names of the parameters they are for."""
    if example_inputs is None:
        raise InputError(
            f"a {type(module).__name__} needs example inputs to be captured: a tensor, a tuple of tensors, or a dict "
            "of them by parameter name"
        )
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if isinstance(example_inputs, Sequence):
        positional = _positional(module)
        if len(example_inputs) > len(positional):
            raise InputError(
                f"{len(example_inputs)} example inputs for {type(module).__name__}, which takes {positional}"
            )
        example_inputs = dict(zip(positional, example_inputs, strict=False))
    if not isinstance(example_inputs, Mapping) or not all(isinstance(v, Tensor) for v in example_inputs.values()):
        raise InputError("example inputs must be tensors; bind other arguments to the module first")
    return dict(example_inputs)


def _positional(module: nn.Module) -> list[str]:
    """The names of positional parameters; "args_<i>" for a `*args`."""
    names: list[str] = []
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind == inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{i}" for i in range(32)]
        elif parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            names.append(name)
    return names


def _runner(module: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], Outputs]:
    """Calls the module with inputs by name and names its outputs."""
    positional = list(inputs) == _positional(module)[: len(inputs)]

    def run(given: Mapping[str, Tensor]) -> Outputs:
        with torch.no_grad():
            return _named(module(*given.values()) if positional else module(**given))

    return run


def _named(found: Any) -> Outputs:
    if isinstance(found, Tensor):
        return {"output": found}
    if isinstance(found, Mapping):
        return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if isinstance(found, Sequence) and not isinstance(found, str):
        return {f"output_{i}": value for i, value in enumerate(found) if isinstance(value, Tensor)}
    raise CaptureError(f"the module returns a {type(found).__name__}; a program returns tensors")


def _ways(inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, Sizes]]:
    """Which dimensions to make dynamic, the most general way first."""
    batches = {value.shape[0] for value in inputs.values() if value.ndim}
    if len(batches) == 1:
        batch = {name: {0: "batch"} for name, value in inputs.items() if value.ndim}
        both = {name: {**dims, 1: "sequence"} for name, dims in batch.items() if _is_sequence(inputs[name])}
        if len({inputs[name].shape[1] for name in both}) == 1:
            yield "dynamic batch and sequence", {**batch, **both}
        yield "dynamic batch", batch
    yield "fixed sizes", {}


def _is_sequence(value: Tensor) -> bool:
    return value.ndim == 3 or (value.ndim == 2 and not value.is_floating_point())


def _enlarged(inputs: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """The same inputs with every dynamic size at least 2: export takes a size of 1 for a constant."""
    return {
        name: _resized(value, {dim: max(2, value.shape[dim]) for dim in sizes.get(name, {})})
        for name, value in inputs.items()
    }


def _cases(inputs: Mapping[str, Tensor], sizes: Sizes) -> Iterator[Case]:
    """The example inputs, and others that are longer in every dynamic size."""
    yield Case("the example inputs", inputs)
    names = sorted({name for named in sizes.values() for name in named.values()})
    for more in (1, 4) if names else ():
        grown = {name: more + i for i, name in enumerate(names)}  # each size by another amount
        larger = {
            name: _resized(value, {dim: value.shape[dim] + grown[n] for dim, n in sizes.get(name, {}).items()})
            for name, value in inputs.items()
        }
        yield Case(f"sizes grown by {more}", larger)


def _resized(value: Tensor, wanted: Mapping[int, int]) -> Tensor:
    """`value` repeated along dimensions up to the wanted sizes, each copy turned by one so that rows differ."""
    for dim, size in wanted.items():
        have = value.shape[dim]
        if size > have:
            copies = [value.roll(i, dims=-1) for i in range(-(-size // have))]
            value = torch.cat(copies, dim).narrow(dim, 0, size)
    return value


def _info(module: nn.Module, way: str, error: float, refused: list[str]) -> dict[str, Any]:
    info: dict[str, Any] = {
        "frontend": "torch_module",
        "architecture": type(module).__name__,
        "way": way,
        "error": error,
    }
    return info | ({"refused": refused} if refused else {})
