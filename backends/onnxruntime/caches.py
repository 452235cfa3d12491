"""How GroupQueryAttention stores its cache: in floats, or in 8 or 4 bits with a static scale for each channel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompiler.backends.onnxruntime.graph import Stored
from qcompiler.backends.onnxruntime.lowering import Lowering
from qcompiler.errors import No
from qcompiler.program import Program, Type
from qcompiler.rewrite import named_arguments
from qcompiler.rounding import group_size
from qcompiler.scheme import Scheme


@dataclass(frozen=True)
class Storage:
    """The storage of one attention's keys and values; `bits` 0 stands for floats, `scales` are float32 [heads * d]."""

    bits: int = 0
    scales: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, low: Lowering, node: fx.Node) -> "Storage | No":
        """What this attention asks for, or why the operator does not have it."""
        given = named_arguments(node)
        texts = given["key"], given["value"]
        if given["levels"]:
            return No("GroupQueryAttention does not round the attention weights")
        if not any(texts):
            return cls()
        if not all(texts):
            return No("GroupQueryAttention rounds both keys and values or neither")
        if given["block"] or given["recent"] or given["first"]:
            return No("GroupQueryAttention has one scheme for all tokens: block, recent and first have none in it")
        key, value = map(Scheme.parse, texts)
        for scheme in (key, value):
            if scheme.code != "int" or scheme.dynamic or not scheme.symmetric or scheme.bits not in (4, 8):
                return No(f"GroupQueryAttention stores 8 or 4 bits, static and symmetric, not {scheme}")
        if key.bits != value.bits:
            return No(f"GroupQueryAttention stores keys and values alike, not in {key.bits} and {value.bits} bits")
        pairs = ((key, "key_grid", "k"), (value, "value_grid", "v"))
        scales = (spread(low.program, scheme, given[grid], given[x]) for scheme, grid, x in pairs)
        return cls(key.bits, tuple(scale.reshape(-1) for scale in scales))

    def types(self, kinds: Sequence[Type]) -> list[Type]:
        """The types in which caches of these types are stored."""
        if not self.bits:
            return list(kinds)
        if self.bits == 8:
            return [Type(kind.shape, torch.int8) for kind in kinds]
        halves = [kind.shape[3] // 2 for kind in kinds if isinstance(kind.shape[3], int)]  # two codes a byte
        return [Type((*kind.shape[:3], half), torch.uint8) for kind, half in zip(kinds, halves, strict=True)]

    def inputs(self, low: Lowering) -> list[ir.Value]:
        """The operator's scales."""
        names = (f"{low.label}.key_scale", f"{low.label}.value_scale")
        return [_stored(low, name, scale) for name, scale in zip(names, self.scales, strict=False)]

    def attributes(self) -> dict[str, Any]:
        """The operator's attributes about its cache."""
        if not self.bits:
            return {}
        return {"kv_cache_bit_width": self.bits, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}


def _stored(low: Lowering, name: str, scale: Tensor) -> ir.Value:
    return low.graph.store(name, Stored(tuple(scale.shape), torch.float32, lambda: scale, name))


def spread(program: Program, scheme: Scheme, grid: Sequence[fx.Node], x: fx.Node) -> Tensor:
    """A static scale, [heads, 1, groups], for each channel of x [batch, heads, sequence, d]: [heads, 1, d]."""
    heads, width = x.meta["type"].shape[1], x.meta["type"].shape[3]
    scale = program.tensors[str(grid[0].target)].float()
    wide = scale.repeat_interleave(group_size(scheme, width), -1)[..., :width]
    return wide.expand(heads, 1, width).contiguous()
