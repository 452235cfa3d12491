"""A compiled program as a checkpoint: its tensors by the names transformers knows, what was joined apart again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from qcompiler.errors import InputError
from qcompiler.formats.checkpoint import Checkpoint, Rounding, Value
from qcompiler.formats.joined import members
from qcompiler.ops import qc
from qcompiler.program import Program
from qcompiler.scheme import Scheme
from qcompiler.skeleton import Skeleton

CACHES = "int8:tensor:sym"
LINEARS = (torch.ops.aten.linear.default, qc.linear, qc.integer_linear)


def checkpoint_of(program: Program, source: Path | None = None) -> Checkpoint:
    """The checkpoint that stands for `program`; `source` is a folder with its tokenizer.

    Raises InputError for a program that computes what no transformers model of its configuration does, naming the
    first thing: a rotation at run time, a reordered norm, rounded attention, a tensor there is no place for.
    """
    config = program.info.get("config")
    if not isinstance(config, dict):
        raise InputError("the program does not come from a transformers model: there is no configuration to go with it")
    _check_operators(program)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    tensors = {**_floats(program), **dict(members(program))}
    skeleton = Skeleton.of(config, len(tensors))
    tensors = {name: value for name, value in tensors.items() if name not in skeleton.buffers}
    inputs, caches = _inputs(program), _caches(program)
    grids = _grids(program)
    tensors = {name: value for name, value in tensors.items() if name not in grids}
    untied = [name for name in skeleton.tied if name in tensors]
    if untied:
        config["tie_word_embeddings"] = False
    expected = set(skeleton.parameters) | set(untied)
    if odd := sorted(expected.symmetric_difference(tensors)):
        what = "has no place for" if odd[0] in tensors else "needs, and the program does not have,"
        raise InputError(
            f'transformers\' {type(skeleton.model).__name__} {what} "{odd[0]}" ({len(odd)} such tensors); the recipe '
            "rewrote the model, so that only qcompiler runs it"
        )
    config["dtype"] = "float32"
    return Checkpoint(config, tensors, source, inputs, caches)


def _check_operators(program: Program) -> None:
    """InputError for what a checkpoint cannot say."""
    for node in program.calls(qc.hadamard, qc.reordered_norm, qc.onnx):
        raise InputError(f'"{node.meta.get("path", node.name)}" is {node.target}, which no checkpoint can say')
    for node in program.calls(qc.attention, qc.cached_attention):
        rounded = {key: str(node.kwargs[key]) for key in ("key", "value", "levels") if node.kwargs.get(key)}
        plain = not any(node.kwargs.get(key) for key in ("block", "recent", "first"))
        if rounded and not (rounded == dict.fromkeys(("key", "value"), CACHES) and plain):
            raise InputError(
                f'the attention "{node.meta.get("path", node.name)}" rounds {", ".join(rounded)} by '
                f"{', '.join(rounded.values())}; a checkpoint says {CACHES} alone: compile without the "
                "pass kv"
            )
    for node in program.calls(qc.fake_quantize):
        if other := next((user for user in node.users if user.target not in LINEARS), None):
            raise InputError(f'a rounded value goes into "{other.name}", which is no linear layer')


def _floats(program: Program) -> dict[str, Value]:
    """The float tensors; those that the pass fuse put together, apart again, with their biases."""
    joined: dict[str, dict[str, int]] = {
        name: rows for name, rows in program.info.get("fused", {}).items() if name in program.tensors
    }
    for node in program.calls(*LINEARS):
        rows = program.info.get("fused", {}).get(_weight(node), {})
        bias = node.args[3 if node.target is qc.integer_linear else 2 :][:1] or (node.kwargs.get("bias"),)
        if rows and isinstance(bias[0], fx.Node):
            names = {f"{name.removesuffix('.weight')}.bias": count for name, count in rows.items()}
            joined[str(bias[0].target)] = names
    found: dict[str, Value] = {}
    for name, tensor in program.tensors.items():
        if "::" in name:
            continue
        rows = joined.get(name, {})
        parts = tensor.split(list(rows.values())) if rows else (tensor,)
        found |= dict(zip(rows or (name,), parts, strict=True))
    return found


def _weight(node: fx.Node) -> str:
    """The name of the tensor that a linear layer multiplies by."""
    weight: Any = node.args[1]
    first = weight[0] if isinstance(weight, (list, tuple)) else weight
    return str(first.target).partition("::")[0]


def _rounded(program: Program) -> Iterator[tuple[fx.Node, str, list[fx.Node]]]:
    """The linear layers that round their input, with its scheme and the nodes of its grid."""
    for node in program.calls(*LINEARS):
        if node.target is qc.integer_linear:
            yield node, str(node.kwargs["scheme"]), list(node.args[2])  # type: ignore[arg-type]
        elif isinstance(node.args[0], fx.Node) and node.args[0].target is qc.fake_quantize:
            source = node.args[0]
            yield node, str(source.kwargs["scheme"]), list(source.args[1])  # type: ignore[arg-type]


def _grids(program: Program) -> set[str]:
    """The names of the tensors that are grids of rounded inputs."""
    found = {str(part.target) for _, _, grid in _rounded(program) for part in grid}
    for node in program.calls(qc.attention, qc.cached_attention):
        for key in ("key_grid", "value_grid"):
            found |= {str(part.target) for part in node.kwargs.get(key) or ()}  # type: ignore[union-attr]
    return found


def _caches(program: Program) -> dict[str, Rounding]:
    """How keys and values are rounded, by attention module; InputError for heads with scales of their own."""
    found = {}
    for node in program.calls(qc.attention, qc.cached_attention):
        path = str(node.meta.get("path", node.name))
        for word in ("key", "value") if node.kwargs.get("key") else ():
            part: Any = node.kwargs[f"{word}_grid"]
            part = part[0]
            scale = program.tensors[str(part.target)].flatten()
            if not bool((scale == scale[0]).all()):
                raise InputError(
                    f'the {word}s of "{path}" have a scale for each head, checkpoints one for all; compile without '
                    "the pass kv"
                )
            found[f"{path}.{word[0]}"] = Rounding(Scheme.parse(CACHES), (scale[:1],))
    return found


def _inputs(program: Program) -> dict[str, Rounding]:
    """How inputs are rounded, by the name of the layer's weight."""
    found: dict[str, Rounding] = {}
    for node, scheme, grid in _rounded(program):
        whole = _weight(node)
        rounding = Rounding(Scheme.parse(scheme), tuple(program.tensors[str(part.target)] for part in grid))
        found |= dict.fromkeys(program.info.get("fused", {}).get(whole, {whole: 0}), rounding)
    return found
