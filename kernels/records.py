"""Packed records as what operators take: a list of tensors, and a text that says what they are.

An operator of PyTorch knows tensors, numbers and texts. A packed record is a frozen dataclass of those; `split` takes
it apart, `join` puts it together again. The text is read once, and found again at every later call.
"""

import functools
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from qcompiler.scheme import Scheme


def split(record: Any) -> tuple[list[Tensor], str]:
    """The tensors of a packed record, and the text that `join` needs beside them.

    >>> from qcompiler.kernels.norm_quantize import NormQuantize
    >>> norm = NormQuantize("rms", 1e-6, "int8:token:dynamic", torch.ones(64))
    >>> parts, spec = split(norm)
    >>> join(parts, spec).weight is norm.weight
    True
    """
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    plain = {name: _written(value) for name, value in values.items() if name not in tensors}
    kind = f"{type(record).__module__}.{type(record).__qualname__}"
    return list(tensors.values()), json.dumps({"record": kind, "tensors": list(tensors), "plain": plain})


def join(parts: Sequence[Tensor], spec: str) -> Any:
    """The record that was taken apart."""
    known = _read(spec)
    return known.kind(**known.plain, **dict(zip(known.tensors, parts, strict=True)))


def split_all(records: Sequence[Any]) -> tuple[list[Tensor], str]:
    """The same for several records, which may share tensors: each stands in the list once."""
    tensors, texts, places = list[Tensor](), [], []
    for record in records:
        parts, text = split(record)
        known = {id(tensor): i for i, tensor in enumerate(tensors)}
        fresh = [part for part in parts if id(part) not in known]
        known |= {id(part): len(tensors) + i for i, part in enumerate(fresh)}
        tensors += fresh
        texts.append(text)
        places.append([known[id(part)] for part in parts])
    return tensors, json.dumps({"records": texts, "places": places})


def join_all(tensors: Sequence[Tensor], spec: str) -> list[Any]:
    """The records that were taken apart together."""
    return [join([tensors[i] for i in places], text) for text, places in _read_all(spec)]


@functools.lru_cache(maxsize=4096)
def _read_all(spec: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = json.loads(spec)
    return tuple(zip(found["records"], map(tuple, found["places"]), strict=True))


def numbers(spec: str) -> dict[str, Any]:
    """What a text says beside the tensors: enough for shapes.

    >>> numbers('{"record": "qcompiler.kernels.norm_quantize.NormQuantize", "tensors": [], "plain": {"eps": 0.5}}')
    {'eps': 0.5}
    """
    return _read(spec).plain


@dataclass(frozen=True)
class _Spec:
    kind: type
    tensors: tuple[str, ...]
    plain: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _read(spec: str) -> _Spec:
    found = json.loads(spec)
    module, _, name = found["record"].rpartition(".")
    plain = {key: _meant(value) for key, value in found["plain"].items()}
    return _Spec(getattr(importlib.import_module(module), name), tuple(found["tensors"]), plain)


def _written(value: Any) -> Any:
    if isinstance(value, Scheme):
        return {"scheme": str(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return list(value) if isinstance(value, tuple) else value


def _meant(value: Any) -> Any:
    if isinstance(value, dict):
        return Scheme.parse(value["scheme"]) if "scheme" in value else getattr(torch, value["dtype"])
    return tuple(value) if isinstance(value, list) else value
