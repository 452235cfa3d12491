"""What every benchmark shares: the stamp of machine, versions and date, and where results go."""

import datetime
import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcompiler import data
from qcompiler.compiler import calibration_writer, capture, tokenizer_of
from qcompiler.data import Calibration
from qcompiler.journal import Journal
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import build
from qcompiler.report import versions

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does; the peers inherit it

RESULTS = Path(__file__).parent / "results"
JOURNAL = Journal(Path(__file__).parent.parent / "build" / "journal")  # a benchmark that died goes on where it was


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


def canonical(model: str) -> tuple[Program, Any]:
    """A model as every method finds it, and its tokenizer."""
    program = capture(model)
    tokenizer = tokenizer_of(program)
    Runner(Context(), data.check_samples(program)).run(program, [build("canonicalize", {})])
    return program, tokenizer


def self_written(base: Program, calibration: Calibration) -> list[dict[str, Tensor]]:
    """The text that the model writes itself; kept in build/, since writing it takes minutes."""
    name = f"calibration-{base.fingerprint()}-{calibration.samples}x{calibration.length}-{calibration.seed}.safetensors"
    path = Path(__file__).parent.parent / "build" / name
    if path.is_file():
        ids = load_file(path)
        return [{"input_ids": ids[key]} for key in sorted(ids)]
    batches = data.load(calibration, calibration_writer(base, calibration))
    path.parent.mkdir(exist_ok=True)
    save_file({f"{i:04d}": batch["input_ids"] for i, batch in enumerate(batches)}, path)
    return [dict(batch) for batch in batches]


def results(name: str) -> dict[str, Any]:
    """The figures in results/<name>.json; empty where there is none yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def resumed(name: str, setting: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """What was measured before with the same setting, to go on from; with `fresh` nothing, nor any journal."""
    known = results(name)
    if fresh:
        shutil.rmtree(str(JOURNAL.folder), ignore_errors=True)
    return dict(setting) if fresh or any(known.get(key) != value for key, value in setting.items()) else known


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write figures, stamped, to results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    today = stamp()
    path.write_text(json.dumps(today | figures | today, indent=1) + "\n", encoding="utf-8")
    return path


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Put each text between the marks `<!-- name -->` and `<!-- end of name -->` of a page."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        text = f"{before}{begin}{table}\n{end}{after}"
    page.write_text(text, encoding="utf-8")
