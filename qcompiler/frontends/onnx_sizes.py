"""The sizes of an ONNX model's values: which axes are free, what to try them with, and which are one and the same.

ONNX names the free axes of the inputs; what follows from them is found on data. Two axes whose sizes agreed in two runs
at different sizes have one name, and an axis whose size never changed is static, unless its size may depend on values.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qcompiler.program import Type

# For free axes; some models take multiples of 32, or one size only. Small images vanish in the strides of a network.
TRIED = (7, 11, 16, 64, 1, 224, 256, 512, 576)
TRIED_IMAGES = (64, 128, 224, 256, 32, 512)
APART = 32  # between free axes of different names, where the model allows it

# Inputs whose values say how large the output is; None: the sizes follow from values in a way of their own.
_SIZED_BY: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(["Reshape", "Expand", "Tile", "TopK", "OneHot", "Split", "Unsqueeze", "Squeeze", "Upsample"], (1,)),
    **dict.fromkeys(["ConstantOfShape", "RandomNormal", "RandomUniform"], (0,)),
    "Slice": (1, 2, 3, 4),
    "Range": (0, 1, 2),
    "Pad": (1, 3),
    "Resize": (1, 2, 3),
    "CenterCropPad": (1,),
    **dict.fromkeys(["NonZero", "Unique", "Compress", "NonMaxSuppression", "If", "Loop", "Scan"], None),
}
_SIZES = ("Shape", "Size")


def symbol(name: str, axis: int, size: Any) -> int | str:
    """What an axis of an input is called: its static size, its name in the model, or one made up for a nameless one."""
    if isinstance(size, int) and size > 0:
        return size
    named = isinstance(size, str) and size.isidentifier() and not size.startswith("unk__")
    return size if named else f"{name}_{axis}"


def symbols(specs: Mapping[str, Any], inputs: Sequence[str]) -> dict[str, list[int | str]]:
    """The sizes of the inputs by name."""
    return {name: [symbol(name, axis, d) for axis, d in enumerate(specs[name].shape)] for name in inputs}


Shapes = Mapping[str, Sequence[int | str]]  # of the inputs; free axes are names


def first_axes(shapes: Shapes) -> list[str]:
    """The free axes that come first in some input: the batch, as a rule."""
    return list(dict.fromkeys(shape[0] for shape in shapes.values() if shape and isinstance(shape[0], str)))


def seen(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of the free axes in given inputs."""
    pairs = (
        (axis, size) for name, array in given.items() for axis, size in zip(shapes[name], array.shape, strict=True)
    )
    return {axis: size for axis, size in pairs if isinstance(axis, str)}


def attempts(shapes: Shapes, known: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes to try for the free axes but the first ones, the likeliest first: near those known to work."""
    first = first_axes(shapes)
    rest = list(dict.fromkeys(s for shape in shapes.values() for s in shape if isinstance(s, str) and s not in first))
    spread = [APART * i for i in range(len(rest))]
    if known:
        for more in (APART, 0):
            yield {axis: known[axis] + more + i for axis, i in zip(rest, spread, strict=True)}
            yield {axis: known[axis] + more for axis in rest}
    images = any(len(shape) > 3 for shape in shapes.values())
    for size in TRIED_IMAGES if images else TRIED:
        if len(rest) > 1:
            yield {axis: size + i for axis, i in zip(rest, spread, strict=True)}
        yield dict.fromkeys(rest, size)


def random(shape: Sequence[int], dtype: torch.dtype, integers: str, seed: int) -> np.ndarray[Any, Any]:
    """Random data for an input; `integers` are "bits", "ones" or "zeros"."""
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    chance = np.random.default_rng(seed)
    if kind.kind == "f":
        return chance.normal(0, 1, shape).astype(kind)
    if integers == "bits" or kind.kind == "b":
        return chance.integers(0, 2, shape).astype(kind)
    return np.full(shape, integers == "ones").astype(kind)


def types(
    graph: Any, specs: Mapping[str, Any], dtypes: Mapping[str, torch.dtype], cases: Sequence[Mapping[str, Any]]
) -> dict[str, Type]:
    """The Type of every value: what ONNX Runtime infers (`specs`), corrected and named by what was seen in `cases`."""
    inputs = [v.name for v in graph.input if v.name in specs]
    names = Names({}, len(cases) > 1)
    found = {name: names.input(name, shape, cases) for name, shape in symbols(specs, inputs).items()}
    free = uncertain(graph)
    order = dict.fromkeys([*(n for node in graph.node for n in node.output if n in specs), *specs])
    for name in order:
        if name not in found:
            found[name] = names.value(name, list(specs[name].shape), cases, name in free)
    return {name: Type(tuple(shape), dtypes[name]) for name, shape in found.items()}


class Names:
    """The names given so far, by the sizes that were seen under them."""

    def __init__(self, known: dict[tuple[int, ...], str], told_apart: bool) -> None:
        self.known, self.told_apart = known, told_apart

    def input(self, name: str, shape: Sequence[int | str], cases: Sequence[Mapping[str, Any]]) -> list[int | str]:
        """The sizes of an input."""
        for axis, size in enumerate(shape):
            if isinstance(size, str) and cases:
                self.known.setdefault(tuple(case[name].shape[axis] for case in cases), size)
        return list(shape)

    def value(self, name: str, shape: list[Any], cases: Sequence[Mapping[str, Any]], free: bool) -> list[int | str]:
        """The sizes of any other value; one that is `free` shares no name."""
        seen = [case[name].shape for case in cases]
        if seen and len(seen[0]) != len(shape):
            shape = [None] * len(seen[0])
        return [
            size
            if isinstance(size, int) and size >= 0
            else self._size(size, f"{name}_{axis}", tuple(s[axis] for s in seen), free)
            for axis, size in enumerate(shape)
        ]

    def _size(self, inferred: Any, own: str, sizes: tuple[int, ...], free: bool) -> int | str:
        if inferred in self.known.values():
            return str(inferred)
        if free or not self.told_apart:
            return inferred or own
        if len(set(sizes)) == 1 and all(len(set(known)) > 1 for known in self.known):
            return sizes[0]
        return self.known.setdefault(sizes, own)


def uncertain(graph: Any) -> set[str]:
    """The values whose sizes may depend on what the inputs hold, and not on their sizes alone."""
    plain = {t.name for t in graph.initializer}  # what holds constants and sizes only
    free: set[str] = set()
    for node in graph.node:
        given = [name for name in node.input if name]
        standard = node.domain in ("", "ai.onnx")
        if standard and ((node.op_type in _SIZES and not free & set(given)) or (_pure(node) and plain >= set(given))):
            plain.update(node.output)
        sized = _SIZED_BY.get(node.op_type, ()) if standard else None
        told = sized is not None and all(n in plain for n in _at(node, sized))
        if not told or free & set(given):
            free.update(n for n in node.output if n)
    return free


def _at(node: Any, places: Iterable[int]) -> list[str]:
    return [node.input[i] for i in places if i < len(node.input) and node.input[i]]


def _pure(node: Any) -> bool:
    """Whether a node computes from its inputs alone."""
    return not node.op_type.startswith("Random") and not any(a.HasField("g") or a.graphs for a in node.attribute)
