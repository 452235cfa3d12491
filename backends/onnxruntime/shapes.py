"""Rules for operators that move, pick and create values."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from qcompiler.backends.onnxruntime.graph import dtype_of, sizes_of, typed
from qcompiler.backends.onnxruntime.lowering import Lowering, Rule, Unsupported
from qcompiler.program import Type

LAST = 2**63 - 1


def rank(x: ir.Value) -> int:
    """Number of dimensions."""
    return len(sizes_of(x))


def view(low: Lowering, out: Type, x: ir.Value, sizes: Sequence[Any]) -> ir.Value:
    """The same values in another shape."""
    return low.reshape(x, list(sizes), out)


def flatten(low: Lowering, out: Type, x: ir.Value, start: int = 0, end: int = -1) -> ir.Value:
    """Axes start .. end in one."""
    start, end = start % max(rank(x), 1), end % max(rank(x), 1)
    sizes = [low.size(x, i) for i in range(start)] + [-1] + [low.size(x, i) for i in range(end + 1, rank(x))]
    return low.reshape(x, sizes, out)


def unflatten(low: Lowering, out: Type, x: ir.Value, axis: int, sizes: Sequence[Any]) -> ir.Value:
    """One axis in several."""
    axis %= rank(x)
    before, after = range(axis), range(axis + 1, rank(x))
    return low.reshape(x, [*(low.size(x, i) for i in before), *sizes, *(low.size(x, i) for i in after)], out)


def unsqueeze(low: Lowering, out: Type, x: ir.Value, axis: int) -> ir.Value:
    """With an axis of size 1 more."""
    return low.op("Unsqueeze", x, [axis % (rank(x) + 1)])


def squeeze(low: Lowering, out: Type, x: ir.Value, axes: Any = None) -> ir.Value:
    """Without the axes of size 1 among those given (all, if none are)."""
    given = range(rank(x)) if axes is None else [axes] if isinstance(axes, int) else axes
    ones = [axis % rank(x) for axis in given if sizes_of(x)[axis] == 1]
    return low.op("Squeeze", x, ones) if ones else x


def transpose(low: Lowering, out: Type, x: ir.Value, a: int, b: int) -> ir.Value:
    """With two axes exchanged."""
    order = list(range(rank(x)))
    order[a], order[b] = order[b], order[a]
    return low.op("Transpose", x, perm=order)


def matrix_transpose(low: Lowering, out: Type, x: ir.Value) -> ir.Value:
    """With rows and columns exchanged."""
    return low.op("Transpose", x, perm=list(range(rank(x)))[::-1])


def inner_transpose(low: Lowering, out: Type, x: ir.Value) -> ir.Value:
    """With the last two axes exchanged."""
    return transpose(low, out, x, -2, -1)


def permute(low: Lowering, out: Type, x: ir.Value, order: Sequence[int]) -> ir.Value:
    """With the axes in another order."""
    return low.op("Transpose", x, perm=[axis % rank(x) for axis in order])


def expand(low: Lowering, out: Type, x: ir.Value, sizes: Sequence[Any], *rest: Any) -> ir.Value:
    """Repeated along axes of size 1."""
    target = [1 if isinstance(size, int) and size == -1 else size for size in sizes]
    return low.op("Expand", x, low.shape(target))


def expand_as(low: Lowering, out: Type, x: ir.Value, other: ir.Value) -> ir.Value:
    """Repeated along axes of size 1 to the shape of another."""
    return low.op("Expand", x, low.op("Shape", other))


def repeat(low: Lowering, out: Type, x: ir.Value, times: Sequence[Any]) -> ir.Value:
    """Tiled."""
    missing = len(times) - rank(x)
    wide = low.op("Unsqueeze", x, list(range(missing))) if missing else x
    return low.op("Tile", wide, low.shape(times))


def repeat_interleave(
    low: Lowering, out: Type, x: ir.Value, times: Any, axis: int | None = None, *rest: Any
) -> ir.Value:
    """Each entry of an axis several times in a row."""
    if not isinstance(times, int) or axis is None:
        raise Unsupported("repeat_interleave with counts of its own for each entry")
    axis %= rank(x)
    tiled = low.op("Tile", low.op("Unsqueeze", x, [axis + 1]), [1] * (axis + 1) + [times] + [1] * (rank(x) - axis - 1))
    after = [low.size(x, i) for i in range(axis + 1, rank(x))]
    return low.op("Reshape", tiled, low.shape([*(low.size(x, i) for i in range(axis)), -1, *after]))


def cat(low: Lowering, out: Type, values: Sequence[ir.Value], axis: int = 0) -> ir.Value:
    """One after the other; empty one-dimensional parts are ignored, as PyTorch does."""
    parts = [low.cast(v, out.dtype) for v in values if sizes_of(v) != (0,) or out.rank == 1]
    return low.op("Concat", *parts, axis=axis % out.rank)


def stack(low: Lowering, out: Type, values: Sequence[ir.Value], axis: int = 0) -> ir.Value:
    """One after the other along a new axis."""
    axis %= out.rank
    return low.op("Concat", *(low.op("Unsqueeze", low.cast(v, out.dtype), [axis]) for v in values), axis=axis)


def split_sizes(low: Lowering, out: Any, x: ir.Value, sizes: Sequence[Any], axis: int = 0) -> list[ir.Value]:
    """Pieces of the given sizes."""
    return low.ops("Split", x, low.shape(sizes), outputs=len(sizes), axis=axis % rank(x))


def split(low: Lowering, out: Any, x: ir.Value, size: Any, axis: int = 0) -> list[ir.Value]:
    """Pieces of one size; the last may be shorter."""
    if isinstance(size, (list, tuple)):
        return split_sizes(low, out, x, size, axis)
    whole = sizes_of(x)[axis]
    if not isinstance(whole, int) or not isinstance(size, int):
        raise Unsupported("a split of an axis whose size is not known")
    return split_sizes(low, out, x, [min(size, whole - start) for start in range(0, whole, size)], axis)


def chunk(low: Lowering, out: Any, x: ir.Value, count: int, axis: int = 0) -> list[ir.Value]:
    """About equal pieces."""
    whole = sizes_of(x)[axis]
    if not isinstance(whole, int):
        raise Unsupported("chunks of an axis whose size is not known")
    return split(low, out, x, -(-whole // count), axis)


def unbind(low: Lowering, out: Any, x: ir.Value, axis: int = 0) -> list[ir.Value]:
    """The entries along an axis."""
    count = sizes_of(x)[axis]
    if not isinstance(count, int):
        raise Unsupported("the entries of an axis whose size is not known")
    return [low.op("Gather", x, i, axis=axis % rank(x)) for i in range(count)]


def select(low: Lowering, out: Type, x: ir.Value, axis: int, index: Any) -> ir.Value:
    """One entry along an axis."""
    return low.op("Gather", x, low.cast(index, torch.int64), axis=axis % rank(x))


def slice_(
    low: Lowering, out: Type, x: ir.Value, axis: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    """Every step-th entry from start to end."""
    start, end = 0 if start is None else start, LAST if end is None else end
    if isinstance(start, int) and start == 0 and isinstance(end, int) and end == LAST and step == 1:
        return x
    return low.op("Slice", x, low.shape([start]), low.shape([end]), [axis % rank(x)], [step])


def narrow(low: Lowering, out: Type, x: ir.Value, axis: int, start: Any, length: Any) -> Any:
    """`length` entries from start on."""
    if isinstance(start, int) and isinstance(length, int):
        return slice_(low, out, x, axis, start, start + length)
    end = low.op("Add", low.cast(start, torch.int64), low.cast(length, torch.int64))
    return slice_(low, out, x, axis, start, end)


def index_select(low: Lowering, out: Type, x: ir.Value, axis: int, index: ir.Value) -> ir.Value:
    """The entries with the given numbers."""
    return low.op("Gather", x, index, axis=axis % rank(x))


def gather(low: Lowering, out: Type, x: ir.Value, axis: int, index: ir.Value, *rest: Any) -> ir.Value:
    """For each place, the entry along an axis with the number that stands there."""
    return low.op("GatherElements", x, index, axis=axis % rank(x))


def index(low: Lowering, out: Type, x: ir.Value, indices: Sequence[ir.Value | None]) -> ir.Value:
    """Advanced indexing with one index, or with several for the leading axes."""
    given = [(axis, one) for axis, one in enumerate(indices) if one is not None]
    if any(dtype_of(one) == torch.bool for _, one in given):
        raise Unsupported("indexing by truth values: the result's size depends on the data")
    if len(given) == 1:
        return low.op("Gather", x, given[0][1], axis=given[0][0])
    if [axis for axis, _ in given] != list(range(len(given))):
        raise Unsupported("several indices that are not for the leading axes")
    shape = low.op("Shape", indices_sum(low, [one for _, one in given]))
    wide = [low.op("Expand", one, shape) for _, one in given]
    return low.op("GatherND", x, low.op("Concat", *(low.op("Unsqueeze", w, [-1]) for w in wide), axis=-1))


def indices_sum(low: Lowering, values: Sequence[ir.Value]) -> ir.Value:
    """A value with the shape that all broadcast to."""
    found = values[0]
    for value in values[1:]:
        found = low.op("Add", found, value)
    return found


def embedding(low: Lowering, out: Type, weight: ir.Value, ids: ir.Value, *rest: Any) -> ir.Value:
    """Rows of a table."""
    return low.op("Gather", weight, ids, axis=0)


def flip(low: Lowering, out: Type, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    """Backwards along the given axes."""
    count = len(axes)
    return low.op("Slice", x, [-1] * count, [-LAST] * count, [a % rank(x) for a in axes], [-1] * count)


def roll(low: Lowering, out: Type, x: ir.Value, shifts: Any, axes: Any = ()) -> ir.Value:
    """Moved around along the given axes."""
    pairs = zip(*([v] if isinstance(v, int) else v for v in (shifts, axes)), strict=True)
    for shift, axis in pairs:
        axis %= rank(x)
        tail = low.op("Slice", x, [-shift], [LAST], [axis])
        x = typed(low.op("Concat", tail, low.op("Slice", x, [0], [-shift], [axis]), axis=axis), out)
    return x


def pad(low: Lowering, out: Type, x: ir.Value, widths: Sequence[int], *rest: Any) -> ir.Value:
    """Filled up with a constant at the ends of the last axes."""
    mode, value = rest if len(rest) == 2 else ("constant", rest[0] if rest else 0)
    before, after = [0] * rank(x), [0] * rank(x)
    for i in range(len(widths) // 2):
        before[-1 - i], after[-1 - i] = widths[2 * i], widths[2 * i + 1]
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    return low.op("Pad", x, [*before, *after], low.cast(value or 0, out.dtype), mode=modes[mode])


def arange(low: Lowering, out: Type, *arguments: Any) -> ir.Value:
    """Numbers in steps: arange(end), arange(start, end), arange(start, end, step)."""
    start, end, step = {1: (0, None, 1), 2: (None, None, 1), 3: (None, None, None)}[arity(low)]
    start = arguments[0] if start is None else start
    end = arguments[arity(low) > 1]
    step = arguments[2] if step is None else step
    return low.op("Range", *(low.cast(x, out.dtype) for x in (start, end, step)))


def arity(low: Lowering) -> int:
    """How many numbers an `arange` overload takes."""
    assert low.node is not None
    return {"default": 1, "start": 2, "start_step": 3}[low.node.target._overloadname]  # type: ignore[union-attr]


def filled(value: Any) -> Rule:
    """A constant of a given shape: zeros, ones."""
    return lambda low, out, sizes, *rest: fill(low, out, sizes, value)


def fill(low: Lowering, out: Type, sizes: Sequence[Any], value: Any) -> ir.Value:
    """A number repeated to a shape."""
    return low.op("Expand", low.cast(value, out.dtype), low.shape(sizes))


def full(low: Lowering, out: Type, sizes: Sequence[Any], value: Any, *rest: Any) -> ir.Value:
    """A given number repeated to a shape."""
    return fill(low, out, sizes, value)


def like(value: Any) -> Rule:
    """A constant in the shape of another value."""
    return lambda low, out, x, *rest: low.op("Expand", low.cast(value, out.dtype), low.op("Shape", x))


def full_like(low: Lowering, out: Type, x: ir.Value, value: Any, *rest: Any) -> ir.Value:
    """A given number in the shape of another value."""
    return low.op("Expand", low.cast(value, out.dtype), low.op("Shape", x))


def new(value: Any) -> Rule:
    """A constant of a given shape, made from another value's dtype."""
    return lambda low, out, x, sizes, *rest: fill(low, out, sizes, value)


