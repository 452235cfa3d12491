"""What the peer scripts share: a clean standard output for their JSON line, and memory readings."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO


def claim_stdout() -> TextIO:
    """Keep the real standard output for the result and send everything else printed to standard error."""
    result = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return result


def memory_mb(field: str) -> float:
    """A memory field of /proc/self/status (VmRSS, VmHWM, RssAnon) in MB; NaN where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith(field + ":")), float("nan"))


def reset_peak_memory() -> bool:
    """Restart VmHWM from the present size; says whether the kernel allowed it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
