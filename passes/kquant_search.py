"""Scales that lose least: the search behind kquant, from its objective alone.

For a group of values x with weights w, codes q and a scale s are sought that make the sum of w (x - s q)^2 small; with
a minimum, of w (x - s q - m)^2. Given the codes the best scale (and minimum) is a weighted least-squares fit in closed
form; given the scale the best codes are the nearest ones. So: scales around largest magnitude / number of levels are
tried, each scored by the fit of the codes that it gives, and the best is then improved by turns. The same search
quantizes the scales themselves: the loss of a group as a function of its scale is a parabola, so its scales are values
and the parabolas' curvatures their weights.

All tensors are float32 [..., values of a group]; groups are independent, and everything is done for all at once.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-30


@dataclass(frozen=True)
class Levels:
    """What codes stand for: whole numbers from `low` to `high`, or the entries, whole too, of an ascending `book`."""

    low: float
    high: float
    book: tuple[float, ...] | None = None

    def nearest(self, values: Tensor) -> Tensor:
        """The level nearest to each value; `values` may be overwritten."""
        if self.book is None:
            return values.round_().clamp_(self.low, self.high)
        return _nearest(self.book)[1][_cells(values)]

    def places(self, values: Tensor) -> Tensor:
        """The number of the nearest level of each value, counted from the lowest, uint8."""
        if self.book is None:
            return (values.round().clamp_(self.low, self.high) - self.low).to(torch.uint8)
        return _nearest(self.book)[0][_cells(values)]

    def reaches(self, count: int) -> list[float]:
        """How many steps the largest magnitude of a group is tried to be: its code, or more, so that it is clipped.

        Negative ones put it at the other end of the levels, which are not symmetric.
        """
        found: list[float] = []
        ends = [end for end in (self.low, self.high) if end]
        for end in ends:
            unit = abs(end) / 127 * 8 if self.book else 1  # two thirds of a level, or so
            beyond = end * (1 + 0.6 * (unit / abs(end)) ** 0.5)
            within = end - unit * (0.75 if end > 0 else -0.75)
            found += [end, *torch.linspace(within, beyond, count // len(ends) - 1).tolist()]
        return found


def _cells(values: Tensor) -> Tensor:
    """Which half-integer below each value, counted from -256: where `_nearest` has its entry; int32."""
    return (values * 2).floor_().clamp_(-256, 255).add_(256).int()


@functools.cache
def _nearest(book: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """For values from each half-integer to the next the nearest entry's number, uint8, and the entry.

    Between whole numbers every boundary is a half-integer, so a look-up is exact, and faster than a search.
    """
    entries = torch.tensor(book)
    centres = (torch.arange(-256, 256) + 0.5) / 2
    places = torch.bucketize(centres, (entries[1:] + entries[:-1]) / 2)
    return places.to(torch.uint8), entries[places]


class Line(NamedTuple):
    """value = scale * code + minimum, each [...], for the groups of x [..., n]."""

    scale: Tensor
    minimum: Tensor


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is 0."""
    return torch.where(scale == 0, 0, 1 / scale)


def fit_scale(x: Tensor, w: Tensor, levels: Levels, tries: int = 24, turns: int = 2) -> Tensor:
    """The scale of each group, [...], for which its nearest levels lose least of x under the weights w."""
    wx = w * x
    place = x.abs().argmax(-1, keepdim=True)
    largest = inverse(x.gather(-1, place))
    best = torch.zeros(x.shape[:-1])
    score = torch.zeros_like(best)

    def consider(steps: Tensor) -> None:
        """Codes for x / scale, the best scale for them, and how much of x that explains."""
        q = levels.nearest(steps)
        along = (wx * q).sum(-1)
        length = (q.square_().mul_(w)).sum(-1)
        scale = along / length.clamp(min=TINY)
        explained = along * scale
        better = explained > score
        torch.where(better, explained, score, out=score)
        torch.where(better, scale, best, out=best)

    for reach in levels.reaches(tries):
        consider(x * (largest * reach))
    for _ in range(turns):
        consider(x * inverse(best)[..., None])
    return best


def fit_line(x: Tensor, w: Tensor, top: int, *, below: bool, tries: int = 5, turns: int = 3) -> Line:
    """The line of each group for which codes 0 to `top` lose least; with `below` its minimum is not above zero."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if below:
        low = low.clamp(max=0)
    whole, first, best, loss = w.sum(-1), (w * x).sum(-1), None, None
    wx = w * x

    def consider(line: Line, best: Line | None, loss: Tensor | None) -> tuple[Line, Tensor]:
        q = line_codes(x, line, top)
        wq = w * q
        sums = whole, first, wq.sum(-1), (wq * q).sum(-1), (wx * q).sum(-1)
        fitted, gain = _regression(*sums, below)
        if best is None or loss is None:
            return fitted, -gain
        better = -gain < loss
        kept = Line(*(torch.where(better, new, old) for new, old in zip(fitted, best, strict=True)))
        return kept, torch.where(better, -gain, loss)

    spread = high - low
    cut = 0.5 / top**0.7
    for i in range(tries):
        for j in range(tries):
            start = low + spread * (cut * i / (tries - 1) - 0.02)
            scale = (high - spread * (cut * j / (tries - 1) - 0.02) - start) / top
            start = start.clamp(max=0 if below else torch.inf)
            best, loss = consider(Line(scale[..., 0], start[..., 0]), best, loss)
    for _ in range(turns):
        assert best is not None
        best, loss = consider(best, best, loss)
    assert best is not None
    return best


def line_codes(x: Tensor, line: Line, top: int) -> Tensor:
    """The nearest codes 0 to `top`, as floats."""
    return ((x - line.minimum[..., None]) * inverse(line.scale)[..., None]).round_().clamp_(0, top)


def _regression(whole: Tensor, sx: Tensor, sq: Tensor, sqq: Tensor, sqx: Tensor, below: bool) -> tuple[Line, Tensor]:
    """The weighted regression of x on codes, from the weighted sums of 1, x, q, q^2, q x; and what it explains."""
    spread = whole * sqq - sq.square()
    flat = spread <= 1e-7 * whole * sqq  # all codes alike: a scale would be arbitrary
    scale = torch.where(flat, 0, (whole * sqx - sq * sx) / spread.clamp(min=TINY))
    minimum = (sx - scale * sq) / whole.clamp(min=TINY)
    if below:
        through = sqx / sqq.clamp(min=TINY)
        above = minimum > 0
        scale, minimum = torch.where(above, through, scale), torch.where(above, 0, minimum)
    gain = 2 * (scale * sqx + minimum * sx) - (
        scale.square() * sqq + 2 * scale * minimum * sq + minimum.square() * whole
    )
    return Line(scale, minimum), gain
