"""Measuring which configurations of linear_wq are fastest, for the layers of one program on the GPU at hand."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from qcompiler.backends.triton.lowering import kernel_for
from qcompiler.kernels import linear_wq, tuned
from qcompiler.kernels.packed_weight import PackedWeight
from qcompiler.kernels.split import Config
from qcompiler.kernels.timing import Launch, copies_of, seconds
from qcompiler.ops import qc
from qcompiler.program import Program

TOKENS = (8, 16, 32, 64, 128)
Timer = Callable[[list[Launch]], float]


def tune(
    program: Program,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[str, int, int], None],
    timer: Timer = seconds,
) -> Path:
    """Measure every kind of layer of a program, and keep what was found for this GPU; returns the file."""
    kinds = {(str(q.scheme), q.shape): q for q in _weights(program)}
    entries: dict[str, dict[str, Any]] = {}
    for done, (scheme, shape) in enumerate(kinds):
        progress("tune", done, len(kinds))
        packed = PackedWeight.pack(kinds[scheme, shape], dtype).to(device)
        words = [packed.words.clone() for _ in range(copies_of(packed.nbytes))]
        stock = [replace(packed, words=w, arrived=packed.arrived.clone()) for w in words]
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[1], device=device, dtype=dtype)
            entries[tuned.key_of(scheme, shape, tokens)] = fastest(stock, x, timer)
    progress("tune", len(kinds), len(kinds))
    return tuned.save(gpu_name(device), entries)


def fastest(stock: list[PackedWeight], x: Tensor, timer: Timer) -> dict[str, Any]:
    """The fastest configuration for x, its microseconds, and those of the rule's."""
    rule = linear_wq.configure(*stock[0].shape, stock[0].columns, stock[0].scheme.bits, x.shape[0])
    taken: dict[Config, float] = {}
    for config in (rule, *candidates(rule)):
        try:
            taken[config] = timer([partial(linear_wq.linear_wq, x, weight, config=config) for weight in stock])
        except triton.runtime.errors.OutOfResources:  # more shared memory than there is
            continue
    best = min(taken, key=lambda config: taken[config])
    return {
        "config": best,
        "microseconds": round(taken[best] * 1e6, 2),
        "microseconds_by_rule": round(taken[rule] * 1e6, 2) if rule in taken else None,
    }


def candidates(rule: Config) -> Iterator[Config]:
    """Other parts of k, stages and warps for the same block of tokens."""
    for split, stages, warps in itertools.product((1, 2, 3, 4, 6, 8), (2, 3, 4, 5), (4, 8)):
        if (config := Config(rule.tokens, split, warps, stages)) != rule:
            yield config


def gpu_name(device: torch.device) -> str:
    """What the driver calls the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def _weights(program: Program) -> Iterator[Any]:
    """The weights that linear_wq takes."""
    for node in program.calls(qc.linear):
        weight = program.qtensor(str(node.args[1][0].target).partition("::")[0])  # type: ignore[index,union-attr]
        if kernel_for(node, weight) == linear_wq.KERNEL:
            yield weight
