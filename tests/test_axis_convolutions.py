"""The axis rules of convolutional networks, one by one: which sites there are, and that all of them are exact."""

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor

from qcompiler.sites import Kind, find, find_with_ends
from qcompiler.testing import check_sites
from tests.test_canonicalize import canonical, random

A, B = random(8, 6, 3, 3, seed=1), random(4, 8, 3, 3, seed=2)
BIAS = random(8, seed=3)
BOTH = "a rows, bias, b columns"
ALL = [f"{kind} 8 channels: {BOTH}" for kind in ("permute", "scale", "rotate", "sign")]


def between(act: Callable[[Tensor], Tensor], b: Tensor = B) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """Two convolutions with a function between them."""
    return lambda a, bias, b, x: F.conv2d(act(F.conv2d(x, a, bias)), b), {"a": A, "bias": BIAS, "b": b}


def read_by_linear(act: Callable[[Tensor], Tensor], columns: int) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """A convolution, and a linear layer that reads it all."""
    weights = {"a": A, "bias": BIAS, "b": random(3, columns, seed=4)}
    return lambda a, bias, b, x: F.linear(act(F.conv2d(x, a, bias)).flatten(1), b), weights


def depthwise(filters: int) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """A convolution for each channel between two others."""

    def function(a: Tensor, bias: Tensor, own: Tensor, offset: Tensor, b: Tensor, x: Tensor) -> Tensor:
        h = F.relu(F.conv2d(x, a, bias))
        return F.conv2d(F.relu(F.conv2d(h, own, offset, padding=1, groups=8)), b)

    own, offset = random(filters, 1, 3, 3, seed=5), random(filters, seed=6)
    return function, {"a": A, "bias": BIAS, "own": own, "offset": offset, "b": random(4, filters, 3, 3, seed=7)}


def around(a: Tensor, bias: Tensor, own: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """A depthwise convolution whose input is added to its output."""
    h = F.conv2d(x, a, bias)
    return F.conv2d(h + F.conv2d(h, own, padding=1, groups=8), b)


def grouped(a: Tensor, bias: Tensor, own: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(F.conv2d(x, a, bias), own, groups=4), b)


def unfolded(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """A linear layer makes 6 channels at 9 positions each."""
    return F.conv2d(F.linear(x.flatten(1), a).view(-1, 6, 3, 3), b)


def in_time(a: Tensor, bias: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return F.conv1d(F.conv1d(x.flatten(2), a, bias, padding="same"), b, stride=2)


RULES: dict[str, tuple[tuple[Callable[..., Tensor], dict[str, Tensor]], list[str]]] = {
    "two convolutions admit anything": (between(lambda h: h), ALL),
    "relu lets factors through": (between(F.relu), ALL[:2]),
    "relu6 does not": (between(F.relu6), ALL[:1]),
    "nor does a clip": (between(lambda h: F.hardtanh(h, -2.0, 2.0)), ALL[:1]),
    "means over positions are linear": (between(lambda h: F.avg_pool2d(h, 2, 1), B[..., :2, :2]), ALL),
    "maxima over positions are homogeneous": (between(lambda h: F.max_pool2d(h, 2, 1), B[..., :2, :2]), ALL[:2]),
    "global means": (read_by_linear(lambda h: F.adaptive_avg_pool2d(h, 1), 8), ALL),
    "global maxima": (read_by_linear(lambda h: h.amax((2, 3)), 8), ALL[:2]),
    "a channel's positions stay together": (read_by_linear(lambda h: h, 8 * 9), ALL),
    "positions made by a linear layer": (
        (unfolded, {"a": random(54, 150), "b": random(4, 6, 3, 3, seed=1)}),
        [f"{kind} 6 channels: a rows, b columns" for kind in ("permute", "scale", "rotate", "sign")],
    ),
    "one axis of positions": (
        (in_time, {"a": random(8, 6, 3), "bias": BIAS, "b": random(4, 8, 1, seed=1)}),
        ALL,
    ),
    "a depthwise convolution takes a factor up and starts another": (
        depthwise(8),
        [
            "permute 8 channels: a rows, bias, own rows, offset, b columns",
            "scale 8 channels: a rows, bias, own filters",
            "scale 8 channels: own rows, offset, b columns",
        ],
    ),
    "two filters a channel": (
        depthwise(16),
        [
            "permute 8 channels: a rows, bias, own rows, offset, b columns",
            "scale 8 channels: a rows, bias, own filters",
            "scale 16 channels: own rows, offset, b columns",
        ],
    ),
    "a depthwise residual branch keeps its factor": (
        (around, {"a": A, "bias": BIAS, "own": random(8, 1, 3, 3, seed=5), "b": B}),
        [
            "permute 8 channels: a rows, bias, own rows, b columns",
            "scale 8 channels: a rows, bias, own rows, own filters, b columns",
            "sign 8 channels: a rows, bias, own rows, own filters, b columns",
        ],
    ),
    "groups that share columns": (
        (grouped, {"a": A, "bias": BIAS, "own": random(12, 2, 1, 1), "b": random(4, 12, 3, 3)}),
        [],
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    (function, parameters), expected = RULES[rule]
    program, _ = canonical(function, {"x": random(2, 6, 5, 5)}, {"x": {0: "batch"}}, **parameters)
    assert [str(site) for kind in Kind for site in find(program, kind)] == expected
    for kind in Kind:
        assert check_sites(program, kind)[1] <= 1e-12


@pytest.mark.parametrize(
    ("rule", "kind", "reason"),
    [
        ("relu6 does not", Kind.SCALE, "aten.relu6 acts on each channel alone and is not homogeneous"),
        ("nor does a clip", Kind.SCALE, "aten.hardtanh acts on each channel alone and is not homogeneous"),
        ("groups that share columns", Kind.SCALE, "4 groups of channels share the weight's columns"),
        (
            "a depthwise residual branch keeps its factor",
            Kind.ROTATE,
            "each channel has a filter of its own",
        ),
        ("maxima over positions are homogeneous", Kind.ROTATE, "aten.max_pool2d acts on each channel alone"),
    ],
)
def test_reasons(rule: str, kind: Kind, reason: str) -> None:
    (function, parameters), _ = RULES[rule]
    program, _ = canonical(function, {"x": random(2, 6, 5, 5)}, {"x": {0: "batch"}}, **parameters)
    assert reason in [no.reason for no in find_with_ends(program, kind)[1]]


@pytest.mark.parametrize("layer", [F.linear, F.conv1d])
def test_one_channel_of_an_input_takes_no_factor(layer: Callable[..., Tensor]) -> None:
    """A value of one element has no labels, and its reader's column is no free channel for that."""
    shape = (1,) if layer is F.conv1d else ()
    weights = {"a": random(8, 1, *shape), "b": random(4, 8, *shape, seed=1)}
    program, _ = canonical(
        lambda a, b, x: layer(layer(x, a), b), {"x": random(2, 1, *shape)}, {"x": {0: "batch"}}, **weights
    )
    assert [str(site) for site in find(program, Kind.SCALE)] == ["scale 8 channels: a rows, b columns"]
    assert check_sites(program, Kind.SCALE)[1] <= 1e-12
