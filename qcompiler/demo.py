"""Demo: a small language model, compiled to 4 bits, side by side with its 32-bit original.

Both run on ONNX Runtime, each in a process of its own. The text they predict is the opening of "Alice's Adventures
in Wonderland" (Lewis Carroll, 1865).
"""

import json
import tempfile
import time
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qcompiler.bench import Job, measure_apart
from qcompiler.compiler import capture, compile
from qcompiler.progress import Reporter
from qcompiler.report import Report
from qcompiler.session import Session
from qcompiler.show import report_view
from qcompiler.source import demo_model

BACKEND = "onnxruntime"
ORIGINAL = "float"  # the recipe that changes nothing but the form
PROMPT = "The largest planet in our solar system is"
SHOWN_NAME = "SmolLM2-135M"
SAMPLES = 16  # calibration texts: a quarter of what compile writes, so that the demo ends within minutes


class Row(NamedTuple):
    """One line of the comparison: what it is called, its key, how it is written, whether more is better."""

    title: str
    key: str
    form: str
    more_is_better: bool = False


ROWS = (
    Row("perplexity (Alice in Wonderland)", "perplexity", "{:.2f}"),
    Row("weights", "weights_mb", "{:.0f} MB"),
    Row("folder on disk", "size_mb", "{:.0f} MB"),
    Row("load time", "load_s", "{:.2f} s"),
    Row("prefill, 512 tokens", "prefill_tokens_per_s", "{:.0f} tokens/s", True),
    Row("decode, one by one", "decode_tokens_per_s", "{:.1f} tokens/s", True),
    Row("peak memory", "peak_rss_mb", "{:.0f} MB"),
)


def run(out: Path, recipe: str) -> RenderableType:
    """Compile the demo's model into `out`, measure it and its original, and return the last screen.

    The figures are left beside it, in `<out>.json`.
    """
    text = (files("qcompiler") / "demo_text.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="qcompiler-demo-") as scratch:
        original = Path(scratch) / "original"
        report = _compile_both(out, original, recipe)
        jobs = (Job(str(folder), text=text, prompt=PROMPT) for folder in (original, out))
        before, after = (measure_apart(job) for job in jobs)
    before["weights_mb"], after["weights_mb"] = report.sizes_mb["float"], report.sizes_mb["compiled"]
    figures = {"recipe": report.recipe, "before": before, "after": after, "stages": report.stages}
    out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return last_screen(report, before, after, out)


def _compile_both(out: Path, original: Path, recipe: str) -> Report:
    """Save the compiled model and the unquantized one; what they took of memory is free again afterwards."""
    with Reporter() as progress:
        progress("reading and capturing the model", 0, 0)
        start = time.perf_counter()
        program = capture(demo_model())
        seconds = time.perf_counter() - start
        session = compile(program.copy(), recipe, backend=BACKEND, samples=SAMPLES, progress=progress)
        session.report.model = SHOWN_NAME
        session.report.stages["capture"] = seconds
        progress("saving", 0, 0)
        session.save(out)
        progress("preparing the original for comparison", 0, 0)
        program.info.pop("tokenizer", None)  # it takes seconds to read, and is at hand
        made = compile(program, ORIGINAL, backend=BACKEND)
        Session(made.program, made.runner, made.report, session.tokenizer, made.folder).save(original)
    return session.report


def last_screen(report: Report, before: Mapping[str, Any], after: Mapping[str, Any], out: Path) -> RenderableType:
    """The report, then the comparison, a completion of both, and what to try next."""
    return Group(
        report_view(report),
        Text(),
        comparison(before, after),
        Text(),
        _completion("32 bits", before),
        _completion("compiled", after),
        Text(),
        _line("The compiled model: ", f"{out}"),
        _line("The report, drawn:  ", f"{out / 'report.html'}"),
        _line("Try: ", f'qcompiler generate {out} "Once upon a time"'),
        _line("     ", f"qcompiler inspect {out}"),
    )


def comparison(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Original and compiled side by side, with the ratio; green where the compiled one is better."""
    table = Table(title=f"{SHOWN_NAME} on ONNX Runtime", title_style="bold", header_style="bold")
    for name in ("", "32 bits", "compiled", "ratio"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in ROWS:
        old, new = float(before[row.key]), float(after[row.key])
        ratio = new / old if old else 1.0
        better = ratio > 1 if row.more_is_better else ratio < 1
        style = "green" if better else ""
        table.add_row(row.title, row.form.format(old), row.form.format(new), Text(f"{ratio:.2f} x", style=style))
    return table


def _completion(title: str, measured: Mapping[str, Any]) -> Panel:
    text = Text(PROMPT, style="dim")
    text.append(str(measured["completion"]).rstrip(), style="default")
    return Panel(text, title=title, title_align="left")


def _line(label: str, value: str) -> Text:
    return Text.assemble((label, "bold"), value)
