"""The qc:: operators: schema, fake (shape) function, and the eager meaning every kernel is tested against.

Nothing is registered when this module is imported: the first use of `qc.<name>` (or `load()`) defines the operators.

| op | meaning |
|---|---|
| `qc.mask` | the boolean attention mask of a window and a padding mask |
| `qc.attention` | softmax(q k' * scale, masked) v, with grouped heads, soft cap, bias and sinks |
| `qc.cached_attention` | the same over past and new keys and values; returns both caches, grown |
| `qc.rope` | rotary position embedding of the leading channels |
| `qc.reordered_norm` | a norm that stores its channels in another order |
| `qc.hadamard` | channels mixed by a Hadamard matrix, block by block |
| `qc.fake_quantize` | an activation rounded to a grid and back |
| `qc.dequantize` | the float tensor of a QTensor's parts |
| `qc.linear` | a linear layer over a QTensor's parts |
| `qc.integer_linear` | the same over a rounded activation, added up in integers |
| `qc.embedding` | an embedding lookup in a QTensor's parts |
| `qc.onnx` | an ONNX node without an equivalent, run by ONNX Runtime |
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.attention import attention, cached_attention, mask
from qcompiler.errors import QCompilerError, require
from qcompiler.hadamard import transform
from qcompiler.rounding import fake_quantize, integer_linear
from qcompiler.scheme import QTensor

# Windows follow the (left, right) convention of flash attention: query at position p sees keys at positions
# p - left .. p + right; -1 means no limit. Causal is right = 0. `chunk` limits sight to one chunk of that size.
_WINDOW = "int left=-1, int right=-1, int chunk=0"
_EXTRA = (
    "Tensor? mask=None, Tensor? padding=None, Tensor? bias=None, Tensor? sinks=None, "
    "Tensor[]? key_grid=None, Tensor[]? value_grid=None"
)
# How keys and values are rounded, and the attention weights; see attention.py.
_ROUNDED = 'str key="", str value="", int block=0, int recent=0, int first=0, int levels=0'
_HOW = f"float scale=1.0, {_WINDOW}, float softcap=0.0, {_ROUNDED}"

SCHEMAS = {
    "mask": f"(Tensor like, Tensor? padding, SymInt queries, SymInt keys, *, {_WINDOW}) -> Tensor",
    "attention": f"(Tensor q, Tensor k, Tensor v, {_EXTRA}, *, {_HOW}) -> Tensor",
    "cached_attention": "(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, "
    f"{_EXTRA}, *, {_HOW}) -> (Tensor, Tensor, Tensor)",
    "rope": "(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False) -> Tensor",
    "reordered_norm": "(Tensor x, Tensor? weight, Tensor? bias, Tensor order, *, str kind, float eps) -> Tensor",
    "hadamard": "(Tensor x, *, int size) -> Tensor",
    "fake_quantize": "(Tensor x, Tensor[] grid, *, str scheme) -> Tensor",
    "dequantize": "(Tensor[] parts, *, str spec) -> Tensor",
    "linear": "(Tensor x, Tensor[] parts, Tensor? bias=None, *, str spec) -> Tensor",
    "integer_linear": "(Tensor x, Tensor[] parts, Tensor[] grid, Tensor? bias=None, *, str spec, str scheme) -> Tensor",
    "embedding": "(Tensor ids, Tensor[] parts, *, str spec) -> Tensor",
    "onnx": "(Tensor model, Tensor[] inputs, *, str op, ScalarType? dtype=None) -> Tensor[]",
}


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate channel pairs of x [batch, heads, sequence, d] by the angles whose cosine and sine are given.

    `cos` and `sin` are [batch or 1, sequence, r / 2], r <= d even; the channels from r on pass unchanged. Pairs are
    (i, i + r/2), or (2i, 2i + 1) if interleaved. Source: RoFormer (arXiv 2104.09864), section 3.4.
    """
    cos, sin = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def reordered_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, order: Tensor, *, kind: str, eps: float
) -> Tensor:
    """A norm over the last axis of x [..., k] that writes its channel `order[j]` (int64 [k]) to place j.

    `kind` is "rms" or "layer"; weight and bias [k] are in the order of x. A kernel writes each value to its place; no
    gather runs.
    """
    if kind == "rms":
        normed = F.rms_norm(x, x.shape[-1:], weight, eps)
    else:
        normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return normed[..., order]


def dequantize(parts: Sequence[Tensor], *, spec: str) -> Tensor:
    """The float tensor of a QTensor given by its parts and spec."""
    return QTensor.from_parts(parts, spec).dequantize().clone()


def linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None = None, *, spec: str) -> Tensor:
    """x [..., k] times the dequantized weight [n, k] transposed, plus bias [n]; returns [..., n]."""
    return F.linear(x, QTensor.from_parts(parts, spec).dequantize().to(x.dtype), bias)


def embedding(ids: Tensor, parts: Sequence[Tensor], *, spec: str) -> Tensor:
    """Rows `ids` of the dequantized weight [n, k]; returns [*ids.shape, k]. Only the rows asked for are decoded."""
    weight = QTensor.from_parts(parts, spec)
    flat = ids.reshape(-1)
    if not weight.by_row:
        return weight.dequantize()[ids].clone()
    return weight.take(flat).dequantize().view(*ids.shape, weight.columns).clone()


