"""The HTML report: drawn, complete, escaped, and on its own."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from qcompiler import charts
from qcompiler.html import page
from qcompiler.report import LayerRecord, PassRecord, Report
from qcompiler.show import report_view

VOID = {"meta", "br", "i"}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sample_report(layers: int = 4) -> Report:
    """A report with everything in it, texts that need escaping included."""
    records = [
        LayerRecord(
            f"model.layers.{depth}.self_attn.{kind}.weight",
            "int4:g64:asym",
            sqnr_db=20.0 - depth,
            output_error=0.02 + 0.01 * depth + 0.004 * i,
            bytes_before=1_327_104,
            bytes_after=180_000,
            method="gptq",
        )
        for depth in range(layers)
        for i, kind in enumerate(KINDS)
    ]
    records.append(LayerRecord("model.embed_tokens.weight", "int8:channel:sym", 40.0, None, 113_246_208, 28_500_000))
    return Report(
        model="<script>alert('model')</script>",
        recipe="gptq-w4a16",
        backend="onnxruntime",
        calibration="self, 64 x 256 tokens, seed 0",
        captured={"family": "llama & <b>friends</b>"},
        passes=[
            PassRecord(
                "canonicalize", "canonicalize", "exact", 1.2, 900.0, True, (900, 400), (538.0, 538.0), 1e-6, 1e-9
            ),
            PassRecord(
                "gptq",
                "gptq{scheme=int4:g64:asym}",
                "lossy",
                61.5,
                1900.0,
                True,
                (400, 430),
                (538.0, 92.0),
                0.1,
                0.08,
                notes=["kept RTN's codes in 2 layers"],
                refusals=["lm_head: <tied> to the embedding"],
                layers=records,
            ),
            PassRecord("pack", "pack", "layout", 0.4, 1900.0),
        ],
        refusals=["triton: no GPU here"],
        coverage={"linears": 29, "quantized": 29, "bytes_share": 0.997, "float_layers": [f"x{i}" for i in range(9)]},
        stages={"capture": 20.0, "passes": 2.0, "data passes": 70.0, "lower": 3.0},
        sizes_mb={"float": 538.1, "compiled": 92.0},
        versions={"python": "3.11"},
    )


class Checker(HTMLParser):
    """Collects tags and attributes, and insists on balance."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open
    return checker


def test_page_is_balanced_and_draws_every_layer() -> None:
    report = sample_report()
    found = checked(page(report))
    assert found.seen.count("circle") == 4 * len(KINDS)  # the embedding stands in no block
    assert found.seen.count("polyline") == len(KINDS)
    assert found.seen.count("svg") >= 3 + 2 * len(report.layers)


def test_page_needs_nothing_else() -> None:
    text = page(sample_report())
    found = checked(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.seen)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href")]
    assert "http" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_every_text_is_escaped() -> None:
    hostile = "<img src=x onerror=alert(1)>\"'&"
    report = sample_report(1)
    report.model = report.recipe = report.backend = report.calibration = hostile
    report.captured, report.versions, report.details = {hostile: hostile}, {hostile: hostile}, {hostile: [hostile] * 9}
    report.refusals, report.stages = [hostile], {hostile: 1.0}
    for step in report.passes:
        step.text = step.contract = step.notes = hostile  # type: ignore[assignment]
        step.notes = [hostile]
    for layer in report.layers:
        layer.name = layer.scheme = layer.method = hostile
    assert "img" not in checked(page(report)).seen


def test_page_names_refusals_passes_and_sizes() -> None:
    text = page(sample_report())
    for expected in ("lm_head: &lt;tied&gt;", "triton: no GPU here", "gptq{scheme=int4:g64:asym}", "29 of 29", "5.8×"):
        assert expected in text


@pytest.mark.parametrize("report", [Report(), Report(model="m", passes=[PassRecord("rtn", "rtn", "lossy")])])
def test_page_of_little(report: Report) -> None:
    checked(page(report))


def test_numbers_that_are_not_finite_are_said() -> None:
    report = sample_report(1)
    report.layers[0].output_error, report.layers[1].sqnr_db = float("nan"), float("inf")
    text = page(report)
    assert "not finite" in text
    assert not re.search(r'="(nan|inf)', text)
    checked(text)


def test_layers_without_blocks_are_drawn_in_order() -> None:
    report = Report(passes=[PassRecord("rtn", "rtn", "lossy", layers=[LayerRecord(n, "int8", 30.0) for n in "ab"])])
    assert checked(page(report)).seen.count("circle") == 2


@pytest.mark.parametrize("highest", [1e-9, 0.03, 0.99, 1.0, 7, 123456.0])
def test_ticks_cover_the_range(highest: float) -> None:
    steps = charts.ticks(highest)
    assert steps[0] == 0
    assert steps[-1] >= highest * (1 - 1e-9)
    assert 3 <= len(steps) <= 7


@pytest.mark.parametrize("layers", [False, True])
def test_terminal_view(layers: bool) -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report_view(sample_report(), layers))
    text = console.export_text()
    for expected in ("gptq{scheme=int4:g64:asym}", "lossy", "lm_head: <tied>", "29 of 29", "538.1 MB"):
        assert expected in text
