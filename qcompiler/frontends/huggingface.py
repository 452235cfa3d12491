"""Hugging Face models: any causal language model or encoder of transformers, with no code per architecture.

The model is exported with dynamic batch and sequence. Its attention becomes one operator through transformers'
attention interface; where that does not reproduce the model, the next way is tried, and the one that does is kept.
"""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler import ops
from qcompiler.errors import CaptureError, InputError, No
from qcompiler.frontends import attention
from qcompiler.frontends.exporting import Sizes, check_weights, evaluating, export, first_line
from qcompiler.frontends.verification import Case, verify
from qcompiler.program import Program
from qcompiler.skeleton import as_json, model_class

_DEFAULTS = {"attention_mask": "ones", "position_ids": "positions"}


@dataclass(frozen=True)
class Way:
    """One way to capture a model: whose attention, and whether positions are an input."""

    attention: str | None  # None: the model's own
    positions: bool

    def __str__(self) -> str:
        own = {attention.NAME: "attention interface", None: "own attention"}
        how = own.get(self.attention, f"{self.attention} attention")
        return f"{how}, {'explicit' if self.positions else 'implicit'} positions"

    def seen_in(self, program: Program) -> str:
        """The same in words, where the interface was offered but the model has no attention that asks for it."""
        asked = self.attention != attention.NAME or any(program.calls(ops.qc.attention))
        return str(self if asked else Way(None, self.positions))


def accepts(source: Any) -> bool | No:
    """True for a folder that holds a config.json, and for a loaded transformers model."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        return (path / "config.json").is_file() or No(f'"{path}" is not a folder with a config.json')
    loaded = "transformers" in sys.modules and isinstance(source, sys.modules["transformers"].PreTrainedModel)
    return loaded or No(f"a {type(source).__name__} is neither a folder nor a transformers model")


def capture(source: Any, example_inputs: Any = None) -> Program:
    """Capture a model folder or a loaded transformers model; needs no example inputs.

    Raises InputError for a folder that cannot be loaded, CaptureError for a model that cannot be captured.
    """
    if not isinstance(source, (str, Path)):
        return capture_model(source, example_inputs)
    program = capture_model(load(Path(source)), example_inputs)
    program.info["source"] = str(source)
    if any(Path(source).glob("tokenizer*")):
        program.info["tokenizer"] = str(source)
    return program


def tokenizer(folder: str) -> Any:
    """The tokenizer in a model's folder; nothing is downloaded. None where it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError):
        return None


def load(folder: Path) -> nn.Module:
    """The transformers model in `folder`, in the dtype it was saved in; nothing is downloaded.

    Raises InputError if it cannot be loaded, or if weights are missing from it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model, loading = model_class(config).from_pretrained(
            folder, config=config, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # hostile files make every reader fail in its own way
        raise InputError(f'the model in "{folder}" cannot be loaded: {first_line(error)}') from error
    if missing := sorted(loading["missing_keys"]):
        raise InputError(
            f'the weights in "{folder}" are not complete: {len(missing)} tensors are missing, "{missing[0]}" is the '
            "first; copy the folder again, or check that config.json belongs to these weights"
        )
    return model  # type: ignore[no-any-return]


def capture_model(model: nn.Module, example_inputs: Any = None) -> Program:
    """Capture a loaded transformers model: token ids to logits, or to the encoder's states.

    `model` is left as it was found. Raises InputError if example inputs are given, and CaptureError if weights are NaN
    or if no way of capturing reproduces the model.
    """
    if example_inputs is not None:
        raise InputError("a transformers model is captured without example inputs; leave them out")
    check_weights(model)
    sizes = Lengths.of(model)
    refused: list[str] = []
    bypassed = False
    with evaluating(model):
        for way in _ways(model):
            if bypassed and way.attention == attention.NAME:
                continue
            try:
                program = _export(model, way, sizes.traced)
            except CaptureError as error:
                refused.append(f"{way}: {error}")
                continue
            if way.attention == attention.NAME and _is_bypassed(program):
                bypassed = True
                refused.append(f"{way}: the model's attention does not go through it")
                continue
            answer = verify(program, lambda given: call(model, given), cases(program, model, sizes))
            if not isinstance(answer, No):
                program.info = _info(model, way.seen_in(program), answer)
                return program
            refused.append(f"{way}: {answer}")
    raise CaptureError(f"{type(model).__name__} could not be captured. " + ". ".join(refused))


def _is_bypassed(program: Program) -> bool:
    """Whether a mask was made for the attention interface but goes to some attention of the model's own."""
    return any(program.calls(ops.qc.mask)) and not any(program.calls(ops.qc.attention))


