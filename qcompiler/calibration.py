"""Calibration: where the data comes from, statistics as folds, and the sweep over the program, segment by segment.

A segment is one repeated block of the model (a decoder layer), found from the module paths in the graph. A sweep
holds one segment's activations at a time: the inputs of a segment are the outputs of the segments before it, as
they are by then, already quantized or not.
"""

import abc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.execution import execute
from qcompiler.program import Program
from qcompiler.spill import Spill

Sample = Mapping[str, Tensor]  # one batch of inputs, by name


class Statistic(abc.ABC):
    """Something to measure over calibration data, written as a fold; subclasses are frozen dataclasses."""

    heads: bool = False  # values [batch, heads, tokens, d] are rows [tokens, heads * d]
    axis: int = -1  # where the channels of a value are

    @abc.abstractmethod
    def start(self) -> Any:
        """The state before any data."""

    @abc.abstractmethod
    def step(self, state: Any, x: Tensor) -> Any:
        """The state after seeing rows `x` [tokens, channels]."""

    def done(self, state: Any) -> Any:
        """The result."""
        return state


# What to measure: for the name of a node, the statistic of its first argument (its activation); for `name:2`, of its
# argument 2.
Needs = Mapping[str, Statistic]


def first(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The first `count` sequences.

    >>> [sample["ids"].shape[0] for sample in first([{"ids": torch.zeros(3, 8)}] * 3, 4)]
    [3, 1]
    """
    found: list[Sample] = []
    for sample in samples:
        rows = max((value.shape[0] for value in sample.values() if value.dim()), default=1)
        kept = min(rows, count)
        if kept <= 0:
            break
        cut = {k: v[:kept] if v.dim() and v.shape[0] == rows else v for k, v in sample.items()}
        found.append(sample if kept == rows else cut)
        count -= rows
    return found


@dataclass
class Segment:
    """One step of a sweep: its nodes as they were when measured, and the statistics, by the names in `Needs`.

    `inputs[i]` are the values it finds for sample i, in a dict of its own.
    """

    index: int
    count: int
    nodes: list[fx.Node]
    statistics: dict[str, Any]
    inputs: Sequence[dict[fx.Node, Any]] | Spill


def mark_segments(program: Program) -> int:
    """Give every node `meta["segment"]`, from the module paths; returns how many segments there are.

    Segment 0 is what precedes the first repeated block; the last one is what follows the last block. A program
    without repeated blocks is one segment.
    """
    stacks = _stacks(program)
    calls = list(program.calls())
    blocks = [_block(node, stacks) for node in calls]
    last = max((i for i, block in enumerate(blocks) if block), default=-1)
    current, index = None, 0
    for i, (node, block) in enumerate(zip(calls, blocks, strict=True)):
        if block and block != current:
            current, index = block, index + 1
        elif i == last + 1 and last >= 0:
            index += 1
        node.meta["segment"] = index
    return index + 1


_NUMBERED = re.compile(r"^(.*?)\.(\d+)(?:[./]|$)")  # ONNX exporters write paths: /encoder/layer.0/attention/MatMul


def _stacks(program: Program) -> set[str]:
    """Prefixes of module lists with several entries: `model.layers` of `model.layers.0` and `model.layers.1`."""
    found: dict[str, set[str]] = {}
    for node in program.calls():
        if match := _NUMBERED.match(str(node.meta.get("path", ""))):
            found.setdefault(match[1], set()).add(match[2])
    return {prefix for prefix, numbers in found.items() if len(numbers) > 1}


def _block(node: fx.Node, stacks: set[str]) -> str | None:
    match = _NUMBERED.match(str(node.meta.get("path", "")))
    return f"{match[1]}.{match[2]}" if match and match[1] in stacks else None


def sweep(
    program: Program,
    samples: Sequence[Sample],
    needs: Callable[[Sequence[fx.Node]], Needs],
    progress: Callable[[str, int, int], None] | None = None,
    changes: bool = True,
) -> Iterator[Segment]:
    """Run `samples` through the program segment by segment, measuring what `needs(nodes)` asks of each segment.

    After a segment is yielded the caller may replace its nodes (new nodes inherit the segment); the segment then runs
    again as it is by then, and its outputs feed the next one. With `changes` False it runs once: the caller promises
    to change nothing before the sweep is over, and `Segment.inputs` is empty.
    """
    count = mark_segments(program)
    envs = Spill()
    for sample in samples:
        envs.append(program.bind(sample))
    for index in range(count):
        if progress:
            progress("calibrating", index, count)
        nodes = _nodes_of(program, index)
        last = index + 1 == count  # nobody reads what it makes: the logits of every sample
        statistics = _measure(nodes, needs(nodes), envs, samples, program, stay=changes or last)
        yield Segment(index, count, nodes, statistics, envs if changes else [])
        if changes and not last:
            _advance(_nodes_of(program, index), envs, program)
    if progress:
        progress("calibrating", count, count)


def _nodes_of(program: Program, index: int) -> list[fx.Node]:
    return [node for node in program.calls() if node.meta.get("segment") == index]


# Gradients are off here and not in `sweep`: a generator would switch them off for whoever iterates over it.
@torch.no_grad()
def _advance(nodes: Sequence[fx.Node], envs: Spill, program: Program) -> None:
    """Run one segment on every sample."""
    for i, env in enumerate(envs):
        execute(nodes, env, program.tensors)
        envs[i] = env


@torch.no_grad()
def _measure(
    nodes: Sequence[fx.Node],
    needs: Needs,
    envs: Spill,
    samples: Sequence[Sample],
    program: Program,
    stay: bool,
) -> dict[str, Any]:
    """Fold the statistics over one segment; two nodes that ask the same of the same value share one fold.

    If it shall `stay`, the values in `envs` stay those before the segment, and it runs only as far as it must.
    """
    if stay and not needs:
        return {}
    asked = {name: (source, needs[name]) for node in nodes for name, source in _arguments(node) if name in needs}
    states = {key: key[1].start() for key in asked.values()}
    watched = {value for value, _ in states}
    stop = max((i + 1 for i, node in enumerate(nodes) if node in watched), default=0) if stay else len(nodes)
    for i, (env, sample) in enumerate(zip(envs, samples, strict=True)):

        def watch(node: fx.Node, value: Any, sample: Sample = sample) -> None:
            for key in states:
                if key[0] is node:
                    states[key] = key[1].step(states[key], _rows(value, sample, key[1]))

        for node in list(env):  # values that earlier segments made
            watch(node, env[node])
        execute(nodes[:stop], env, program.tensors, watch)
        if not stay:
            envs[i] = env
    done = {key: key[1].done(state) for key, state in states.items()}
    return {name: done[key] for name, key in asked.items()}


def _arguments(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """The names by which statistics of a node's arguments are asked for."""
    if node.args:
        yield node.name, node.args[0]
    yield from ((f"{node.name}:{i}", argument) for i, argument in enumerate(node.args))


def _rows(value: Tensor, sample: Sample, statistic: Statistic) -> Tensor:
    """A value as rows of its channels, where the statistic has them."""
    if statistic.axis != -1:
        value = value.movedim(statistic.axis, -1)
    if statistic.heads:
        value = value.transpose(1, 2).flatten(2)
    return real_rows(value, sample)


def real_rows(value: Tensor, sample: Sample) -> Tensor:
    """A value [batch, tokens, channels] as rows [tokens, channels], without those of padding tokens."""
    real = sample.get("attention_mask")
    if real is not None and real.shape == value.shape[:-1] and not bool((real != 0).all()):
        return value[real != 0]
    return value.reshape(-1, value.shape[-1])


def measure(
    program: Program,
    samples: Sequence[Sample],
    needs: Needs,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """All statistics of `needs`, in one sweep; the result by node name."""
    found: dict[str, Any] = {}
    for segment in sweep(program, samples, lambda nodes: needs, progress, changes=False):
        found |= segment.statistics
    return found
