"""A transformers model without its numbers: what a configuration asks for, by name and shape."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qcompiler.errors import InputError

MOST = 1024  # of layers or experts, in a model whose tensors we have not seen yet


def model_class(config: Any) -> Any:
    """The class that the configuration names; else the causal language model, else the bare model, of its type."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for family in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in family._model_mapping:
            found = family._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise InputError(f"transformers has no model for a {type(config).__name__}")


def as_json(model: nn.Module) -> dict[str, Any]:
    """A transformers model's configuration as config.json holds it; what JSON cannot hold (infinity) is left out."""
    config: Any = model.config
    found = json.loads(config.to_json_string(use_diff=False), parse_constant=lambda text: None)
    found.pop("_name_or_path", None)  # where it was read from, or nothing
    return {**found, "architectures": [type(model).__name__]}


@dataclass(frozen=True)
class Skeleton:
    """A model on PyTorch's meta device.

    `parameters` are shapes by name, `buffers` the names of those that are not saved, `linears` the names of the weights
    of its linear layers except the output head's, `head` that one, `tied` the names of tensors that are another one.
    """

    config: Any
    model: nn.Module
    parameters: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str]
    linears: frozenset[str]
    head: frozenset[str]
    tied: Mapping[str, str]

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: int = MOST) -> "Skeleton":
        """The skeleton of a configuration that goes with so many tensors; InputError where transformers refuses it."""
        import transformers

        _check_counts(config, max(tensors, MOST))
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
            raise InputError(f"transformers knows no model_type {kind!r}; update it, or check config.json")
        try:
            rest = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
            made = transformers.AutoConfig.for_model(kind, **rest)
            with torch.device("meta"):
                model = model_class(made)._from_config(made, dtype=torch.float32)
        except Exception as error:  # a configuration that makes no sense makes every model fail in its own way
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(f"transformers makes no model of this config.json: {reason[:200]}") from error
        return cls._describe(made, model)

    @classmethod
    def _describe(cls, config: Any, model: Any) -> "Skeleton":
        own = {name: tuple(p.shape) for name, p in model.named_parameters()}
        first = {id(p): name for name, p in model.named_parameters()}
        every = dict(model.named_parameters(remove_duplicate=False))
        tied = {name: first[id(p)] for name, p in every.items() if name not in own}
        saved = set(model.state_dict())
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linears = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        top = frozenset(name for name, module in linears.items() if module is head)
        buffers = {name for name, _ in model.named_buffers()}
        own |= {name: tuple(b.shape) for name, b in model.named_buffers() if name in saved}
        return cls(config, model, own, frozenset(buffers - saved), frozenset(linears) - top, top, tied)

    @property
    def all_linears(self) -> frozenset[str]:
        """The weights of all linear layers, the output head's among them."""
        return self.linears | self.head


def _check_counts(config: Mapping[str, Any], limit: int) -> None:
    """Refuse layers and experts in numbers for which there are no tensors: they would cost memory and hours."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_counts(value, limit)
        elif isinstance(value, int) and any(word in key for word in ("layer", "expert", "depth")) and value > limit:
            raise InputError(f"config.json asks for {key} = {value}, the tensors allow {limit}; check the folder")