def onnx(model: Tensor, inputs: Sequence[Tensor], *, op: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The outputs of an ONNX model, given as its serialized bytes (uint8), for its inputs in order.

    `op` is the name of the operator in it, for the reader. With `dtype` float64 (a program that is run in double
    precision names it so) floats are narrowed to what the model takes, and those that it gives widened. The session
    is kept as long as the program uses it.
    """
    session, wide = _session(bytes(model.numpy())), dtype == torch.float64
    feed = {}
    for spec, value in zip(session.get_inputs(), inputs, strict=True):
        kind = _FLOATS.get(spec.type, value.dtype) if wide else value.dtype
        feed[spec.name] = value.to(kind).numpy()
    # A dtype made from its text: ONNX Runtime's own uint64 has a type number that torch refuses.
    found = [torch.from_numpy(value.view(value.dtype.str)) for value in map(np.asarray, session.run(None, feed))]
    return [value.double() if wide and value.is_floating_point() else value for value in found]


_FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}


@functools.lru_cache(maxsize=4096)
def _session(model: bytes) -> Any:
    """An ONNX Runtime session that computes exactly what the model says, on one thread."""
    onnxruntime = require("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _fake_mask(like, padding, queries, keys, *, left=-1, right=-1, chunk=0):  # type: ignore[no-untyped-def]
    batch = 1 if padding is None else padding.shape[0]
    return like.new_empty((batch, 1, queries, keys), dtype=torch.bool)


def _fake_attention(q, k, v, *args, **kwargs):  # type: ignore[no-untyped-def]
    return q.new_empty((*q.shape[:3], v.shape[-1]))


def _fake_cached_attention(q, k, v, past_k, past_v, *args, **kwargs):  # type: ignore[no-untyped-def]
    grown = past_k.shape[2] + k.shape[2]
    return (
        q.new_empty((*q.shape[:3], v.shape[-1])),
        k.new_empty((*k.shape[:2], grown, k.shape[3])),
        v.new_empty((*v.shape[:2], grown, v.shape[3])),
    )


def _fake_rope(x, cos, sin, *, interleaved=False):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _fake_reordered_norm(x, weight, bias, order, *, kind, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _fake_hadamard(x, *, size):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _fake_fake_quantize(x, grid, *, scheme):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _fake_dequantize(parts, *, spec):  # type: ignore[no-untyped-def]
    weight = QTensor.from_parts(parts, spec)
    return parts[0].new_empty(weight.shape, dtype=weight.dtype)


def _fake_linear(x, parts, bias=None, *, spec):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], QTensor.from_parts(parts, spec).shape[0]))


def _fake_integer_linear(x, parts, grid, bias=None, *, spec, scheme):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], QTensor.from_parts(parts, spec).shape[0]))


def _fake_embedding(ids, parts, *, spec):  # type: ignore[no-untyped-def]
    weight = QTensor.from_parts(parts, spec)
    return ids.new_empty((*ids.shape, weight.shape[-1]), dtype=weight.dtype)


def _fake_onnx(model, inputs, *, op, dtype=None):  # type: ignore[no-untyped-def]
    raise QCompilerError(f"the shapes that the ONNX operator {op} gives are known only by running it")


MEANINGS: dict[str, Callable[..., object]] = {
    "mask": mask,
    "attention": attention,
    "cached_attention": cached_attention,
    "rope": rope,
    "reordered_norm": reordered_norm,
    "hadamard": transform,
    "fake_quantize": fake_quantize,
    "dequantize": dequantize,
    "linear": linear,
    "integer_linear": integer_linear,
    "embedding": embedding,
    "onnx": onnx,
}


def meaning(target: Any) -> Any:
    """The eager function of a qc operator, through which PyTorch differentiates; anything else as it is."""
    name = str(getattr(target, "_schema", None) and target._schema.name)
    return MEANINGS[name.removeprefix("qc::")] if name.startswith("qc::") else target


class Operators:
    """The operators of one namespace, defined with PyTorch at their first use.

    `qc.linear` is `torch.ops.qc.linear.default`. A schema, a meaning and a fake (shape) function belong to each name.
    """

    def __init__(
        self, namespace: str, schemas: Mapping[str, str], meanings: Mapping[str, Any], fakes: Mapping[str, Any]
    ) -> None:
        self._namespace, self._schemas, self._meanings, self._fakes = namespace, schemas, meanings, fakes
        self._library: torch.library.Library | None = None

    def __getattr__(self, name: str) -> torch._ops.OpOverload:
        if name not in self._schemas:
            raise AttributeError(name)
        self._define()
        overload: torch._ops.OpOverload = getattr(getattr(torch.ops, self._namespace), name).default
        return overload

    def _define(self) -> None:
        """Once; the library object must stay alive."""
        if self._library is not None:
            return
        library = self._library = torch.library.Library(self._namespace, "DEF")
        for name, schema in self._schemas.items():
            library.define(name + schema)
            library.impl(name, self._meanings[name], "CompositeExplicitAutograd")
            torch.library.register_fake(f"{self._namespace}::{name}", self._fakes[name], lib=library)


qc = Operators("qc", SCHEMAS, MEANINGS, {name: globals()[f"_fake_{name}"] for name in SCHEMAS})


def load() -> None:
    """Define the qc:: operators with PyTorch, if that was not done yet."""
    qc._define()


def default_scale(head_dim: int) -> float:
    """The usual attention scale, 1 / sqrt(head_dim)."""
    return 1.0 / math.sqrt(head_dim)
