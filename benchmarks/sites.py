"""How long finding the symmetry sites of SmolLM2-135M (30 layers) takes, and what a sweep holds in memory.

    python benchmarks/sites.py

Writes results/sites.json: seconds for each kind of transform (the bar is 2 s), and by how much the peak memory of one
calibration sweep grows from 8 to 128 batches of 8 x 256 tokens, each in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from common import canonical, write

from qcompiler.calibration import sweep
from qcompiler.passes.statistics import AbsMax
from qcompiler.report import Meter
from qcompiler.sites import Kind, find
from qcompiler.source import resolve

BAR = 2.0
BATCHES = (8, 64, 128)
DEPTH = 3  # blocks that are swept: the others would hold no more


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=int, help="only sweep so many batches, and print the peak memory in MB")
    options = parser.parse_args()
    program, _ = canonical(resolve("demo").model)
    if options.sweep:
        ids = torch.randint(0, 4096, (options.sweep, 8, 256), generator=torch.Generator().manual_seed(0))
        needs = {node.name: AbsMax() for node in program.linears()}
        with Meter() as meter:
            for segment in sweep(program, [{"input_ids": batch} for batch in ids], lambda nodes: needs, changes=False):
                if segment.index == DEPTH:
                    break
        print(json.dumps(meter.peak_rss_mb))
        return
    figures: dict[str, Any] = {"bar_seconds": BAR, "sites": {}}
    for kind in Kind:
        start = time.perf_counter()
        found = find(program, kind)
        seconds = time.perf_counter() - start
        figures["sites"][kind.value] = {"sites": len(found), "seconds": round(seconds, 2), "met": seconds < BAR}
    command = [sys.executable, __file__, "--sweep"]
    for batches in BATCHES:
        done = subprocess.run([*command, str(batches)], stdout=subprocess.PIPE, text=True, check=True)
        figures[f"sweep_{batches}_batches_peak_mb"] = round(json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps(figures, indent=1))
    print("written to", write("sites", figures))


if __name__ == "__main__":
    main()
