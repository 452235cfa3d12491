"""Methods x configurations on one model: perplexity as a multiple of the float model's, into docs/quality.md.

    python benchmarks/methods.py --text valid.txt [--model demo] [--windows 16] [--only 'W4A4 *'] [--fresh]

Writes results/methods.json as it goes and the page from it; what is there already is not measured again. Windows of
512 tokens from the start of the text; calibration is text that the model writes itself. The model's channels are
shuffled first (at every symmetry site: the function stays the same): the demo model's file holds 4-bit blocks of 32
neighbouring channels, and methods that leave the order alone would find these blocks again.
"""

import argparse
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from common import JOURNAL, RESULTS, canonical, resumed, self_written, write
from quality import LENGTH, build_reference
from quality_page import write_page

from qcompiler import data, evaluate
from qcompiler.data import Calibration
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.report import Meter
from qcompiler.sites import Kind, find
from qcompiler.source import resolve
from qcompiler.testing import transform


@dataclass(frozen=True)
class Configuration:
    """Schemes of weights, of activations, and what rounds keys and values.

    4-bit activations are rounded before the weights are, so that methods which can make up for that do; 8-bit ones and
    caches change little and are rounded after, so that configurations share their weights.
    """

    weights: str
    low: str = ""
    high: str = ""
    clusters: str = ""  # the static ones that rptq's order is for, in the place of `high`
    kv: str = ""


LOW = "activations{scheme=int8:token:asym:dynamic include=@normed}, activations{scheme=int4:g32:asym:dynamic}"
KIVI = "kv{key=int4:channel:asym:dynamic block=64 value=int4:g32:asym:dynamic}"
DYNAMIC, STATIC = "activations{scheme=int8:token:asym:dynamic}", "activations{scheme=int8:g32:asym}"
CONFIGURATIONS = {
    "W4A16": Configuration("int4:g64:asym"),
    "W4A16KV4": Configuration("int4:g64:asym", kv=KIVI),
    "W4A8": Configuration("int4:g64:asym", high=DYNAMIC, clusters=STATIC),
    "W4A4": Configuration("int4:g64:asym", low=LOW),
    "W4A4KV4": Configuration("int4:g64:asym", low=LOW, kv=KIVI),
    "W3A16": Configuration("int3:g64:asym"),
    "W2A16": Configuration("int2:g32:asym"),
}
TUNE = "block_tune{{scheme={weights} steps=50"  # a quarter of the default: minutes for each cell, not tens
METHODS = {  # what transforms, and what rounds the weights
    "rtn": ("", "rtn"),
    "gptq": ("", "gptq"),
    "gptq, relative": ("", "gptq{{scheme={weights} importance=relative}}"),
    "gptq, attention": ("", "gptq{{scheme={weights} importance=attention}}"),
    "gptq, corrected": ("", "gptq{{scheme={weights} correction=0.5}}"),
    "awq": ("awq{{scheme={weights}}}", "rtn"),
    "awq, clipped": ("awq{{scheme={weights}}}, awq_clip{{scheme={weights}}}", "rtn"),
    "smoothquant": ("smoothquant", "rtn"),
    "rptq": ("rptq{{group=32}}", "rtn"),
    "rotate": ("rotate", "rtn"),
    "block_tune": ("", TUNE + " start=rtn}}"),
    "rptq + rotate": ("rotate, rptq{{group=32}}", "rtn"),
    "rotate + gptq": ("rotate", "gptq"),
    "awq + gptq": ("awq{{scheme={weights}}}", "gptq"),
    "rptq + gptq": ("rptq{{group=32}}", "gptq"),
    "gptq + block_tune": ("", TUNE + "}}"),
    "rotate + gptq + block_tune": ("rotate", TUNE + "}}"),
}


def stages(configuration: str, method: str) -> list[str]:
    """The recipe of a cell, in pieces that other cells begin with as well.

    >>> stages("W4A8", "rptq")[1:]
    ['rtn{scheme=int4:g64:asym}', 'activations{scheme=int8:g32:asym}']
    """
    kind, (before, rounding) = CONFIGURATIONS[configuration], METHODS[method]
    weights = rounding.format(weights=kind.weights) if "{" in rounding else f"{rounding}{{scheme={kind.weights}}}"
    high = kind.clusters if "rptq" in method and kind.clusters else kind.high
    return [step for step in (before.format(weights=kind.weights), kind.low, weights, high, kind.kv) if step]


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--batches", type=int, default=8, help="calibration batches of 2048 tokens to use")
    parser.add_argument("--only", default="*", help="only cells like this, as in 'W4A4 *' or '* rotate + gptq'")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    options = parser.parse_args()

    name = "methods" if options.model == "demo" else f"methods_{Path(options.model).name}"
    setting = {"text": options.text.name, "windows": options.windows, "batches": options.batches}
    figures = resumed(name, setting, options.fresh)
    base, tokenizer = canonical(resolve(options.model).model)
    tokens = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    bench = Bench(shuffled(base), self_written(base, Calibration())[: options.batches], tokens, options.windows)
    figures.setdefault("fp32", round(bench.perplexity(bench.base), 3))
    ratios = figures.setdefault("ratio", {})
    for method in METHODS:
        for configuration in CONFIGURATIONS:
            wanted = stages(configuration, method)
            done = ratios.setdefault(configuration, {})
            asked = fnmatch(f"{configuration} {method}", options.only)
            if asked and done.get(method, {}).get("passes") != ", ".join(wanted):
                done[method] = bench.cell(wanted, figures["fp32"])
                print(configuration, method, json.dumps(done[method]), flush=True)
                write(name, figures)
                write_page()
    print("written to", RESULTS / f"{name}.json")


def shuffled(program: Program) -> Program:
    """The same function, its channels in a random order."""
    copy, random = program.copy(), torch.Generator().manual_seed(0)
    for site in find(copy, Kind.PERMUTE):
        transform(copy, site, random)
    return copy


class Bench:
    """One model and one text; programs that the next cells begin with are kept."""

    def __init__(self, base: Program, samples: Any, tokens: torch.Tensor, windows: int) -> None:
        self.base, self.samples, self.tokens, self.windows = base, samples, tokens, windows
        self.kept: dict[tuple[str, ...], Program] = {}

    def cell(self, wanted: list[str], fp32: float) -> dict[str, Any]:
        """The ratio, and how long what was not done yet took."""
        begun = [n for n in range(len(wanted), 0, -1) if tuple(wanted[:n]) in self.kept]
        start = begun[0] if begun else 0
        program = self.kept[tuple(wanted[:start])] if start else self.base
        self.kept = {key: kept for key, kept in self.kept.items() if key == tuple(wanted[: len(key)])}
        with Meter() as meter:
            for n in range(start, len(wanted)):
                program = self.ran(program, wanted[n])
                self.kept[tuple(wanted[: n + 1])] = program
        ratio = round(self.perplexity(program) / fp32, 4)
        return {"passes": ", ".join(wanted), "ratio": ratio, "seconds": round(meter.seconds)}

    def ran(self, program: Program, recipe: str) -> Program:
        """A copy after some passes, its weights decoded: they round the same, and run faster."""
        copy = program.copy()
        Runner(Context(samples=self.samples, journal=JOURNAL), data.check_samples(copy)).run(
            copy, Recipe.parse(recipe).passes
        )
        return copy.decoded()

    def perplexity(self, program: Program) -> float:
        """On the text."""
        return evaluate.perplexity(build_reference(program), self.tokens, LENGTH, self.windows)


if __name__ == "__main__":
    main()
