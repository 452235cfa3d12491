"""Caches of fixed size: what the attentions of a program hold, for as many tokens as there may be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.kernels.kv_append import kv_append
from qcompiler.kernels.kv_cache import FloatCache, QuantizedCache, windowed
from qcompiler.kernels.kv_window import window_append
from qcompiler.kernels.records import split_all
from qcompiler.ops import qc
from qcompiler.program import Program
from qcompiler.rewrite import named_arguments

Records = tuple[Any, ...]  # a FloatCache; or QuantizedCaches of keys and values, and perhaps a KvWindow


@dataclass(frozen=True)
class Held:
    """What one attention holds: the names of its caches, their sizes, and how they are rounded ("" is not at all)."""

    key: str
    value: str
    heads: int
    width: int
    value_width: int
    dtype: torch.dtype
    key_scheme: str
    value_scheme: str
    block: int
    recent: int
    first: int

    @classmethod
    def of(cls, node: fx.Node) -> "Held":
        """What a `qc.cached_attention` holds."""
        given = named_arguments(node)
        key, value = given["k"].meta["type"], given["v"].meta["type"]
        return cls(
            key=str(given["past_k"].target),
            value=str(given["past_v"].target),
            heads=key.shape[1],
            width=key.shape[3],
            value_width=value.shape[3],
            dtype=key.dtype,
            key_scheme=given["key"] or "",
            value_scheme=given["value"] or "",
            block=given["block"],
            recent=given["recent"],
            first=given["first"],
        )

    @property
    def windowed(self) -> bool:
        """Whether some tokens keep their floats beside the codes."""
        return bool(self.block or self.recent or self.first)

    @property
    def float_dtype(self) -> torch.dtype:
        """Of tokens that keep their floats: what the kernels compute in."""
        return torch.float16 if self.dtype == torch.float32 else self.dtype

    def records(self, batch: int, capacity: int, device: torch.device) -> Records:
        """Empty caches."""
        if not self.key_scheme:
            shape = (batch, self.heads, capacity)
            keys = torch.zeros(*shape, self.width, dtype=self.dtype, device=device)
            return (FloatCache(keys, torch.zeros(*shape, self.value_width, dtype=self.dtype, device=device)),)
        pair = QuantizedCache.pair(
            self.key_scheme, self.value_scheme, batch, self.heads, capacity, self.width, device=device
        )
        return windowed(pair, self.float_dtype, self.recent, self.first, self.block) if self.windowed else pair


@dataclass(frozen=True)
class Caches:
    """The caches of every attention, in the order of the graph, for `batch` sequences of at most `capacity` tokens."""

    batch: int
    capacity: int
    layers: tuple[tuple[Held, Records], ...]

    @classmethod
    def empty(cls, program: Program, batch: int, capacity: int, device: torch.device) -> "Caches":
        """Room for what the program's attentions hold."""
        held = [Held.of(node) for node in program.calls(qc.cached_attention)]
        return cls(batch, capacity, tuple((one, one.records(batch, capacity, device)) for one in held))

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, as a step takes them."""
        return [tensor for _, records in self.layers for tensor in split_all(records)[0]]

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Take over caches [batch, heads, length, d] as the program made them."""
        for held, records in self.layers:
            k, v = state[held.key], state[held.value]
            start = torch.zeros(self.batch, dtype=torch.int32, device=k.device)
            if isinstance(records[0], FloatCache):
                records[0].keys[:, :, : k.shape[2]] = k
                records[0].values[:, :, : v.shape[2]] = v
            elif len(records) == 2:
                for new, cache in zip((k, v), records, strict=True):
                    kv_append(new.contiguous(), cache, start)
            else:
                k, v = (part.to(held.float_dtype).contiguous() for part in (k, v))
                keys, values, window = records
                window_append(k, v, keys, values, window, start, start, fresh=True)