def new_full(low: Lowering, out: Type, x: ir.Value, sizes: Sequence[Any], value: Any, *rest: Any) -> ir.Value:
    """A given number repeated to a shape."""
    return fill(low, out, sizes, value)


def triangle(upper: int) -> Rule:
    """The upper or lower triangle of matrices."""

    def rule(low: Lowering, out: Type, x: ir.Value, diagonal: int = 0) -> ir.Value:
        if out.dtype != torch.bool:
            return low.op("Trilu", x, low.graph.constant(diagonal), upper=upper)
        found = low.op("Trilu", low.cast(x, torch.int64), low.graph.constant(diagonal), upper=upper)
        return low.op("Cast", found, to=int(ir.DataType.BOOL))

    return rule


def size(low: Lowering, out: Any, x: ir.Value, axis: int) -> ir.Value:
    """A size, as a number."""
    return low.size(x, axis)


def shape_of(low: Lowering, out: Type, x: ir.Value) -> ir.Value:
    """All sizes, as a vector."""
    return low.op("Shape", x)


def one_hot(low: Lowering, out: Type, ids: ir.Value, count: int = -1) -> ir.Value:
    """1 at the place that is named, 0 elsewhere."""
    if count < 0:
        raise Unsupported("one_hot without the number of classes")
    return low.op("OneHot", ids, low.graph.constant([count]), low.graph.constant([0, 1]), axis=-1)


