"""What every benchmark shares: the stamp of machine, versions and date, and where results go."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from qcompiler.report import versions

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does; the peers inherit it

RESULTS = Path(__file__).parent / "results"


def stamp() -> dict[str, Any]:
    """The machine, the versions and the date of a measurement."""
    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                flags = " avx512_vnni" if "avx512_vnni" in info.read_text() else ""
                return line.partition(":")[2].strip() + flags
    return platform.processor()


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write figures, stamped, to results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(stamp() | figures, indent=1) + "\n", encoding="utf-8")
    return path