@dataclass(frozen=True)
class Lengths:
    """Sequence lengths to trace and to verify with, so that the model's windows and chunks matter."""

    traced: int
    short: int
    long: int

    @classmethod
    def of(cls, model: nn.Module) -> "Lengths":
        """Longer than every window of up to 64 that the configuration names, within the model's positions."""
        windows = [size for size in _windows(_config(model).to_dict()) if size <= 64]
        limit = _max_positions(_config(model)) or sys.maxsize
        traced = min(max(windows, default=0) + 11, limit - 1)
        return cls(traced, min(5, limit), min(traced + 8, limit))


def _windows(config: Any) -> Iterator[int]:
    """Every number in a configuration whose name speaks of a window or a chunk."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _windows(value)
        elif isinstance(value, int) and re.search("window|chunk|local|block|stride", str(key)):
            yield value


def _ways(model: nn.Module) -> Iterator[Way]:
    """In order of preference. With explicit positions a cache can be added later; without, positions are derived."""
    positions = (True, False) if "position_ids" in _parameters(model) else (False,)
    own = getattr(model.config, "_attn_implementation", None)
    for implementation in dict.fromkeys((attention.NAME, None, None if own == "eager" else "eager")):
        for explicit in positions:
            yield Way(implementation, explicit)


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _export(model: nn.Module, way: Way, length: int) -> Program:
    ids = _ids(model, 2, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][0, :2] = 0
    if way.positions:
        inputs["position_ids"] = torch.arange(length).repeat(2, 1)
    inputs = {name: value for name, value in inputs.items() if name in _parameters(model)}
    sizes: Sizes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    with attention.implementation(model, way.attention):
        return export(
            model,
            inputs,
            sizes,
            lambda given: call(model, given),
            defaults=_DEFAULTS,
            limits={"sequence": _max_positions(_config(model)) or 0},
        )


def call(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors by name; of a language model the logits alone."""
    fixed = {"use_cache": False, "return_dict": True}
    known = _parameters(model)
    open_ended = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in known.values())
    fixed = {name: value for name, value in fixed.items() if name in known or open_ended}
    with torch.no_grad():
        found = model(**inputs, **fixed)
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    return {"logits": tensors["logits"]} if "logits" in tensors else tensors


def cases(program: Program, model: nn.Module, sizes: Lengths) -> Iterator[Case]:
    """Other sizes than were traced: the defaults alone; padding on the left; padding on the right and positions."""
    known = {spec.name for spec in program.inputs}
    yield Case(f"1 sequence of {sizes.short}", {"input_ids": _ids(model, 1, sizes.short)})
    for side in ("left", "right"):
        ids = _ids(model, 3, sizes.long)
        real = _real(3, sizes.long, side)
        inputs = {"input_ids": ids}
        if "attention_mask" in known:
            inputs["attention_mask"] = real.long()
        if "position_ids" in known and side == "right":
            inputs["position_ids"] = (real.long().cumsum(-1) - 1).clamp_min(0)
        padded = f", padded on the {side}" if "attention_mask" in known else ""
        yield Case(f"3 sequences of {sizes.long}{padded}", inputs, real if padded else None)


def _real(batch: int, length: int, side: str) -> Tensor:
    """[batch, length], True at real tokens: each sequence has two fewer than the one before it."""
    padding = 2 * torch.arange(batch)[:, None]
    place = torch.arange(length)[None]
    return place >= padding if side == "left" else place < length - padding


def _ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """The same pseudo-random token ids each time, without touching anybody's random state; special ones left out."""
    config = _text_config(_config(model))
    seeded = torch.Generator().manual_seed(batch * 1000 + length)
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=seeded)
    usable = next(i for i in range(config.vocab_size - 1, -1, -1) if i not in special)
    for token in special:
        if isinstance(token, int):
            ids = ids.masked_fill(ids == token, usable)
    return ids.to(next(model.parameters()).device)


def _config(model: nn.Module) -> Any:
    return model.config


def _text_config(config: Any) -> Any:
    """The part of a configuration that speaks of text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _max_positions(config: Any) -> int | None:
    found = getattr(_text_config(config), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _info(model: nn.Module, way: str, error: float) -> dict[str, Any]:
    config = _text_config(_config(model))
    generation = getattr(model, "generation_config", None) or config
    eos = getattr(generation, "eos_token_id", None)
    return {
        "frontend": "huggingface",
        "architecture": type(model).__name__,
        "model_type": _config(model).model_type,
        "config": as_json(model),
        "way": way,
        "error": error,
        "vocab_size": config.vocab_size,
        "max_positions": _max_positions(_config(model)),
        "bos": getattr(generation, "bos_token_id", None),
        "eos": eos if isinstance(eos, list) else [eos] if eos is not None else [],
        "pad": getattr(generation, "pad_token_id", None),
        "tokenizer": None,
    }
