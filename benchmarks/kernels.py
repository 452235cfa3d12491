"""Every kernel on the GPU at hand: time, share of its memory's speed and of its tensor cores', beside PyTorch's.

    python benchmarks/kernels.py            # one table, and results/kernels.json; some minutes

First each kernel's result is compared with its meaning on this very GPU. Times are those of CUDA graphs over so many
copies of a weight that none is in the cache when its turn comes; data are random. What a copy and a large bf16 product
reach here is measured in the same run, and every share is a share of that.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import kernel_caches
import torch
import triton
from kernel_checks import FP8, check, random_weight
from kernel_peers import peers

from qcompiler.errors import No
from qcompiler.kernels.cost import Cost
from qcompiler.kernels.dequantize_wq import linear_decoded
from qcompiler.kernels.linear_a8 import cost as cost_a8
from qcompiler.kernels.linear_a8 import linear_a8
from qcompiler.kernels.linear_float8 import cost as cost_f8
from qcompiler.kernels.linear_float8 import linear_float8
from qcompiler.kernels.linear_nf4 import PackedCodebook, linear_nf4
from qcompiler.kernels.linear_wq import cost as cost_wq
from qcompiler.kernels.linear_wq import linear_wq
from qcompiler.kernels.norm_quantize import NormQuantize
from qcompiler.kernels.operators import qct
from qcompiler.kernels.packed_float8 import PackedFloat8
from qcompiler.kernels.packed_integers import PackedIntegers
from qcompiler.kernels.packed_weight import PackedWeight
from qcompiler.kernels.quantize import cost as cost_rounding
from qcompiler.kernels.quantize import quantize
from qcompiler.kernels.records import split
from qcompiler.kernels.timing import copies_of, seconds
from qcompiler.rounding import NF4, float8_weight
from qcompiler.scheme import QTensor, Scheme

RESULTS = Path(__file__).parent / "results" / "kernels.json"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))


@dataclass(frozen=True)
class Row:
    """One measurement: what, for how many tokens, in how many seconds, and what it should have moved and computed."""

    name: str
    shape: tuple[int, int]
    tokens: int
    seconds: float
    cost: Cost
    beside: float = 0.0  # PyTorch's seconds for the same in bf16


def roofs() -> tuple[float, float]:
    """Bytes a second that a copy moves, and operations a second of a bf16 product, both large."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copied = 2 * source.numel() / seconds([lambda: target.copy_(source)] * 4)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copied, 2 * 8192**3 / seconds([lambda: a @ b] * 4)


def dense(shape: tuple[int, int], tokens: int) -> float:
    """PyTorch's seconds for the product in bf16."""
    n, k = shape
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies_of(2 * n * k))]
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    return seconds([partial(torch.nn.functional.linear, x, w) for w in weights])


def copies(packed: Any) -> list[Any]:
    """So many copies of a packed weight that each is read from memory."""
    return [
        replace(packed, words=packed.words.clone(), arrived=packed.arrived.clone())
        for _ in range(copies_of(packed.nbytes))
    ]


def weight_only(shape: tuple[int, int], base: dict[int, float]) -> Iterator[Row]:
    """linear_wq, and the decoded product for many tokens."""
    n, k = shape
    for width in (4, 3, 2, 8):
        packed = PackedWeight.pack(random_weight(f"int{width}:g128:asym", n, k))
        stock = copies(packed)
        for tokens in base:
            if width != 4 and tokens > 16:
                continue
            x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
            took = seconds([partial(linear_wq, x, w) for w in stock])
            yield Row(f"W{width}A16", shape, tokens, took, cost_wq(packed, tokens), base[tokens])
            if tokens >= 256:
                took = seconds([partial(linear_decoded, x, w) for w in stock])
                yield Row(f"W{width}A16 decoded", shape, tokens, took, cost_wq(packed, tokens), base[tokens])


