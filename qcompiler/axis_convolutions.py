"""Axis rules of convolutional networks: channels lie before the positions, [..., channels, height, width]."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.axes import Axes, Kind, Stored, labels_of
from qcompiler.rewrite import arguments
from qcompiler.text import target_name

aten = torch.ops.aten


def convolution(axes: Axes, node: fx.Node) -> Any:
    """As a linear layer at each position: its weight [filters, channels, ...] absorbs anything on both sides."""
    given = arguments(node)
    x, weight, bias = labels_of(axes, given["input"]), axes.env.get(given["weight"]), given["bias"]
    if not isinstance(weight, Stored):
        return axes.unknown(node, "a computed weight multiplies it")
    if given.get("transposed") or (bias is not None and not isinstance(axes.env.get(bias), Stored)):
        return axes.unknown(node, "it is transposed, or its bias is computed")
    if given["groups"] > 1:
        return _depthwise(axes, node, x, weight.name, given["groups"])
    columns = axes.stored(weight.name, 1, power=-1)
    axes.read(x, _at_positions(axes, weight.name, columns))
    axes.block(columns[None])
    return _rows(axes, node, weight.name)


def _depthwise(axes: Axes, node: fx.Node, x: Tensor, weight: str, channels: int) -> Any:
    """A filter or more for each channel, which take its place; its factor ends in them, and theirs begin."""
    filters, columns = axes.program.tensors[weight].shape[:2]
    if columns > 1:
        return axes.unknown(node, f"{channels} groups of channels share the weight's columns")
    if axes.kind is Kind.ROTATE:
        return axes.unknown(node, "each channel has a filter of its own")
    made = _rows(axes, node, weight)
    spread = x.repeat_interleave(filters // channels, dim=-axes.program.tensors[weight].dim() + 1)
    if axes.kind.is_factor:
        axes.read(spread, _at_positions(axes, weight, axes.stored(weight, 0, power=-1, apart=True)))
    else:
        axes.read(spread, made)
    return made


def _rows(axes: Axes, node: fx.Node, weight: str) -> Any:
    """What a convolution makes: a channel for each filter, the same at every position."""
    rows, bias = axes.stored(weight, 0), axes.env.get(arguments(node)["bias"])
    if isinstance(bias, Stored):
        axes.tie(rows, axes.stored(bias.name, None).flatten())
    return _at_positions(axes, weight, rows).expand(axes.type_of(node))


def _at_positions(axes: Axes, weight: str, labels: Tensor) -> Tensor:
    """Labels [channels] as [channels, 1, ...]."""
    return labels.view(-1, *[1] * (axes.program.tensors[weight].dim() - 2))


def pooled(axes: Axes, node: fx.Node) -> Any:
    """Means and maxima over positions: a mean is linear, a maximum homogeneous; a channel's positions are alike."""
    if axes.kind in (Kind.ROTATE, Kind.SIGN) and "max" in target_name(node.target):
        what = "acts on each channel alone" if axes.kind is Kind.ROTATE else "is not odd"
        return axes.unknown(node, f"{target_name(node.target)} {what}")
    x = corner = labels_of(axes, node.args[0])
    for dim in range(-int(target_name(node.target)[-2]), 0):  # as many as its name says: max_pool2d
        corner = corner.narrow(dim, 0, 1)
    axes.tie(x, corner)
    return corner.expand(axes.type_of(node))


CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)
POOLS = (
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)

RULES: dict[Any, Callable[[Axes, fx.Node], Any]] = {
    **dict.fromkeys(CONVOLUTIONS, convolution),
    **dict.fromkeys(POOLS, pooled),
}
