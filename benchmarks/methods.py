"""Methods x configurations on one model: perplexity as a multiple of the float model's, into docs/quality.md.

    python benchmarks/methods.py --text valid.txt [--model demo] [--windows 16] [--only W4A4] [--fresh]

Writes results/methods.json as it goes and the table from it; what is there already is not measured again. Windows of
512 tokens from the start of the text; calibration is text that the model writes itself.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, canonical, self_written, write
from quality import LENGTH, build_reference

from qcompiler import data, evaluate
from qcompiler.data import Calibration
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.report import Meter
from qcompiler.source import resolve

KIVI = "kv{{key=int{0}:channel:asym:dynamic block=64 value=int{0}:g32:asym:dynamic}}"
CONFIGURATIONS = {  # name: (weights, activations: dynamic, the static ones of rptq, keys and values)
    "W4A16": ("int4:g64:asym", "", "", ""),
    "W3A16": ("int3:g64:asym", "", "", ""),
    "W2A16": ("int2:g32:asym", "", "", ""),
    "W4A8": ("int4:g32:asym", "int8:token:asym:dynamic", "int8:g32:asym", ""),
    "W4A4": ("int4:g32:asym", "int4:g32:asym:dynamic", "int4:g32:asym", ""),
    "W4A16KV4": ("int4:g64:asym", "", "", KIVI.format(4)),
    "W4A4KV4": ("int4:g32:asym", "int4:g32:asym:dynamic", "int4:g32:asym", KIVI.format(4)),
}
METHODS = {  # what comes before the rounding, and what rounds the weights
    "rtn": ("", "rtn"),
    "gptq": ("", "gptq"),
    "awq": ("awq{{scheme={weights}}}", "rtn"),
    "smoothquant": ("smoothquant", "rtn"),
    "rptq": ("rptq{{group=32}}", "rtn"),
    "rotate": ("rotate", "rtn"),
    "rptq + gptq": ("rptq{{group=32}}", "gptq"),
    "rotate + gptq": ("rotate", "gptq"),
    "awq + gptq": ("awq{{scheme={weights}}}", "gptq"),
    "rotate + rptq + gptq": ("rotate, rptq{{group=32}}", "gptq"),
}
ABOUT = """\
Perplexity of SmolLM2-135M as a multiple of the float model's ({fp32:.2f}): {windows} windows of 512 tokens of
`{text}`, calibrated on text that the model wrote itself. Weights but the head's are quantized: 4-bit ones in groups of
64 (32 where activations are rounded), 2-bit ones of 32. Activations have a scale for each token in 8 bits, for each
token and group of 32 channels in 4 bits, and static ones for groups of 32 with rptq. KV4: keys by channel over 64
tokens, values by token in groups of 32. Written by `make bench-quality`."""
TABLE = Path(__file__).parent.parent / "docs" / "quality.md"


def passes(configuration: str, method: str) -> str:
    """The recipe of a cell of the table.

    >>> passes("W4A8", "rptq")
    'rptq{group=32}, activations{scheme=int8:g32:asym}, rtn{scheme=int4:g32:asym}'
    """
    weights, dynamic, static, kv = CONFIGURATIONS[configuration]
    before, rounding = METHODS[method]
    activations = static if "rptq" in method else dynamic
    steps = [
        before.format(weights=weights),
        f"activations{{scheme={activations}}}" if activations else "",
        kv,
        f"{rounding}{{scheme={weights}}}",
    ]
    return ", ".join(step for step in steps if step)


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", default="", help="only cells whose 'configuration method' contains this")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    options = parser.parse_args()

    name = "methods" if options.model == "demo" else f"methods_{Path(options.model).name}"
    path = RESULTS / f"{name}.json"
    figures = json.loads(path.read_text()) if path.is_file() and not options.fresh else {}
    known = {key: figures.get(key) for key in ("text", "windows")}
    if known != {"text": options.text.name, "windows": options.windows}:
        figures = {"text": options.text.name, "windows": options.windows, "ratio": {}}
    base, tokens, written = _prepare(options)
    figures.setdefault("fp32", round(_perplexity(base, tokens, options.windows), 3))
    for configuration in CONFIGURATIONS:
        for method in METHODS:
            done = figures["ratio"].setdefault(configuration, {})
            if method not in done and options.only in f"{configuration} {method}":
                done[method] = _measure(base, passes(configuration, method), written, tokens, options.windows, figures)
                print(configuration, method, done[method], flush=True)
                write(name, {key: figures[key] for key in ("text", "windows", "fp32", "ratio")})
                if name == "methods":
                    TABLE.write_text(table(figures), encoding="utf-8")
    if name == "methods":
        TABLE.write_text(table(figures), encoding="utf-8")
    print("written to", path, "and", TABLE)


def _prepare(options: argparse.Namespace) -> tuple[Program, torch.Tensor, Any]:
    base, tokenizer = canonical(resolve(options.model).model)
    tokens = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    return base, tokens, self_written(base, Calibration())


def _perplexity(program: Program, tokens: torch.Tensor, windows: int) -> float:
    return evaluate.perplexity(build_reference(program), tokens, LENGTH, windows)


def _measure(
    base: Program, recipe: str, samples: Any, tokens: torch.Tensor, windows: int, figures: dict[str, Any]
) -> dict[str, Any]:
    """One cell: the ratio, and how long quantizing took."""
    program = base.copy()
    with Meter() as meter:
        Runner(Context(samples=samples), data.check_samples(program)).run(program, Recipe.parse(recipe).passes)
    found = _perplexity(program, tokens, windows)
    return {"passes": recipe, "ratio": round(found / figures["fp32"], 4), "seconds": round(meter.seconds)}


def table(figures: dict[str, Any]) -> str:
    """The page: one row a method, one column a configuration; the best of each column is bold."""
    ratios = figures["ratio"]
    columns = [c for c in CONFIGURATIONS if ratios.get(c)]
    lines = [
        "# Quality",
        "",
        ABOUT.format(**figures),
        "",
        "| method | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    best = {c: min(cell["ratio"] for cell in ratios[c].values()) for c in columns}
    for method in METHODS:
        cells = [ratios[c].get(method, {}).get("ratio") for c in columns]
        texts = [
            "" if r is None else f"**{r:.3f}**" if r == best[c] else f"{r:.3f}"
            for c, r in zip(columns, cells, strict=True)
        ]
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
