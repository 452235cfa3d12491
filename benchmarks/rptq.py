"""RPTQ's configurations on SmolLM2-135M, against the program with the same weights (W4A16, W3A16, float).

    python benchmarks/rptq.py --text valid.txt [--windows 16] [--only W4A8] [--fresh]

Writes results/rptq.json as it goes: perplexity, its ratio to that program's, the bars; and the same rounding with one
scale a tensor, and with free clusters (K-Means without whole groups, as many of them) for comparison. What is there
already is not measured again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import JOURNAL, canonical, resumed, self_written, write
from free_clusters import FreeClusters
from quality import LENGTH, build_reference
from quality_page import write_page

from qcompiler import data, evaluate
from qcompiler.data import Calibration
from qcompiler.pipeline import Context, Pass, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.source import resolve

WEIGHTS = {
    16: "",
    4: "rptq{group=32}, gptq{scheme=int4:g32:asym}",
    3: "rptq{group=32}, gptq{scheme=int3:g32:asym}",
}
NORMED = (
    "activations{scheme=int8:g32:asym include=@normed}, "
    "activations{scheme=int4:g32:asym exclude=@normed|@head ranges=error}"
)
WIDE = NORMED.replace(" ranges=error", "")
TENSOR = (
    "activations{scheme=int8:tensor:asym include=@normed massive=0}, "
    "activations{scheme=int4:tensor:asym exclude=@normed|@head massive=0}"
)
# RPTQ's models have no rotary positions: in few bits, ranges that hold at all of them cost much.
STATIC_KV = "kv{{key=int{0}:g8:asym value=int{0}:g8:asym widen=false}}"
BLOCK_KV = "kv{{key=int{0}:channel:asym:dynamic block=64 value=int{0}:g32:asym:dynamic}}"
ATTENTION = "kv{{key=int{0}:g8:asym value=int{0}:g8:asym query=int{0}:g8:asym levels=255 widen={1}}}"
NARROW_ATTENTION = ATTENTION.format(4, "false")
BLOCK_ATTENTION = (
    "kv{key=int4:channel:asym:dynamic block=64 value=int4:g32:asym:dynamic query=int4:g32:asym:dynamic levels=255}"
)
NO_RELIEF = (
    "activations{scheme=int8:g32:asym include=@normed massive=0}, "
    "activations{scheme=int4:g32:asym exclude=@normed|@head massive=0}"
)
ALL = (
    "activations{{scheme=int{0}:g32:asym ranges=error}}, kv{{key=int{0}:channel:asym:dynamic block=64 "
    "value=int{0}:g32:asym:dynamic levels={1}}}"
)
BY_TOKEN = "kv{{key=int{0}:token:asym:dynamic value=int{0}:token:asym:dynamic}}"
# name: (bits of the weights, what comes after them, the highest ratio to W4A16 asked for, or None)
CONFIGURATIONS: dict[str, tuple[int, str | FreeClusters, float | None]] = {
    "W4A8": (4, "activations{scheme=int8:g32:asym}, " + ATTENTION.format(8, "true"), 1.04),
    "W4A4": (4, f"{NORMED}, {BLOCK_ATTENTION}", 1.5),
    "W4A4KV": (4, BLOCK_KV.format(4), 1.04),
    "W4A3KV": (4, BLOCK_KV.format(3), 1.12),
    "W4A8 without relief for massive activations": (4, "activations{scheme=int8:g32:asym massive=0}", None),
    "W4A8 free clusters, without that relief": (4, FreeClusters(8, 8), None),
    "W4A8 per tensor": (4, "activations{scheme=int8:tensor:asym massive=0}", None),
    "W4A4 linear layers only": (4, NORMED, None),
    "W4A4 attention only": (4, BLOCK_ATTENTION, None),
    "W4A4 per tensor": (4, TENSOR, None),
    "W4A4 with minimum-maximum ranges": (4, f"{WIDE}, {BLOCK_ATTENTION}", None),
    "W4A4 with static ranges everywhere": (4, f"{WIDE}, {NARROW_ATTENTION}", None),
    "W4A4 with static ranges everywhere, without that relief": (4, f"{NO_RELIEF}, {NARROW_ATTENTION}", None),
    "W4A4 free clusters, without that relief": (4, FreeClusters(8, 4, 4, queries=True), None),
    "W4A4 with norm outputs in 4 bits, dynamic": (4, "activations{scheme=int4:g32:asym:dynamic}", None),
    "W4A4KV static": (4, STATIC_KV.format(4), None),
    "W4A3KV static": (4, STATIC_KV.format(3), None),
    "W4A4KV free clusters": (4, FreeClusters(heads=4), None),
    "W4A3KV free clusters": (4, FreeClusters(heads=3), None),
    "W4A4KV per tensor": (4, "kv{key=int4:tensor:asym value=int4:tensor:asym widen=false}", None),
    "W4A3KV per tensor": (4, "kv{key=int3:tensor:asym value=int3:tensor:asym widen=false}", None),
    "W3A3KV": (3, BLOCK_KV.format(3), None),
    "W3A3KV static": (3, STATIC_KV.format(3), None),
    "W3A3KV free clusters": (3, FreeClusters(heads=3), None),
    "W3A3KV per tensor": (3, "kv{key=int3:tensor:asym value=int3:tensor:asym widen=false}", None),
    "W4A4KV and all": (4, ALL.format(4, 15), None),
    "W4A3KV and all": (4, ALL.format(3, 7), None),
    "W3A3KV and all": (3, ALL.format(3, 7), None),
    "KV8": (16, BY_TOKEN.format(8), 1.002),
    "KV4": (16, BLOCK_KV.format(4), 1.02),
    "KV3": (16, BLOCK_KV.format(3), 1.08),
    "KV2": (16, BLOCK_KV.format(2), None),
    "KV4 by token": (16, BY_TOKEN.format(4), None),
    "KV3 by token": (16, BY_TOKEN.format(3), None),
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", default="", help="only configurations whose name contains this")
    parser.add_argument("--batches", type=int, default=8, help="calibration batches of 2048 tokens to use")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    options = parser.parse_args()

    base, tokenizer = canonical(resolve("demo").model)
    tokens = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    samples = self_written(base, Calibration())[: options.batches]

    def perplexity(program: Program) -> float:
        return evaluate.perplexity(build_reference(program), tokens, LENGTH, options.windows)

    setting = {"text": options.text.name, "windows": options.windows, "batches": options.batches}
    figures = resumed("rptq", setting, options.fresh)
    figures.setdefault("fp32", perplexity(base))
    weights: dict[int, Program] = {}
    for name, (bits, after, bar) in CONFIGURATIONS.items():
        passes = str(after)
        if options.only not in name or figures.get(name, {}).get("passes") == passes:
            continue
        if bits not in weights:
            steps = Recipe.parse(WEIGHTS[bits]).passes if WEIGHTS[bits] else ()
            weights[bits] = _ran(base, steps, samples).decoded()  # the same numbers, and faster to run
            figures[f"W{bits}A16"] = perplexity(weights[bits]) if steps else figures["fp32"]
            print(f"W{bits}A16", figures[f"W{bits}A16"] / figures["fp32"], flush=True)
        steps = (after,) if isinstance(after, Pass) else Recipe.parse(after).passes
        found = perplexity(_ran(weights[bits], steps, samples))
        ratio = found / figures[f"W{bits}A16"]
        figures[name] = {"passes": passes, "perplexity": round(found, 3), "ratio": round(ratio, 4)}
        figures[name] |= {"bar": bar, "met": ratio <= bar} if bar else {}
        print(name, json.dumps(figures[name]), flush=True)
        write("rptq", figures)
        write_page()


def _ran(program: Program, steps: Any, samples: Any) -> Program:
    copy = program.copy()
    Runner(Context(samples=samples, journal=JOURNAL), data.check_samples(copy)).run(copy, steps)
    return copy


if __name__ == "__main__":
    main()