def scatter(reduction: str) -> Rule:
    """Values written to, or added at, the places that an index names."""

    def rule(low: Lowering, out: Type, x: ir.Value, axis: int, places: ir.Value, source: Any, *rest: Any) -> ir.Value:
        if not isinstance(source, ir.Value) or sizes_of(source) == ():
            source = low.op("Expand", low.cast(source, out.dtype), low.op("Shape", places))
        axis %= rank(x)
        return low.op("ScatterElements", x, places, low.cast(source, out.dtype), axis=axis, reduction=reduction)

    return rule


def scalar_tensor(low: Lowering, out: Type, value: Any, *rest: Any) -> ir.Value:
    """A number as a tensor."""
    return low.cast(value, out.dtype)


RULES: dict[str, Rule] = {
    **dict.fromkeys(["aten.view", "aten.reshape", "aten._unsafe_view"], view),
    "aten.flatten": flatten,
    "aten.unflatten": unflatten,
    "aten.unsqueeze": unsqueeze,
    "aten.squeeze": squeeze,
    "aten.transpose": transpose,
    "aten.t": matrix_transpose,
    "aten.numpy_T": matrix_transpose,
    **dict.fromkeys(["aten.mT", "aten.adjoint"], inner_transpose),
    "aten.permute": permute,
    "aten.expand": expand,
    "aten.expand_as": expand_as,
    "aten.repeat": repeat,
    "aten.repeat_interleave": repeat_interleave,
    "aten.cat": cat,
    "aten.stack": stack,
    "aten.split": split,
    "aten.split_with_sizes": split_sizes,
    "aten.chunk": chunk,
    "aten.unbind": unbind,
    "aten.select": select,
    "aten.slice": slice_,
    "aten.narrow": narrow,
    "aten.index_select": index_select,
    "aten.gather": gather,
    "aten.index": index,
    "aten.embedding": embedding,
    "aten.flip": flip,
    "aten.roll": roll,
    "aten.constant_pad_nd": pad,
    "aten.pad": pad,
    "aten.arange": arange,
    **dict.fromkeys(["aten.zeros", "aten.empty"], filled(0)),
    "aten.ones": filled(1),
    "aten.full": full,
    **dict.fromkeys(["aten.zeros_like", "aten.empty_like"], like(0)),
    "aten.ones_like": like(1),
    "aten.full_like": full_like,
    **dict.fromkeys(["aten.new_zeros", "aten.new_empty"], new(0)),
    "aten.new_ones": new(1),
    "aten.new_full": new_full,
    "aten.triu": triangle(1),
    "aten.tril": triangle(0),
    "aten.sym_size": size,
    "aten._shape_as_tensor": shape_of,
    "aten.one_hot": one_hot,
    "aten.scatter": scatter("none"),
    "aten.scatter_add": scatter("add"),
    "aten.scalar_tensor": scalar_tensor,
}