def codebooks(shape: tuple[int, int], base: dict[int, float]) -> Iterator[Row]:
    """linear_nf4, groups of 64."""
    n, k = shape
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scale = torch.rand(n, k // 64, device="cuda")
    weight = QTensor(Scheme.parse("nf4:g64:sym"), (n, k), codes, scale, codebook=torch.tensor(NF4, device="cuda"))
    packed = PackedCodebook.pack(weight)
    stock = copies(packed)
    for tokens in (1, 16, 32, 64):
        x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
        took = seconds([partial(linear_nf4, x, w) for w in stock])
        yield Row("NF4", shape, tokens, took, cost_wq(packed, tokens), base[tokens])


def others(shape: tuple[int, int], base: dict[int, float]) -> Iterator[Row]:
    """The kernels of other people that are installed here; for the rest it is said why not."""
    n, k = shape
    nothing = Cost(n * k // 2, 0)
    for name, make in peers(n, k, copies_of(n * k // 2)):
        if isinstance(make, No):
            print(f"not measured: {make}", flush=True)
            continue
        for tokens in (1, 16, 32, 64, 128):
            x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
            try:
                took = seconds(make(x))
            except Exception as error:  # noqa: BLE001  a peer's own
                print(f"not measured: {name} M={tokens}: {error}".splitlines()[0], flush=True)
                continue
            yield Row(name, shape, tokens, took, replace(nothing, operations=2 * tokens * n * k), base[tokens])


def integers(shape: tuple[int, int], base: dict[int, float]) -> Iterator[Row]:
    """linear_a8 with a scale for each token."""
    n, k = shape
    for name, scheme, wanted in (("W4A8", "int4:g128", (1, 16, 128)), ("W8A8", "int8:channel", (16, 512, 2048))):
        packed = PackedIntegers.pack(random_weight(scheme, n, k), "int8:token:dynamic")
        stock = copies(packed)
        for tokens in wanted:
            x = torch.randint(-127, 128, (tokens, k), dtype=torch.int8, device="cuda")
            token = [torch.rand(tokens, device="cuda")]
            took = seconds([partial(linear_a8, x, w, token) for w in stock])
            yield Row(name, shape, tokens, took, cost_a8(packed, tokens), base.get(tokens, 0.0))


def floats(shape: tuple[int, int], base: dict[int, float]) -> Iterator[Row]:
    """linear_float8, where the GPU has such products."""
    if torch.cuda.get_device_capability() < (8, 9):
        return
    n, k = shape
    wide = float8_weight(torch.randn(n, k, device="cuda", dtype=torch.float16), Scheme.parse("fp8:channel"))
    weights = {"W4F8": (random_weight("int4:g128", n, k), (1, 16, 128)), "W8F8": (wide, (16, 512, 2048))}
    for name, (weight, wanted) in weights.items():
        packed = PackedFloat8.pack(weight, FP8)
        stock = copies(packed)
        for tokens in wanted:
            made = quantize(torch.randn(tokens, k, device="cuda"), [], FP8, packed.counted)
            call = partial(linear_float8, made.codes, token=[made.scale], sums=made.sums)
            took = seconds([partial(call, weight=one) for one in stock])
            yield Row(name, shape, tokens, took, cost_f8(packed, tokens), base.get(tokens, 0.0))


def rounding() -> Iterator[Row]:
    """quantize: what attention and a gated product leave."""
    for width, tokens in itertools.product((4096, 14336), (16, 2048)):
        rows = [
            torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
            for _ in range(min(64, copies_of(2 * tokens * width)))
        ]
        took = seconds([partial(quantize, x, [], "int8:token:dynamic") for x in rows])
        yield Row("quantize", (tokens, width), tokens, took, cost_rounding(tokens, width))


def norms() -> Iterator[Row]:
    """norm_quantize: RPTQ's on OPT, and the one before a dynamic product."""
    for width, tokens in itertools.product((4096, 8192), (16, 2048, 16384)):
        weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
        order = torch.randperm(width, device="cuda")
        grid = tuple(torch.full((width // 128,), value, device="cuda") for value in (0.05, 100.0))
        cases = (
            ("layer norm, reordered", "layer", "int8:g128:asym", order, grid, False),
            ("rms norm + residual", "rms", "int8:token:dynamic", None, (), True),
        )
        for name, kind, scheme, perm, given, adds in cases:
            norm = NormQuantize.pack(weight, weight, perm, given, kind=kind, eps=1e-5, scheme=scheme)
            rows = [
                torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
                for _ in range(min(64, copies_of(2 * tokens * width)))
            ]
            took = seconds([partial(norm, x, x if adds else None) for x in rows])
            yield Row(name, (tokens, width), tokens, took, norm.cost(tokens, adds))


def launches(calls: int = 200, rounds: int = 5) -> Iterator[Row]:
    """What a call costs the CPU outside graphs, on a layer so small that the GPU never makes it wait."""
    shape = (256, 256)
    x = torch.randn(1, 256, device="cuda", dtype=torch.float16)
    packed = PackedWeight.pack(random_weight("int4:g128:asym", *shape))
    parts, spec = split(packed)
    dense = torch.randn(*shape, device="cuda", dtype=torch.float16)
    kinds = {
        "launch linear_wq": partial(linear_wq, x, packed),
        "launch qct.linear": partial(qct.linear, x, parts, spec=spec),
        "launch torch linear": partial(torch.nn.functional.linear, x, dense),
    }
    for name, call in kinds.items():
        call()
        taken = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            taken.append((time.perf_counter() - start) / calls)
        yield Row(name, shape, 1, min(taken), Cost(0, 0))


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """All rows, as they come."""
    yield from launches()
    for shape in SHAPES[: options.shapes]:
        base = {tokens: dense(shape, tokens) for tokens in (1, 8, 16, 32, 64, 128, 256, 512, 2048)}
        yield from weight_only(shape, base)
        yield from integers(shape, base)
        yield from floats(shape, base)
        yield from codebooks(shape, base)
        yield from others(shape, base)
    yield from norms()
    yield from rounding()
    for row in kernel_caches.rows():
        yield Row(*row)


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--no-models", action="store_true", help="leave out kernel_models.py")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: nothing is measured. What needs none: make kernels-check")
    check()
    kernel_caches.check()
    bandwidth, rate = roofs()
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e12:.2f} TB/s, bf16 {rate / 1e12:.0f} TFLOP/s")
    found = []
    for row in measured(options):
        moved, done = row.cost.moved / row.seconds, row.cost.operations / row.seconds
        figures = {
            "microseconds": round(row.seconds * 1e6, 1),
            "of_bandwidth": round(moved / bandwidth, 3),
            "of_rate": round(done / rate, 3),
            "times_bf16": round(row.beside / row.seconds, 2) if row.beside else None,
        }
        found.append(asdict(row) | figures)
        print(f"{row.name:24} {row.shape!s:16} M={row.tokens:<6} {figures}", flush=True)
    whole = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "copy_bytes_per_second": bandwidth,
        "bf16_operations_per_second": rate,
        "rows": found,
    }
    RESULTS.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if not options.no_models:
        subprocess.run([sys.executable, str(Path(__file__).with_name("kernel_models.py"))], check=True)


if __name__ == "__main__":
    main()
