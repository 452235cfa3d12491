"""Symmetry sites for a reader: a table, JSON, and a drawing of which tensors each of them joins."""

from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any

from rich import markup
from rich.console import Group, RenderableType
from rich.table import Table

from qcompiler.program import Program
from qcompiler.sites import Kind, find_with_ends

ROW, LEFT, RIGHT, WIDTH = 16, 250, 520, 960
COLOURS = {"permute": "#3b6fd4", "scale": "#c77d0a", "rotate": "#2e8b57", "sign": "#8a5fb0"}


def sites_facts(program: Program) -> dict[str, Any]:
    """Every site of a canonical program and why the others end, ready for JSON."""
    facts: dict[str, Any] = {"sites": [], "ends": {}}
    for kind in Kind:
        sites, ends = find_with_ends(program, kind)
        facts["sites"] += [
            {
                "kind": kind.value,
                "blocks": site.blocks,
                "channels": site.channels,
                "tensors": [str(use) for use in site.uses],
            }
            for site in sites
        ]
        facts["ends"][kind.value] = dict(Counter(no.reason for no in ends))
    return facts


def sites_view(facts: Mapping[str, Any]) -> RenderableType:
    """The facts of `sites_facts` as tables."""
    table = Table(title="Sites", title_justify="left", header_style="bold")
    for name in ("transform", "channels", "absorbed by"):
        table.add_column(name)
    for site in facts["sites"]:
        size = f"{site['blocks']} x {site['channels']}" if site["blocks"] > 1 else str(site["channels"])
        shown = site["tensors"][:8]
        more = [f"and {len(site['tensors']) - 8} more"] if len(site["tensors"]) > 8 else []
        table.add_row(site["kind"], size, markup.escape("\n".join(shown + more)))
    ends = Table(title="Where others end", title_justify="left", header_style="bold")
    for name in ("transform", "times", "because"):
        ends.add_column(name)
    for kind, reasons in facts["ends"].items():
        for reason, times in reasons.items():
            ends.add_row(kind, str(times), markup.escape(reason))
    return Group(table, ends)


def draw(facts: Mapping[str, Any]) -> str:
    """An SVG: the sites on the left, the stored tensors on the right, a line for each that absorbs its transform."""
    tensors = list(dict.fromkeys(name for site in facts["sites"] for name in site["tensors"]))
    height = ROW * (max(len(tensors), len(facts["sites"])) + 3)
    spread = max(1.0, len(tensors) / max(len(facts["sites"]), 1))
    rows = {name: ROW * (i + 2) for i, name in enumerate(tensors)}
    parts = []
    for i, site in enumerate(facts["sites"]):
        y, colour = ROW * (2 + i * spread), COLOURS[site["kind"]]
        size = f"{site['blocks']} x {site['channels']}" if site["blocks"] > 1 else str(site["channels"])
        parts += [_curve(y, rows[name], colour) for name in site["tensors"]]
        parts.append(f'<circle cx="{LEFT}" cy="{y:.0f}" r="4" fill="{colour}"/>')
        parts.append(_text(LEFT - 10, y, f"{site['kind']} {size} channels", "end"))
    parts += [_text(RIGHT + 6, y, name, "start") for name, y in rows.items()]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
    return f'{head} font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'


def _curve(start: float, stop: float, colour: str) -> str:
    middle = (LEFT + RIGHT) / 2
    path = f"M{LEFT} {start:.0f} C{middle} {start:.0f} {middle} {stop} {RIGHT} {stop}"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y + 4:.0f}" text-anchor="{anchor}">{escape(text)}</text>'
