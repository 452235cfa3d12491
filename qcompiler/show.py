"""Show: a Report, a Program and the installed plugins as tables for the terminal."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qcompiler.plugins import Registry
from qcompiler.program import Program
from qcompiler.report import LayerRecord, PassRecord, Report
from qcompiler.target import Backend
from qcompiler.text import target_name

CONTRACT_STYLE = {"exact": "green", "lossy": "yellow", "layout": "cyan"}
SHOWN_REFUSALS = 20


def report_view(report: Report, layers: bool = False) -> RenderableType:
    """A report: headline, passes, layers (each, or by scheme and method), refusals."""
    parts: list[RenderableType] = [_headline(report)]
    if report.passes:
        parts.append(passes_table(report.passes))
    if report.layers:
        parts.append(layers_table(report.layers) if layers else schemes_table(report.layers))
    parts += _refusals(report.all_refusals)
    return Group(*parts)


def _headline(report: Report) -> RenderableType:
    facts = {
        "model": report.model,
        "recipe": report.recipe,
        "backend": report.backend or "none takes it",
        "calibration": report.calibration,
        "size": _sizes(report.sizes_mb),
        "coverage": _coverage(report.coverage),
        "time": ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.stages.items()),
    }
    return facts_table({name: value for name, value in facts.items() if value})


def _sizes(sizes: Mapping[str, float]) -> str:
    before, after = sizes.get("float", 0.0), sizes.get("compiled", 0.0)
    if not after or not before:
        return ""
    return f"{before:.1f} MB as it came, {after:.1f} MB compiled ({before / after:.1f} x smaller)"


def _coverage(coverage: Mapping[str, Any]) -> str:
    if "linears" not in coverage:
        return ""
    share = float(coverage.get("bytes_share", 0.0))
    return f"{coverage['quantized']} of {coverage['linears']} linear layers, {share:.1%} of the bytes of weights"


def facts_table(facts: Mapping[str, str]) -> Table:
    """Names and values, one a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, escape(value))
    return table


def _table(title: str, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    """An empty table that fits 80 columns; columns named in `right` hold numbers."""
    table = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="dim")
    table.title_justify, table.title_style = "left", "bold"
    for i, name in enumerate(left):
        table.add_column(name, overflow="fold", ratio=None if i else 1)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def passes_table(passes: Sequence[PassRecord]) -> Table:
    """What each pass did: its contract, cost, and effect."""
    table = _table("Passes", ["pass", "contract"], ["seconds", "MB after", "change", "KL"])
    for p in passes:
        table.add_row(
            Text(p.text or p.name),
            Text(p.contract, style=CONTRACT_STYLE.get(p.contract, "")),
            f"{p.seconds:.1f}",
            f"{p.megabytes[1]:.1f}",
            number(p.output_change, ".1e") if p.changed else "none",
            number(p.kl, ".4f"),
        )
    return table


def layers_table(layers: Sequence[LayerRecord]) -> Table:
    """Each quantized tensor: how it is stored, what that cost, what it takes."""
    table = _table("Layers", ["tensor", "scheme"], ["error", "SQNR dB", "kB"])
    for layer in layers:
        table.add_row(
            Text(layer.name.removesuffix(".weight")),
            Text(layer.scheme),
            number(layer.output_error, ".2%"),
            number(layer.sqnr_db, ".1f"),
            f"{layer.bytes_after / 1e3:,.0f}",
        )
    return table


def schemes_table(layers: Sequence[LayerRecord]) -> RenderableType:
    """Quantized tensors by scheme and method: how many, their error, their bytes."""
    groups: dict[tuple[str, str], list[LayerRecord]] = {}
    for layer in layers:
        groups.setdefault((layer.scheme, layer.method), []).append(layer)
    table = _table("Quantized", ["scheme", "method"], ["tensors", "mean error", "worst", "SQNR dB", "MB"])
    for (scheme, method), members in groups.items():
        errors = [layer.output_error for layer in members if layer.output_error is not None]
        table.add_row(
            Text(scheme),
            Text(method),
            str(len(members)),
            number(sum(errors) / len(errors) if errors else None, ".2%"),
            number(max(errors, default=None), ".2%"),
            number(sum(layer.sqnr_db for layer in members) / len(members), ".1f"),
            f"{sum(layer.bytes_after for layer in members) / 1e6:,.1f}",
        )
    worst = max(layers, key=lambda layer: layer.output_error or 0.0)
    if worst.output_error is None:
        return table
    return Group(table, Text(f"The largest error, {worst.output_error:.2%}, is that of {worst.name}.", style="dim"))


