"""The numbers in small integer tensors of an ONNX model, as far as they follow from shapes and constants.

Exporters compute the shapes they reshape to in the graph: Shape, Gather, Mul, Concat. Here each such operator says what
its numbers are: integers known now, and nodes that give a size when the program runs.
"""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qcompiler.formats.onnx_model import SMALL

if TYPE_CHECKING:
    from qcompiler.frontends.onnx_graph import Builder, Call

Sizes = list[Any]  # integers, and nodes that give one


def _shape_sizes(builder: "Builder", call: "Call") -> Sizes | None:
    rank = call.rank(0)
    start, end, _ = slice(call.attribute("start", 0), call.attribute("end", rank)).indices(rank)
    return [call.size(0, i) for i in range(start, end)]


def _gather_sizes(builder: "Builder", call: "Call") -> Sizes | None:
    known, index = call.sizes(0), call.constant(1)
    if known is None or index is None or index.ndim > 1:
        return None
    places = [int(i) for i in index.reshape(-1)]
    return [known[i] for i in places] if all(-len(known) <= i < len(known) for i in places) else None


def _slice_sizes(builder: "Builder", call: "Call") -> Sizes | None:
    known = call.sizes(0)
    bounds = [call.listed(name, i, since=10) for name, i in (("starts", 1), ("ends", 2))]
    steps = call.constant(4)
    if known is None or None in bounds or (call.has(4) and (steps is None or int(steps.reshape(-1)[0]) < 1)):
        return None
    step = 1 if steps is None else int(steps.reshape(-1)[0])
    return known[bounds[0][0] : bounds[1][0] : step]  # type: ignore[index]


def _concat_sizes(builder: "Builder", call: "Call") -> Sizes | None:
    parts = [builder.sizes(name) for name in call.proto.input]
    return None if any(p is None for p in parts) else [size for part in parts if part is not None for size in part]


def _same_sizes(builder: "Builder", call: "Call") -> Sizes | None:
    return call.sizes(0)


def _arithmetic(function: Any) -> Any:
    def sizes(builder: "Builder", call: "Call") -> Sizes | None:
        a, b = call.sizes(0), call.sizes(1)
        if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
            return None
        length = max(len(a), len(b))
        pairs = list(zip(a * (length // len(a)), b * (length // len(b)), strict=True)) if a and b else []
        if function is operator.floordiv and any(isinstance(v, int) and v <= 0 for pair in pairs for v in pair):
            return None  # ONNX divides towards zero
        return [
            function(x, y) if isinstance(x, int) and isinstance(y, int) else builder.emit(function, x, y)
            for x, y in pairs
        ]

    return sizes


def _cast_sizes(builder: "Builder", call: "Call") -> Sizes | None:
    return call.sizes(0) if call.attribute("to", 0) in (6, 7) else None


def _filled_sizes(builder: "Builder", call: "Call") -> Sizes | None:
    """ConstantOfShape of a short vector."""
    count, value = call.sizes(0), call.tensor_attribute("value")
    if count is None or len(count) != 1 or not isinstance(count[0], int) or count[0] > SMALL:
        return None
    return [0 if value is None else int(value)] * count[0]


def _equal_sizes(builder: "Builder", call: "Call") -> Sizes | None:
    """Whether sizes are given numbers, as 0 and 1; a size that is not known yet is never negative."""
    a, b = call.sizes(0), call.sizes(1)
    if a is None or b is None or len(a) != len(b):
        return None
    pairs = list(zip(a, b, strict=True))
    known = all((isinstance(x, int) and isinstance(y, int)) or _negative(x) or _negative(y) for x, y in pairs)
    return [int(isinstance(x, int) and isinstance(y, int) and x == y) for x, y in pairs] if known else None


def _negative(size: Any) -> bool:
    return isinstance(size, int) and size < 0


def _chosen_sizes(builder: "Builder", call: "Call") -> Sizes | None:
    which, a, b = (call.sizes(i) for i in range(3))
    if which is None or a is None or b is None or not len(which) == len(a) == len(b):
        return None
    if not all(isinstance(w, int) for w in which):
        return None
    return [x if w else y for w, x, y in zip(which, a, b, strict=True)]


SIZES: dict[str, Callable[["Builder", "Call"], Sizes | None]] = {
    "ConstantOfShape": _filled_sizes,
    "Equal": _equal_sizes,
    "Where": _chosen_sizes,
    "Shape": _shape_sizes,
    "Gather": _gather_sizes,
    "Slice": _slice_sizes,
    "Concat": _concat_sizes,
    "Cast": _cast_sizes,
    "Identity": _same_sizes,
    "Squeeze": _same_sizes,
    "Unsqueeze": _same_sizes,
    "Add": _arithmetic(operator.add),
    "Sub": _arithmetic(operator.sub),
    "Mul": _arithmetic(operator.mul),
    "Div": _arithmetic(operator.floordiv),
}
