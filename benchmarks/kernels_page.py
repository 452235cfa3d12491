"""docs/kernels.md: what each kernel accepts, what its machine code says, and what was measured on a GPU."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qcompiler.kernels import linear_a8, linear_float8, linear_gguf, linear_nf4, linear_wq
from qcompiler.target import Kernel

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "kernels.md"
KERNELS: tuple[Kernel, ...] = (
    linear_wq.KERNEL,
    linear_nf4.KERNEL,
    linear_gguf.KERNEL,
    linear_a8.W4A8,
    linear_a8.W8A8,
    linear_float8.W4F8,
    linear_float8.W8F8,
)
TARGETS = {"sm_80": "A100", "sm_90": "H100, H200", "sm_100": "B200"}

INTRODUCTION = """# Kernels

Written by `make kernels-check` (benchmarks/sass.py); do not edit.

Triton kernels, one idea to a file in `kernels/`. Their tests run the very code that a GPU gets in Triton's interpreter,
against the meanings in `qcompiler/ops.py`.

## What they accept

A kernel answers for each weight, and a no says which of these conditions was not met. Those of fp8 need compute
capability 8.9.

"""
CODE = """
## What their machine code says

Instructions for each weight in the main loop (of a kernel without a loop: for each number in all of it), registers and
bytes of shared memory. Nothing may be spilled, no integer converted in a loop with a budget, and `make kernels-check`
fails if a number gets worse. Compiled without a GPU by Triton {triton}.

"""
SPEED = """
## Speed

"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    names = list(head)
    lines = [names, ["---"] * len(names), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def accepted() -> str:
    """The support matrix, from the acceptance parts themselves."""
    rows = [[f"`{kernel.name}`", f"`qc.{kernel.op}`", f"`{kernel.accepts}`"] for kernel in KERNELS]
    rows.append(
        ["`attention_kvq`", "`qc.cached_attention`", "caches of `int3`, `int4`, `int8` or `nf4` (`kv_cache.suits`)"]
    )
    return table(["kernel", "of", "accepts"], rows)


def machine_code(kernels: dict[str, Any]) -> str:
    """Instructions, registers and shared bytes by target."""
    rows = []
    for name, readings in kernels.items():
        cells = [
            f"{found['instructions_per_weight']:.2f}, {found['registers']}, {found['shared_bytes']}" if found else ""
            for found in (readings.get(target, {}) for target in TARGETS)
        ]
        rows.append([f"`{name}`", *cells])
    return table(["configuration", *TARGETS.values()], rows)


def measured(results: Path = HERE / "results") -> str:
    """What benchmarks/kernels.py wrote, if it ever ran on a GPU, and kernel_models.py."""
    path = results / "kernels.json"
    if not path.is_file():
        return "Not measured: no GPU was at hand. `python benchmarks/kernels.py` measures on the one it finds.\n"
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            row["name"],
            "x".join(map(str, row["shape"])),
            str(row["tokens"]),
            str(row["microseconds"]),
            str(row["of_bandwidth"]),
            str(row["of_rate"]),
            str(row["times_bf16"] or ""),
        ]
        for row in found["rows"]
    ]
    head = ["kernel", "layer", "tokens", "us", "of a copy's bandwidth", "of bf16's rate", "times bf16's speed"]
    return f"On {found['gpu']}.\n\n{table(head, rows)}{decoding(results / 'kernel_models.json')}"


def decoding(path: Path) -> str:
    """Tokens a second of whole models, if they were measured."""
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [row["model"], str(row["batch"]), row["recipe"], str(row["tokens_per_second"]), str(row["times_bf16"])]
        for row in found["rows"]
    ]
    head = ["Llama of", "sequences", "as", "tokens a second", "times bf16's"]
    introduction = f"Whole models of random weights, decoding on {found['gpu']}, beside bf16 under `torch.compile`:"
    return f"\n{introduction}\n\n{table(head, rows)}"


def page(sass: dict[str, Any]) -> str:
    """The whole page."""
    code = CODE.format(triton=sass["triton"]) + machine_code(sass["kernels"])
    return INTRODUCTION + accepted() + code + SPEED + measured()
