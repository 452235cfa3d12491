"""Compile every kernel for GPUs that are not there, and count what their machine code says.

    make kernels-check                          # all of them, into results/sass.json and docs/kernels.md
    python benchmarks/sass.py --only 'int4*M=1' --targets 90 --keep    # some, and nothing written

A kernel fails if it spills registers, converts integers in its main loop, leaves the tensor cores idle, or takes more
instructions for a weight than its budget; or more than the file says that it took.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.6 to 3.9 do without being told

import kernels_page
import triton

from qcompiler.kernels import (
    attention_floats,
    attention_kvq,
    dequantize_wq,
    kv_append,
    kv_window,
    linear_a8,
    linear_float8,
    linear_gguf,
    linear_nf4,
    linear_wq,
    norm_quantize,
    quantize,
)
from qcompiler.kernels.cost import DEVICES, Device
from qcompiler.kernels.sass import Build, Reading, compile_and_read

RESULTS = Path(__file__).parent / "results" / "sass.json"
MODULES = (
    linear_wq,
    linear_nf4,
    linear_gguf,
    linear_a8,
    linear_float8,
    norm_quantize,
    quantize,
    attention_kvq,
    attention_floats,
    kv_append,
    kv_window,
    dequantize_wq,
)
SLACK = 1.02  # of instructions for a weight, between two versions of ptxas


def faults(build: Build, device: Device, reading: Reading, before: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a reading, in itself and beside the one in the file."""
    yield from reading.faults(build, device)
    if before and reading.instructions_per_weight > before["instructions_per_weight"] * SLACK:
        yield f"{reading.instructions_per_weight} instructions per weight, {before['instructions_per_weight']} before"


def read(options: argparse.Namespace, saved: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The readings by name and target, printed as they come, and what is wrong with them."""
    readings: dict[str, dict[str, Any]] = {}
    wrong = []
    wanted = [device for device in DEVICES if device.capability in options.targets]
    for device, module in itertools.product(wanted, MODULES):
        target = f"sm_{device.capability}"
        for build in module.builds(device):
            if not fnmatch(build.name, options.only):
                continue
            reading = compile_and_read(build, device)
            readings.setdefault(build.name, {})[target] = asdict(reading)
            before = saved.get(build.name, {}).get(target, {})
            wrong += [f"{build.name} {target}: {fault}" for fault in faults(build, device, reading, before)]
            print(
                f"{build.name:66} {target:6} {reading.instructions_per_weight:6.2f} per weight {reading.registers:4}"
                f" registers {reading.spills:4} spilled {reading.shared_bytes:7} shared",
                flush=True,
            )
    return readings, wrong


def main() -> int:
    """Compile, print a table, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="names to compile, as a pattern of file names")
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities; 90 is 9.0")
    parser.add_argument("--keep", action="store_true", help="write nothing")
    options = parser.parse_args()
    whole = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    saved = whole.get("kernels", {}) if whole.get("triton") == triton.__version__ else {}  # another compiles otherwise
    readings, wrong = read(options, saved)
    print("\n".join(wrong) or f"{len(readings)} kernels: nothing wrong")
    if not options.keep and not wrong:
        kept = saved if options.only != "*" else {}
        merged = kept | {name: kept.get(name, {}) | found for name, found in readings.items()}
        whole = {"triton": triton.__version__, "kernels": merged}
        RESULTS.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        kernels_page.PAGE.write_text(kernels_page.page(whole), encoding="utf-8")
    return 1 if wrong or not readings else 0


if __name__ == "__main__":
    sys.exit(main())
