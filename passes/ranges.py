"""Ranges of static grids: which part of what was seen the codes shall cover."""

import torch
from torch import Tensor

from qcompiler.calibration import Statistic
from qcompiler.errors import RecipeError
from qcompiler.passes.statistics import MinMax, Sampled
from qcompiler.rounding import fake_quantize, grid_of, group_size, grouped
from qcompiler.scheme import Scheme

RANGES = ("minmax", "average", "percentile", "error")
SHRINKS = 24  # how many ranges "error" tries, from the whole down to a quarter


def statistic_of(ranges: str, heads: bool = False) -> Statistic:
    """What to measure for a kind of range; RecipeError for a name that is none."""
    if ranges not in RANGES:
        raise RecipeError(f'ranges "{ranges}" is none of {", ".join(RANGES)}')
    if ranges in ("minmax", "average"):
        return MinMax(momentum=0.99 if ranges == "average" else 0.0, heads=heads)
    return Sampled(heads=heads)


def static_grid(
    seen: Tensor,
    scheme: Scheme,
    ranges: str,
    *,
    heads: int = 0,
    importance: Tensor | None = None,
    percentile: float = 0.999,
) -> list[Tensor]:
    """Scale (float32) and, unless symmetric, zero point (uint8) of a static scheme, from what `statistic_of` measured.

    `seen` is [2, channels] or [rows, channels]. The grid is [groups], or [heads, 1, groups] where the channels are
    those of so many heads. The whole code range is used. `importance` [channels] weighs the squared errors that
    "error" makes small: of a channel that is read by large weights more.
    """
    rows = seen.unflatten(-1, (heads, 1, -1)) if heads else seen
    size = group_size(scheme, rows.shape[-1])
    if ranges == "percentile":
        edges = torch.tensor([1 - percentile, percentile])
        flat = grouped(rows, size).movedim(-1, 1).flatten(0, 1)  # [rows * group, ..., groups]
        low, high = torch.quantile(flat[:: max(1, flat.numel() // 2**24)], edges, dim=0)
    else:
        groups = grouped(rows, size)
        low, high = groups.amin((0, -1)), groups.amax((0, -1))
    if ranges == "error":
        weights = torch.ones(seen.shape[-1]) if importance is None else importance
        spread = weights.unflatten(-1, (heads, 1, -1)) if heads else weights
        low, high = _least_error(rows, low, high, scheme, grouped(spread, size))
    return [part for part in grid_of(low, high, scheme) if part is not None]


def _least_error(rows: Tensor, low: Tensor, high: Tensor, scheme: Scheme, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Per group, the shrunken range with the least weighted squared error."""
    best, best_low, best_high = torch.full_like(low, torch.inf), low, high
    for step in range(SHRINKS):
        shrink = 1 - 0.75 * step / SHRINKS
        grid = [part for part in grid_of(low * shrink, high * shrink, scheme) if part is not None]
        size = weights.shape[-1]
        error = grouped(fake_quantize(rows, grid, scheme=str(scheme)) - rows, size).pow_(2).mul_(weights).sum((0, -1))
        better = error < best
        best = torch.where(better, error, best)
        best_low, best_high = torch.where(better, low * shrink, best_low), torch.where(better, high * shrink, best_high)
    return best_low, best_high
