"""The report as one HTML page that needs nothing else: no script, no network, light and dark."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from qcompiler import charts
from qcompiler.report import LayerRecord, PassRecord, Report

_BLOCK = re.compile(r"\.(\d+)\.")


def page(report: Report) -> str:
    """The whole page; every text of the report is escaped."""
    title = f"{report.model or 'model'}: {report.recipe or 'report'}"
    kinds = _kinds(report.layers)
    sections = (
        _tiles(report),
        _section("Error by depth", _errors(report.layers, kinds)),
        _section("Where the bytes are", _sizes(report.layers, kinds)),
        _section("Passes", _passes(report.passes)),
        _section("Time", _times(report)),
        _section("Refusals", _refusals(report.all_refusals)),
        _section("Layers", _layers(report.layers)),
        _section("Circumstances", _circumstances(report)),
    )
    return _PAGE.format(title=escape(title), head=_head(report), style=_STYLE, body="\n".join(sections))


def relative_error(layer: LayerRecord) -> float:
    """The layer's relative output error, or where no data was there that of its weight (from the SQNR)."""
    if layer.output_error is not None:
        return layer.output_error
    return float(10 ** (-layer.sqnr_db / 20))


def kind_and_depth(name: str) -> tuple[str, int | None]:
    """What a tensor's name says of its role and of its block.

    >>> kind_and_depth("model.layers.3.self_attn.q_proj.weight")
    ('q_proj', 3)
    >>> kind_and_depth("lm_head.weight")
    ('lm_head', None)
    """
    words = name.removesuffix(".weight")
    block = _BLOCK.search(name)
    return words.rpartition(".")[2], int(block[1]) if block else None


def _head(report: Report) -> str:
    facts = [f"backend {report.backend}" if report.backend else "", f"seed {report.seed}"]
    facts += [f"calibration: {report.calibration}" if report.calibration else ""]
    line = " · ".join(escape(fact) for fact in facts if fact)
    return f"<h1>{escape(report.model)}</h1><p><code>{escape(report.recipe)}</code></p><p>{line}</p>"


def _tiles(report: Report) -> str:
    before, after = report.sizes_mb.get("float", 0.0), report.sizes_mb.get("compiled", 0.0)
    found = []
    if before and after:
        found.append(
            (f"{after:,.0f} MB", f"of {before:,.0f} MB in the model as it came ({before / after:.1f}× smaller)")
        )
    if "linears" in report.coverage:
        covered = f"{report.coverage.get('quantized')} of {report.coverage['linears']}"
        share = float(report.coverage.get("bytes_share", 0.0))
        found.append((covered, f"linear layers quantized, {share:.1%} of the bytes"))
    if lossy := [p for p in report.passes if p.kl is not None and p.contract == "lossy"]:
        found.append((f"{sum(p.kl or 0.0 for p in lossy):.4f}", "nats of KL on the check samples, lossy passes summed"))
    found.append((f"{sum(report.stages.values()):,.0f} s", "in all"))
    if report.passes:
        found.append((f"{max(p.peak_rss_mb for p in report.passes):,.0f} MB", "peak memory in any pass"))
    found.append((str(len(report.all_refusals)), "refusals"))
    tiles = (f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in found)
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _kinds(layers: Sequence[LayerRecord]) -> list[str]:
    """The kinds of layers, those with the most bytes first; a kind has the same colour in every chart."""
    size: Counter[str] = Counter()
    for layer in layers:
        size[kind_and_depth(layer.name)[0]] += layer.bytes_before
    return [kind for kind, _ in size.most_common()]


def _errors(layers: Sequence[LayerRecord], kinds: Sequence[str]) -> str:
    """A line of dots for each kind of layer, over the blocks; what stands in no block is in the table alone."""
    placed = [(layer, *kind_and_depth(layer.name)) for layer in layers]
    blocks = any(depth is not None for _, _, depth in placed)
    series: dict[str, list[charts.Dot]] = {}
    for i, (layer, kind, depth) in enumerate(placed):
        if blocks and depth is None:
            continue
        error = relative_error(layer)
        label = f"{layer.name} ({layer.scheme}): {_percent(error)}, {_number(layer.sqnr_db)} dB"
        series.setdefault(kind, []).append(charts.Dot(i if depth is None else depth, error, label))
    for dots in series.values():
        dots.sort(key=lambda dot: dot.x)
    note = (
        "Each dot is a layer: ‖WX − QX‖ ∕ ‖WX‖ on the calibration data, or the weight's own relative error "
        "where no data was used. Rest the pointer on a dot for its name."
    )
    chart = charts.scatter(series, kinds, "block" if blocks else "layer", "relative error")
    return f'<p class="quiet">{note}</p>{charts.legend(kinds, series)}{chart}'


def _sizes(layers: Sequence[LayerRecord], kinds: Sequence[str]) -> str:
    """All quantized tensors before and after, by kind."""
    rows: dict[str, Counter[str]] = {"before": Counter(), "after": Counter()}
    for layer in layers:
        kind, _ = kind_and_depth(layer.name)
        rows["before"][kind] += layer.bytes_before
        rows["after"][kind] += layer.bytes_after
    megabytes = {name: {kind: size / 1e6 for kind, size in sizes.items()} for name, sizes in rows.items()}
    return charts.legend(kinds, kinds) + charts.stacks(megabytes, "MB", kinds)


