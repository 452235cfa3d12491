"""Quantized checkpoints in any format that is known: transformers' model of their values, and their own codes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.errors import CaptureError, InputError, No
from qcompiler.formats.checkpoint import Checkpoint, Format, Rounding
from qcompiler.frontends import huggingface
from qcompiler.ops import qc
from qcompiler.plugins import registry
from qcompiler.program import Program
from qcompiler.scheme import QTensor
from qcompiler.skeleton import Skeleton


def accepts(source: Any) -> bool | No:
    """True for a folder in one of the formats that plugins list."""
    if not isinstance(source, (str, Path)):
        return No(f"a {type(source).__name__} is not a folder")
    found = format_of(Path(source))
    return found if isinstance(found, No) else True


def format_of(folder: Path) -> Format | No:
    """The format of a checkpoint."""
    if not folder.is_dir():
        return No(f'"{folder}" is not a folder')
    reasons = []
    for candidate in registry().formats.values():
        answer = candidate.detect(folder)
        if answer and candidate.read:
            return candidate
        reasons.append(f"not {candidate.name}: {answer}")
    return No(reasons[0] if reasons else "no formats are installed")


def capture(source: str | Path, example_inputs: Any = None) -> Program:
    """The Program of a quantized checkpoint, in float32; `program.codes` holds its QTensors (pass `carry`).

    Raises InputError for a folder that is damaged or hostile, CaptureError for one whose tensors are not those of
    transformers' model.
    """
    if example_inputs is not None:
        raise InputError("a checkpoint is captured without example inputs; leave them out")
    folder = Path(source)
    kind = format_of(folder)
    if isinstance(kind, No) or kind.read is None:
        raise InputError(f'"{folder}" cannot be read: {kind}')
    program = capture_checkpoint(kind.read(folder), str(folder))
    program.info |= {"frontend": "checkpoint", "format": kind.name, "source": str(folder)}
    if any(folder.glob("tokenizer*")):
        program.info["tokenizer"] = str(folder)
    return program


tokenizer = huggingface.tokenizer


def capture_checkpoint(checkpoint: Checkpoint, name: str = "") -> Program:
    """The Program of a checkpoint that was read; `name` is how errors call it."""
    skeleton = Skeleton.of(checkpoint.config, len(checkpoint.tensors))
    floats, codes = _decoded(checkpoint, skeleton, name)
    kind = type(skeleton.model)
    try:
        model: Any = kind.from_pretrained(None, config=skeleton.config, state_dict=floats, dtype=torch.float32)  # type: ignore[attr-defined]
    except Exception as error:
        raise InputError(f'transformers does not load "{name}": {str(error)[:200]}') from error
    program = huggingface.capture_model(model.eval())
    places = {tensor.data_ptr(): stored for stored, tensor in program.tensors.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {places.get(parameters[key].data_ptr(), key): record for key, record in codes.items()}
    program.codes = {key: record for key, record in found.items() if key in program.tensors}
    _round_inputs(program, checkpoint.inputs)
    _round_caches(program, checkpoint.caches)
    return program


def _decoded(checkpoint: Checkpoint, skeleton: Skeleton, name: str) -> tuple[dict[str, Tensor], dict[str, QTensor]]:
    """All parameters in float32, and the codes of those that are quantized; checked against the model."""
    floats: dict[str, Tensor] = {}
    codes: dict[str, QTensor] = {}
    foreign = []
    for key in checkpoint.tensors:
        value = checkpoint.tensors[key]
        shape = skeleton.parameters.get(skeleton.tied.get(key, key))
        if shape is None:
            if not (isinstance(value, Tensor) and key.endswith(".bias") and not value.any()):
                foreign.append(key)  # biases of zeros are what old tools add to every layer
            continue
        if tuple(value.shape) != shape:
            raise InputError(f'"{name}": "{key}" is {list(value.shape)}, but config.json asks for {list(shape)}')
        if isinstance(value, QTensor):
            codes[key] = value = value.with_parts(dtype=torch.float32)
            value = value.dequantize()
        floats[key] = value.float() if value.is_floating_point() else value
        if not bool(torch.isfinite(floats[key]).all()):
            raise InputError(f'"{name}": "{key}" holds values that are not finite numbers')
    foreign = [key for key in foreign if key not in skeleton.buffers]
    if foreign:
        raise CaptureError(
            f'"{name}" holds {len(foreign)} tensors that transformers\' {type(skeleton.model).__name__} has no place '
            f'for, first "{foreign[0]}"; a program without them would be another model'
        )
    held = {skeleton.tied.get(key, key) for key in floats}
    if missing := sorted(set(skeleton.parameters) - held):
        raise InputError(f'"{name}" lacks {len(missing)} tensors of the model, first "{missing[0]}"')
    return floats, codes


def _check_codes(name: str, rounding: Rounding) -> None:
    """InputError for codes that activations cannot be rounded to here."""
    if rounding.scheme.code != "int":
        raise InputError(
            f'"{name}" is rounded to {rounding.scheme}, which qcompiler does not compute; leave input_activations and '
            "kv_cache_scheme out of config.json to load the weights alone"
        )


def _round_caches(program: Program, caches: Mapping[str, Rounding]) -> None:
    """Round keys and values, as the checkpoint says."""
    left = dict(caches)
    for node in program.calls(qc.attention):
        path = str(node.meta.get("path", node.name))
        for place, word in ((1, "key"), (2, "value")):
            rounding = left.pop(f"{path}.{word[0]}", None)
            if rounding is None:
                continue
            _check_codes(f"{path}.{word[0]}", rounding)
            heads = node.args[place].meta["type"].shape[1]  # type: ignore[union-attr]
            with program.graph.inserting_before(node):
                parts = zip(("scale", "zero"), rounding.grid, strict=False)
                grid = [
                    program.store(f"{path}.{word}_{n}", p.expand(heads).reshape(heads, 1, 1).clone()) for n, p in parts
                ]
            node.kwargs = {**node.kwargs, word: str(rounding.scheme), f"{word}_grid": grid}
    if left:
        raise InputError(f'the checkpoint rounds "{next(iter(left))}", which is no attention of the model')


def _round_inputs(program: Program, inputs: Mapping[str, Rounding]) -> None:
    """Round what the layers read, as the checkpoint says; layers that read one value alike share its codes."""
    done: dict[Any, fx.Node] = {}
    for node in program.linears():
        rounding = inputs.get(str(node.args[1].target))  # type: ignore[union-attr]
        x = node.args[0]
        if rounding is None or not isinstance(x, fx.Node):
            continue
        _check_codes(str(node.args[1].target), rounding)  # type: ignore[union-attr]
        key = (x, str(rounding.scheme), *(tuple(part.flatten().tolist()) for part in rounding.grid))
        if key not in done:
            with program.graph.inserting_before(node):
                layer = str(node.args[1].target)  # type: ignore[union-attr]
                names = (f"{layer}.input_scale", f"{layer}.input_zero")
                grid = [program.store(n, part, like=node) for n, part in zip(names, rounding.grid, strict=False)]
                how = {"scheme": str(rounding.scheme)}
                done[key] = program.call(qc.fake_quantize, (x, grid), how, like=node, type=x.meta["type"])
        node.update_arg(0, done[key])