def _refusals(refusals: Sequence[str]) -> Iterator[RenderableType]:
    if not refusals:
        return
    counted = Counter(refusals)
    yield Text(f"Refusals ({len(refusals)})", style="bold")
    for text, times in list(counted.items())[:SHOWN_REFUSALS]:
        yield Text(f"  {text}" + (f" (x{times})" if times > 1 else ""))
    if len(counted) > SHOWN_REFUSALS:
        yield Text(f"  and {len(counted) - SHOWN_REFUSALS} more, all in report.json", style="dim")


def number(value: float | None, form: str) -> str:
    """A number as text; a dash for None."""
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else "not finite"


def program_facts(program: Program) -> dict[str, Any]:
    """What a program is made of, ready for JSON: nodes, operators, linear layers, segments, signature."""
    operators = Counter(target_name(node.target) for node in program.calls())
    segments = {node.meta["segment"] for node in program.calls() if "segment" in node.meta}
    return {
        "inputs": {i.name: str(i.type) for i in program.inputs},
        "outputs": list(program.outputs),
        "nodes": len(program.graph.nodes),
        "segments": len(segments),
        "linears": len(program.linears()),
        "tensors": len(program.tensors),
        "size_mb": program.nbytes / 1e6,
        "quantized": len(program.quantized),
        "operators": dict(operators.most_common()),
    }


def program_view(facts: Mapping[str, Any]) -> RenderableType:
    """The facts of `program_facts` as tables."""
    head = {
        "inputs": ", ".join(f"{name} {kind}" for name, kind in facts["inputs"].items()),
        "outputs": ", ".join(facts["outputs"]),
        "nodes": f"{facts['nodes']} in {facts['segments']} segments",
        "linear layers": f"{facts['linears']} float; {facts['quantized']} quantized tensors",
        "tensors": f"{facts['tensors']}, {facts['size_mb']:.1f} MB",
    }
    table = _table("Operators", ["operator"], ["nodes"])
    for name, count in facts["operators"].items():
        table.add_row(escape(name), str(count))
    return Group(facts_table(head), table)


def plugins_facts(found: Registry, about: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """What is installed, ready for JSON: each thing's name, plugin and remark; `about` describes recipes."""

    def rows(names: Mapping[str, Any], remark: Mapping[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "plugin": found.owners.get(n, ""), "about": remark.get(n, "")} for n in names]

    passes = {n: f"{kind.contract.value}: {_first_line(kind)}" for n, kind in found.passes.items()}
    return {
        "passes": rows(found.passes, passes),
        "recipes": rows(found.recipes, about),
        "backends": rows(found.backends, {n: _availability(kind) for n, kind in found.backends.items()}),
        "frontends": rows(found.frontends, {}),
        "formats": rows(found.formats, {}),
        "kernels": rows(found.kernels, {n: f"{k.op}: {k.accepts}" for n, k in found.kernels.items()}),
        "broken": [{"name": no.where, "plugin": no.where, "about": no.reason} for no in found.broken],
    }


def plugins_view(facts: Mapping[str, Sequence[Mapping[str, str]]]) -> RenderableType:
    """The facts of `plugins_facts` as one table."""
    titles = {"frontends": "front ends", "broken": "broken plugins"}
    table = _table("", ["kind", "name", "plugin", "about"])
    table.columns[0].ratio, table.columns[3].ratio = None, 1
    for kind, rows in facts.items():
        for i, row in enumerate(rows):
            style = "red" if kind == "broken" else ""
            label = titles.get(kind, kind) if i == 0 else ""
            table.add_row(label, *(escape(row[key]) for key in ("name", "plugin", "about")), style=style)
        table.add_section()
    return table


def _availability(kind: type[Backend]) -> str:
    """Whether a backend can be used here, or why not."""
    try:
        answer = kind().available()
    except Exception as error:  # noqa: BLE001 - a stranger's code may raise anything, and must not hide the others
        return f"broken: {type(error).__name__}: {error}"
    return "available" if answer else f"not available: {answer}"


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]
