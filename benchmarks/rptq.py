"""RPTQ's configurations on SmolLM2-135M, against the program with the same weights (W4A16, W3A16, float).

    python benchmarks/rptq.py --text valid.txt [--windows 16] [--only W4A8] [--fresh]

Writes results/rptq.json as it goes: perplexity, its ratio to that program's, the bars; and the same rounding with one
scale a tensor, and with free clusters (K-Means without whole groups, as many of them) for comparison. What is there
already is not measured again.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import JOURNAL, canonical, resumed, self_written, write
from quality import LENGTH, build_reference
from quality_page import write_page
from torch import fx

from qcompiler import data, evaluate
from qcompiler.calibration import Needs
from qcompiler.data import Calibration
from qcompiler.ops import qc
from qcompiler.passes.rptq import features
from qcompiler.passes.selection import BODY, layers_of, select
from qcompiler.passes.statistics import MinMax
from qcompiler.pipeline import Context, Contract, Pass, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.rounding import grid_of
from qcompiler.scheme import Scheme
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
STATIC_KV = "kv{{key=int{0}:g8:asym value=int{0}:g8:asym}}"
BLOCK_KV = "kv{{key=int{0}:channel:asym:dynamic block=64 value=int{0}:g32:asym:dynamic}}"
ATTENTION = "kv{{key=int{0}:g8:asym value=int{0}:g8:asym query=int{0}:g8:asym levels=255}}"
BLOCK_ATTENTION = (
    "kv{key=int4:channel:asym:dynamic block=64 value=int4:g32:asym:dynamic query=int4:g32:asym:dynamic levels=255}"
)
BY_TOKEN = "kv{{key=int{0}:token:asym:dynamic value=int{0}:token:asym:dynamic}}"
CONFIGURATIONS = {  # name: (bits of the weights, what comes after them, the highest ratio to W4A16 asked for, or None)
    "W4A8": (4, "activations{scheme=int8:g32:asym}, " + ATTENTION.format(8), 1.04),
    "W4A4": (4, f"{NORMED}, {BLOCK_ATTENTION}", 1.5),
    "W4A4KV": (4, BLOCK_KV.format(4), 1.04),
    "W4A3KV": (4, BLOCK_KV.format(3), 1.12),
    "W4A8 without relief for massive activations": (4, "activations{scheme=int8:g32:asym massive=0}", None),
    "W4A8 free clusters, without that relief": (4, "free", None),
    "W4A8 per tensor": (4, "activations{scheme=int8:tensor:asym massive=0}", None),
    "W4A4 linear layers only": (4, NORMED, None),
    "W4A4 attention only": (4, BLOCK_ATTENTION, None),
    "W4A4 per tensor": (4, TENSOR, None),
    "W4A4 with minimum-maximum ranges": (4, f"{WIDE}, {BLOCK_ATTENTION}", None),
    "W4A4 with static ranges everywhere": (4, f"{WIDE}, {ATTENTION.format(4)}", None),
    "W4A4 with norm outputs in 4 bits, dynamic": (4, "activations{scheme=int4:g32:asym:dynamic}", None),
    "W4A4KV static": (4, STATIC_KV.format(4), None),
    "W4A3KV static": (4, STATIC_KV.format(3), None),
    "W4A4KV per tensor": (4, "kv{key=int4:tensor:asym value=int4:tensor:asym}", None),
    "W4A3KV per tensor": (4, "kv{key=int3:tensor:asym value=int3:tensor:asym}", None),
    "W3A3KV": (3, BLOCK_KV.format(3), None),
    "W3A3KV per tensor": (3, "kv{key=int3:tensor:asym value=int3:tensor:asym}", None),
    "KV8": (16, BY_TOKEN.format(8), 1.002),
    "KV4": (16, BLOCK_KV.format(4), 1.02),
    "KV3": (16, BLOCK_KV.format(3), 1.08),
    "KV2": (16, BLOCK_KV.format(2), None),
    "KV4 by token": (16, BY_TOKEN.format(4), None),
    "KV3 by token": (16, BY_TOKEN.format(3), None),
}


@dataclass(frozen=True)
class FreeClusters(Pass):
    """Static 8-bit activations with a scale for each of 18 K-Means clusters of any size, wherever its channels are."""

    name: ClassVar[str] = "free"
    contract: ClassVar[Contract] = Contract.LOSSY

    def run(self, program: Program, ctx: Context) -> None:
        from sklearn.cluster import KMeans

        layers = select(program, (BODY,), (), ctx, layers_of(program))

        def needs(nodes: Any) -> Needs:
            return {node.name: MinMax() for node in nodes if node in layers}

        done: dict[fx.Node, fx.Node] = {}
        for segment in ctx.sweep(program, needs):
            for node in [n for n in segment.nodes if n.name in segment.statistics]:
                x, seen = node.all_input_nodes[0], segment.statistics[node.name]
                if x not in done:
                    channels = seen.shape[1]
                    points = features(seen, torch.arange(channels)[None, None])[0]
                    labels = torch.from_numpy(
                        KMeans(channels // 32, n_init=4, random_state=0).fit_predict(points)
                    ).long()
                    low = seen.new_zeros(channels // 32).scatter_reduce(0, labels, seen[0], "amin")[labels]
                    high = seen.new_zeros(channels // 32).scatter_reduce(0, labels, seen[1], "amax")[labels]
                    scheme = Scheme.parse("int8:channel:asym")
                    with program.graph.inserting_before(node):
                        grid = [program.store("free", part, like=node) for part in grid_of(low, high, scheme)]
                        how = {"scheme": str(scheme)}
                        done[x] = program.call(qc.fake_quantize, (x, grid), how, like=node, type=x.meta["type"])
                node.update_arg(0, done[x])


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
    for name, (bits, passes, bar) in CONFIGURATIONS.items():
        if options.only not in name or figures.get(name, {}).get("passes") == passes:
            continue
        if bits not in weights:
            steps = Recipe.parse(WEIGHTS[bits]).passes if WEIGHTS[bits] else ()
            weights[bits] = _ran(base, steps, samples).decoded()  # the same numbers, and faster to run
            figures[f"W{bits}A16"] = perplexity(weights[bits]) if steps else figures["fp32"]
            print(f"W{bits}A16", figures[f"W{bits}A16"] / figures["fp32"], flush=True)
        steps = (FreeClusters(),) if passes == "free" else Recipe.parse(passes).passes
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
