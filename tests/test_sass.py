"""Kernels compile for GPUs that are not there, and their machine code keeps to its budget."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from qcompiler.kernels.cost import H200
from qcompiler.kernels.sass import Build, Reading, main_loop

ROOT = Path(__file__).parent.parent


def compiled(only: str, *targets: int) -> subprocess.CompletedProcess[str]:
    """What benchmarks/sass.py says of some kernels, in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/sass.py", "--keep", "--only", only, "--targets", *map(str, targets)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", [80, 90, 100])
def test_a_representative_set_keeps_its_budget(target: int) -> None:
    found = compiled("linear_wq int4:g128:asym fp16 14336x4096 M=16", target)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "nothing wrong" in found.stdout


@pytest.mark.parametrize(
    "name",
    [
        "linear_wq int3:g128:asym fp16 4096x4096 M=16",
        "linear_w4a8 run=128 int8:token:dynamic 14336x4096 M=16",
        "attention_kvq int4:token* fp16 d=128 group=8",
        "append_blocks *",
    ],
)
def test_blackwell_too(name: str) -> None:
    found = compiled(name, 100)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_every_width_keeps_its_budget_on_hopper(bits: int) -> None:
    found = compiled(f"linear_wq int{bits}:g128:*sym fp16 14336x4096 M=16", 90)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    "name",
    [
        "linear_w4a8*run=128 int8:token*dynamic 14336x4096 M=16",
        "linear_w4f8 run=128 * M=16",
        "quantize int8:g128:asym *",
        "linear_nf4 nf4:g64:sym fp16 14336x4096 M=16",
        "linear_gguf Q?_K fp16 14336x4096 M=16",
        "attention_kvq int[34]:token* fp16 d=128 group=8",
    ],
)
def test_other_kernels_keep_theirs(name: str) -> None:
    found = compiled(name, 90)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_page_says_what_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = importlib.import_module("kernels_page")
    found = json.loads((ROOT / "benchmarks" / "results" / "sass.json").read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.page(found), "make kernels-check writes docs/kernels.md"


def test_the_page_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = importlib.import_module("kernels_page")
    assert page.measured(tmp_path).startswith("Not measured")
    row = {"name": "W4A16", "shape": [256, 512], "tokens": 1, "microseconds": 2.5}
    rows = [row | {"of_bandwidth": 0.5, "of_rate": 0.1, "times_bf16": None}]
    (tmp_path / "kernels.json").write_text(json.dumps({"gpu": "A GPU", "rows": rows}), encoding="utf-8")
    assert page.measured(tmp_path).endswith("| W4A16 | 256x512 | 1 | 2.5 | 0.5 | 0.1 |  |\n")
    models = [{"model": "1B", "batch": 1, "recipe": "W4A16", "tokens_per_second": 10.5, "times_bf16": 1.5}]
    (tmp_path / "kernel_models.json").write_text(json.dumps({"gpu": "A GPU", "rows": models}), encoding="utf-8")
    assert page.measured(tmp_path).endswith("| 1B | 1 | W4A16 | 10.5 | 1.5 |\n")


def test_faults_are_named() -> None:
    build = Build("some", None, {}, {}, handled=128, budget=2.0)
    spoilt = Reading(255, 8, 10**6, 300, 2.5, 0, 3)
    assert spoilt.faults(build, H200) == [
        "8 bytes of registers spilled",
        "1000000 bytes of shared memory, of 232448",
        "2.5 instructions per weight, more than 2.0",
        "no tensor core instruction in the loop",
        "3 conversions from integers in the loop",
    ]
    assert Reading(255, 0, 200000, 250, 1.9, 16, 0).faults(replace(build, warps=8), H200) == [
        "200000 bytes of shared memory leave no room for a second program",
        "255 registers leave no room for a second program",
    ]
    assert not Reading(90, 0, 40000, 250, 1.9, 16, 0).faults(build, H200)


def test_waits_behind_the_end_of_blackwells_programs_are_no_loop() -> None:
    whole = [".L_x_1:", "A", "B", "BRA.U UP0, `(.L_x_1)", ".L_x_2:", "C", "EXIT", "D", "BRA `(.L_x_2)"]
    listing = "\n".join(line if line.startswith(".") else f"/*0000*/ {line} ;" for line in whole)
    assert main_loop(listing) == ["A", "B", "BRA.U UP0, `(.L_x_1)"]
