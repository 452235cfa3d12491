"""What transformers models call for attention while they are captured: qc.attention and qc.mask.

transformers lets anybody register an attention function and a mask function under a name
(https://huggingface.co/docs/transformers/attention_interface). Ours put one operator each into the graph. They are
registered for the duration of a capture only.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler import ops
from qcompiler.errors import No

NAME = "qcompiler"
EXPERTS = "batched_mm"  # the spelling of a mixture of experts without a data-dependent loop


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: q, k, v [batch, heads, sequence, d] to [batch, sequence, heads, dv].

    As in transformers' own eager and sdpa functions, a window that a model passes beside its mask is not applied a
    second time, and without a mask `is_causal` decides.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = ops.qc.attention(
        query,
        key,
        value,
        attention_mask,
        None,
        position_bias,
        s_aux,
        scale=ops.default_scale(query.shape[-1]) if scaling is None else float(scaling),
        right=0 if attention_mask is None and causal else -1,
        softcap=float(softcap or 0.0),
    )
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Window:
    """What a query sees: keys at `-left .. right` from it (-1: no limit) and in its own chunk (0: no chunks)."""

    left: int = -1
    right: int = -1
    chunk: int = 0

    def __and__(self, other: "Window") -> "Window | No":
        if self.chunk and other.chunk and self.chunk != other.chunk:
            return No(f"chunks of {self.chunk} and of {other.chunk}")
        left = min((side for side in (self.left, other.left) if side >= 0), default=-1)
        right = min((side for side in (self.right, other.right) if side >= 0), default=-1)
        return Window(left, right, self.chunk or other.chunk)

    def sees(self, query: int, key: int, start: int = 0) -> bool:
        """Whether the query at one position sees the key at another; chunks are counted from `start`."""
        near = (self.left < 0 or key >= query - self.left) and (self.right < 0 or key <= query + self.right)
        same = self.chunk == 0 or (key - start) // self.chunk == (query - start) // self.chunk
        return near and same


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """transformers' mask function: the boolean mask [batch or 1, 1, queries, keys] as one qc.mask.

    A mask function that is no window is evaluated on all pairs of positions instead.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = mask_function or causal_mask_function
    window = recognize(function)
    plain = isinstance(q_offset, int) and isinstance(kv_offset, int) and q_offset == kv_offset == 0
    if isinstance(window, Window) and plain:
        like = attention_mask if attention_mask is not None else torch.zeros((), device=device)
        how = {"left": window.left, "right": window.right, "chunk": window.chunk}
        made: Tensor = ops.qc.mask(like, attention_mask, q_length, kv_length, **how)
        return made
    evaluated: Any = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        function,
        attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        device=device,
    )
    assert isinstance(evaluated, Tensor)
    return evaluated


def recognize(function: Callable[..., Any]) -> Window | No:
    """The window that a transformers mask function means, read from its closure and checked by asking it.

    >>> from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
    >>> recognize(causal_mask_function)
    Window(left=-1, right=0, chunk=0)
    >>> recognize(sliding_window_causal_mask_function(8))
    Window(left=7, right=0, chunk=0)
    """
    name = getattr(function, "__qualname__", "").removesuffix(".<locals>.inner_mask")
    cells = _closure(function)
    if name == "and_masks.<locals>.and_mask":
        return _all_of([recognize(part) for part in cells["mask_functions"]])
    guess = _guess(name, cells)
    if isinstance(guess, Window) and not _agree(function, cells, guess):
        return No(f"{name} is not what its name says")
    return guess


def _all_of(parts: list[Window | No]) -> Window | No:
    """The window that lies in all of them, or the first refusal."""
    window: Window | No = Window()
    for part in parts:
        if isinstance(part, No) or isinstance(window, No):
            return part if isinstance(part, No) else window
        window = window & part
    return window


def _guess(name: str, cells: dict[str, Any]) -> Window | No:
    """What a mask function of that name and closure ought to mean."""
    if name == "causal_mask_function":
        return Window(right=0)
    if name == "bidirectional_mask_function":
        return Window()
    if name == "sliding_window_overlay" and isinstance(cells.get("sliding_window"), int):
        return Window(left=cells["sliding_window"] - 1)
    if name == "sliding_window_bidirectional_overlay" and isinstance(cells.get("sliding_window"), int):
        return Window(left=cells["sliding_window"], right=cells["sliding_window"])
    if name == "chunked_overlay" and isinstance(cells.get("chunk_size"), int):
        return Window(chunk=cells["chunk_size"])
    return No(f'the mask function "{name}" is no window')


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    return {} if code is None else {n: c.cell_contents for n, c in zip(code.co_freevars, cells, strict=True)}


def _agree(function: Callable[..., Any], cells: dict[str, Any], window: Window) -> bool:
    """Whether function and window give the same answer at all positions around the window's edges.

    Asked with plain numbers: tensors would become part of the graph that is being captured.
    """
    edge = max(window.left, window.right, window.chunk, 1)
    start = 2 if window.chunk else 0
    asked = _with_start(function, cells, start) if window.chunk else function
    near = sorted({q for e in (0, edge, 2 * edge, 3 * edge) for q in range(e - 2, e + 3) if q >= start})
    try:
        return all(bool(asked(0, 0, q, k)) == window.sees(q, k, start) for q in near for k in near)
    except Exception:  # noqa: BLE001  it wants tensors, so it is not the function that we know
        return False


def _with_start(function: Callable[..., Any], cells: dict[str, Any], start: int) -> Callable[..., Any]:
    """The same function whose left padding, a tensor of the model's inputs, is the number `start`."""
    values = {**cells, "left_padding": [start]}
    code = function.__code__
    closure = tuple(types.CellType(values[name]) for name in code.co_freevars)
    return types.FunctionType(code, function.__globals__, closure=closure)


@contextmanager
def implementation(model: nn.Module, name: str | None) -> Iterator[None]:
    """Let `model` use the attention implementation `name` (None: its own) and exportable experts, for the time being.

    The registries of transformers and the model's configurations are afterwards as they were.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    configs = list(_configs(model))
    before = [(c, c._attn_implementation_internal, c._experts_implementation_internal) for c in configs]
    registries[0][NAME], registries[1][NAME] = attention, mask
    try:
        for config in configs:
            if name is not None:
                config._attn_implementation_internal = name
            if config._experts_implementation_internal is not None:
                config._experts_implementation_internal = EXPERTS
        yield
    finally:
        for config, attention_before, experts_before in before:
            config._attn_implementation_internal = attention_before
            config._experts_implementation_internal = experts_before
        for registry in registries:
            registry.pop(NAME, None)


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every configuration object that a module of `model` holds, and those inside them, once each."""
    seen: set[int] = set()
    waiting: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if id(config) in seen or not hasattr(config, "_attn_implementation_internal"):
            continue
        seen.add(id(config))
        yield config
        waiting += [getattr(config, name, None) for name in config.sub_configs]
