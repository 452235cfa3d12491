"""Charts: the few drawings of the HTML report, as inline SVG without any script.

Colours are the CSS classes c0 to c7 (and "rest"), which the page defines for light and dark.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT = 960, 62, 14
COLOURS = 8


@dataclass(frozen=True)
class Dot:
    """One point of `scatter`; `label` is shown when the pointer rests on it."""

    x: float
    y: float
    label: str


def colour(index: int) -> str:
    """The CSS class of the n-th series; those past the palette share one."""
    return f"c{index}" if index < COLOURS else "rest"


def legend(kinds: Sequence[str], shown: Container[str]) -> str:
    """The names of those kinds that are shown, each with the colour that its place among all kinds gives it."""
    items = (
        f'<span class="key"><i class="{colour(i)}"></i>{escape(kind)}</span>'
        for i, kind in enumerate(kinds)
        if kind in shown
    )
    return f'<p class="legend">{"".join(items)}</p>'


def scatter(series: Mapping[str, Sequence[Dot]], kinds: Sequence[str], x_title: str, y_title: str) -> str:
    """Dots joined by a line for each kind; the y axis starts at 0. Values that are not finite are left out."""
    drawn = [[dot for dot in series.get(kind, ()) if math.isfinite(dot.y)] for kind in kinds]
    everything = [dot for dots in drawn for dot in dots]
    if not everything:
        return '<p class="quiet">Nothing was measured.</p>'
    lowest, highest = min(d.x for d in everything), max(d.x for d in everything)
    height = 280
    top, bottom = 12, height - 40
    steps = ticks(max(d.y for d in everything))

    def x(value: float) -> float:
        return LEFT + 10 + (value - lowest) / max(highest - lowest, 1) * (WIDTH - LEFT - RIGHT - 20)

    def y(value: float) -> float:
        return bottom - value / steps[-1] * (bottom - top)

    parts = [_y_axis(steps, [y(step) for step in steps])]
    whole = [step for step in ticks(highest) if step == int(step) and lowest <= step <= highest]
    parts += [_text(x(step), bottom + 16, f"{step:g}", "middle") for step in whole]
    parts.append(_text((LEFT + WIDTH) / 2, height - 6, x_title, "middle"))
    for i, dots in enumerate(drawn):
        if not dots:
            continue
        line = " ".join(f"{x(d.x):.1f},{y(d.y):.1f}" for d in dots)
        parts.append(f'<polyline class="line {colour(i)}" points="{line}"/>')
        parts += [
            f'<circle class="{colour(i)}" cx="{x(d.x):.1f}" cy="{y(d.y):.1f}" r="3.5">'
            f"<title>{escape(d.label)}</title></circle>"
            for d in dots
        ]
    return _svg(height, y_title, parts)


def stacks(rows: Mapping[str, Mapping[str, float]], unit: str, kinds: Sequence[str]) -> str:
    """One horizontal bar for each row, made of a piece for each kind, all on one scale from 0."""
    widest = max((sum(pieces.values()) for pieces in rows.values()), default=0.0)
    if not widest:
        return '<p class="quiet">Nothing is stored.</p>'
    left, room = 110, WIDTH - 110 - 110
    parts = []
    for row, (name, pieces) in enumerate(rows.items()):
        x, y = float(left), 8 + row * 44
        parts.append(_text(left - 10, y + 20, name, "end"))
        for i, kind in enumerate(kinds):
            width = pieces.get(kind, 0.0) / widest * room
            label = f"{kind}: {pieces.get(kind, 0.0):,.2f} {unit}"
            parts.append(_box(x, y, width, 30, colour(i), label))
            x += width
        parts.append(_text(x + 8, y + 20, f"{sum(pieces.values()):,.1f} {unit}", "start"))
    return _svg(12 + 44 * len(rows), "size", parts)


def durations(seconds: Mapping[str, float]) -> str:
    """One thin bar for each duration, in order."""
    longest = max(seconds.values(), default=0.0)
    left, room = 220, WIDTH - 220 - 110
    parts = []
    for row, (name, value) in enumerate(seconds.items()):
        y = 6 + row * 24
        parts.append(_text(left - 10, y + 13, name, "end"))
        width = value / longest * room if longest else 0.0
        parts.append(_box(left, y, width, 16, "c0", f"{name}: {value:.2f} s"))
        parts.append(_text(left + width + 8, y + 13, f"{value:.1f} s", "start"))
    return _svg(10 + 24 * len(seconds), "seconds", parts) if parts else ""


def inline_bar(share: float, kind: str = "c0", behind: float = 0.0) -> str:
    """A small bar for a table cell: `share` of its width (0 to 1), before a pale one of `behind`."""
    width = 140
    parts = [_box(0, 2, _clamped(behind) * width, 10, "pale"), _box(0, 2, _clamped(share) * width, 10, kind)]
    return f'<svg class="cell" viewBox="0 0 {width} 14" aria-hidden="true">{"".join(parts)}</svg>'


def ticks(highest: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to at least `highest`, about `count` steps apart.

    >>> ticks(0.23)
    [0.0, 0.05, 0.1, 0.15, 0.2, 0.25]
    """
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= highest * (1 - 1e-9))
    return [round(step * i, 12) for i in range(math.ceil(highest / step * (1 - 1e-9)) + 1)]


def _y_axis(steps: Sequence[float], heights: Sequence[float]) -> str:
    lines = (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        + _text(LEFT - 8, y + 4, f"{step:g}", "end")
        for step, y in zip(steps, heights, strict=True)
    )
    return "".join(lines)


def _clamped(share: float) -> float:
    return min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0


def _box(x: float, y: float, width: float, height: float, kind: str, label: str = "") -> str:
    title = f"<title>{escape(label)}</title>" if label else ""
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="2"'
    return f'<rect class="{kind}" {shape}>{title}</rect>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, name: str, parts: Sequence[str]) -> str:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}">'
    return head + "".join(parts) + "</svg>"