def _passes(passes: Sequence[PassRecord]) -> str:
    head = ("pass", "contract", "seconds", "peak MB", "nodes", "MB", "output change", "KL", "notes")
    rows = (
        (
            f"<code>{escape(p.text or p.name)}</code>",
            f'<span class="tag {escape(p.contract)}">{escape(p.contract)}</span>',
            f"{p.seconds:,.1f}",
            f"{p.peak_rss_mb:,.0f}",
            f"{p.nodes[0]} → {p.nodes[1]}",
            f"{p.megabytes[0]:,.1f} → {p.megabytes[1]:,.1f}",
            "unchanged" if not p.changed else _number(p.output_change, ".1e"),
            _number(p.kl, ".4f"),
            "<br>".join(map(escape, p.notes)),
        )
        for p in passes
    )
    return _table(head, rows)


def _times(report: Report) -> str:
    seconds = {**report.stages, **{f"pass {p.text or p.name}"[:34]: p.seconds for p in report.passes}}
    return charts.durations(seconds)


def _refusals(refusals: Sequence[str]) -> str:
    if not refusals:
        return '<p class="quiet">None: everything that was asked was done.</p>'
    counted = Counter(refusals)
    items = (f"<li>{escape(text)}{f' (×{n})' if n > 1 else ''}</li>" for text, n in counted.items())
    return f"<ul>{''.join(items)}</ul>"


def _layers(layers: Sequence[LayerRecord]) -> str:
    if not layers:
        return '<p class="quiet">No tensor was quantized.</p>'
    worst = max((relative_error(x) for x in layers if math.isfinite(relative_error(x))), default=0.0) or 1.0
    largest = max(layer.bytes_before for layer in layers) or 1

    def width(size: float) -> float:
        # Square roots: an embedding is a hundred times a projection, and both must be seen.
        return math.sqrt(size / largest)

    rows = (
        (
            f"<code>{escape(layer.name)}</code>",
            escape(layer.scheme),
            escape(layer.method),
            charts.inline_bar(relative_error(layer) / worst),
            _percent(relative_error(layer)),
            _number(layer.sqnr_db),
            charts.inline_bar(width(layer.bytes_after), "c2", width(layer.bytes_before)),
            f"{layer.bytes_before / 1e6:,.2f} → {layer.bytes_after / 1e6:,.2f}",
        )
        for layer in layers
    )
    head = ("tensor", "scheme", "method", "error", "", "SQNR dB", "size (√ scale)", "MB")
    return _table(head, rows)


def _circumstances(report: Report) -> str:
    tables = {
        "Model": report.captured,
        "Coverage": report.coverage,
        "Backend": report.details,
        "Versions": report.versions,
    }
    return "".join(
        f"<h3>{name}</h3>{_table((), [(escape(key), _value(value)) for key, value in facts.items()])}"
        for name, facts in tables.items()
        if facts
    )


def _value(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple) and len(value) > 8:
        return f"<details><summary>{len(value)} entries</summary>{escape(json.dumps(value, default=str))}</details>"
    return escape(value if isinstance(value, str) else json.dumps(value, default=str))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    top = f"<thead><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr></thead>" if head else ""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{lines}</tbody></table></div>'


def _number(value: float | None, form: str = ".1f") -> str:
    if value is None:
        return "–"
    return format(value, form) if math.isfinite(value) else "not finite"


def _percent(value: float) -> str:
    return f"{value:.2%}" if math.isfinite(value) else "not finite"


_STYLE = """
:root { color-scheme: light dark; --back: #fcfcfb; --ink: #1b1b1a; --soft: #6b6a66;
  --edge: #e3e2dd; --card: #f3f2ee;
  --c0: #2a78d6; --c1: #eb6834; --c2: #1a9c75; --c3: #c98a00; --c4: #d9568f; --c5: #5a7d1f;
  --c6: #6a58c9; --c7: #d23f3e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #181817; --ink: #ecebe6; --soft: #a09e97; --edge: #3a3936; --card: #232321;
    --c0: #4a94ea; --c1: #e5743f; --c2: #2bb389; --c3: #d9a013; --c4: #e077a5; --c5: #8fb547;
    --c6: #9b8cec; --c7: #e86f6c; } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1rem 0 .2rem; } p { margin: .3rem 0; }
code { font: .86em ui-monospace, monospace; overflow-wrap: anywhere; }
.quiet, .tiles span { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 1.3rem 0; }
.tiles div { background: var(--card); border-radius: 8px; padding: .7rem .9rem; }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; } .tiles span { font-size: .82rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: .28rem .7rem .28rem 0; border-bottom: 1px solid var(--edge); vertical-align: top; }
.tag { border: 1px solid var(--edge); border-radius: 4px; padding: 0 .35rem; } .tag.lossy { color: var(--c1); }
.legend { font-size: .84rem; } .key { margin-right: 1rem; white-space: nowrap; }
.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .35rem; }
svg.chart { width: 100%; height: auto; } svg.cell { width: 140px; height: 14px; }
svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--edge); } .line { fill: none !important; stroke-width: 1.2; opacity: .45; }
rect.pale { fill: var(--edge); } .rest { fill: var(--soft); background: var(--soft); stroke: var(--soft); }
""" + "\n".join(
    f".c{i} {{ fill: var(--c{i}); background: var(--c{i}); }} .line.c{i} {{ stroke: var(--c{i}); }}"
    for i in range(charts.COLOURS)
)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{head}
{body}
</body>
</html>
"""
