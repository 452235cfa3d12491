"""Spill: values kept between the segments of a sweep, in memory up to a limit and on disk beyond it."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, fx

LIMIT = 2**28  # bytes in memory: a calibration of any length fits


class Spill:
    """A list of dicts from nodes to values; what does not fit lies in a temporary folder that goes with the list.

    >>> import torch
    >>> node = fx.Graph().placeholder("x")
    >>> spill = Spill(limit=0)
    >>> spill.append({node: torch.ones(2)})
    >>> spill[0][node], spill.bytes
    (tensor([1., 1.]), 0)
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.bytes = limit, 0
        self._held: list[dict[fx.Node, Any]] = []  # tensors, or the names of those on disk
        self._sizes: list[int] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, i: int) -> dict[fx.Node, Any]:
        """The values of sample i, in a dict of its own."""
        if not 0 <= i < len(self._held):
            raise IndexError(i)
        held = dict(self._held[i])
        if any(isinstance(value, _OnDisk) for value in held.values()):
            tensors = load_file(self._file(i))
            held = {k: tensors[v.name] if isinstance(v, _OnDisk) else v for k, v in held.items()}
        return held

    def __iter__(self) -> Iterator[dict[fx.Node, Any]]:
        return (self[i] for i in range(len(self)))

    def append(self, values: Mapping[fx.Node, Any]) -> None:
        """Keep the values of one more sample."""
        self._held.append({})
        self._sizes.append(0)
        self[len(self) - 1] = values

    def __setitem__(self, i: int, values: Mapping[fx.Node, Any]) -> None:
        """Keep other values for sample i."""
        size = sum(value.nbytes for value in values.values() if isinstance(value, Tensor))
        self.bytes -= self._sizes[i]
        if self.bytes + size <= self.limit:
            self._held[i], self._sizes[i] = dict(values), size
        else:
            tensors = {node.name: value for node, value in values.items() if isinstance(value, Tensor)}
            # Copies: values may be views of one another, which the file cannot hold.
            save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, self._file(i))
            self._held[i] = {k: _OnDisk(k.name) if isinstance(v, Tensor) else v for k, v in values.items()}
            self._sizes[i] = 0
        self.bytes += self._sizes[i]

    def _file(self, i: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="qcompiler-", ignore_cleanup_errors=True)
        return Path(self._folder.name) / f"{i}.safetensors"


class _OnDisk:
    """Stands for a tensor in the file of its sample."""

    def __init__(self, name: str) -> None:
        self.name = name
