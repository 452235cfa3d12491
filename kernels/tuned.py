"""Tuned configurations: what was measured to be fastest on one GPU, for one version of Triton and of a kernel's source.

Nothing is tried out when a kernel is first called: a rule gives its configuration, unless a file of this GPU has a
measured one. Files are read from the folder `tuned` beside this module, and from the user's own, which `qcompiler tune`
writes. An entry made with another version of Triton, or from another source, counts for nothing.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcompiler.kernels.split import Config

SHIPPED = Path(__file__).parent / "tuned"
SOURCES = ("linear_wq", "planes", "split")  # modules that the machine code of linear_wq comes from


def user_folder() -> Path:
    """Where a user's own measurements are kept: in the folder for caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "qcompiler" / "tuned"


def key_of(scheme: object, shape: tuple[int, int], tokens: int) -> str:
    """The name of a case; `tokens` is the size of the block that holds them.

    >>> key_of("int4:g128:sym", (4096, 14336), 16)
    'int4:g128:sym 4096x14336 M=16'
    """
    return f"{scheme} {shape[0]}x{shape[1]} M={tokens}"


def find(gpu: str, key: str) -> Config | None:
    """The measured configuration of a case on a GPU, if there is one that counts."""
    entry = _table(gpu, user_folder()).get(key)
    return Config(**entry["config"]) if entry else None


def save(gpu: str, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Add entries {key: {"config": Config, ...}} to the user's file of a GPU, and return its path."""
    path = user_folder() / file_name(gpu)
    known = _read(path)["entries"]
    fresh = {key: {**entry, "config": asdict(entry["config"])} for key, entry in entries.items()}
    whole = {"gpu": gpu, **stamp(), "entries": known | fresh}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    _table.cache_clear()
    return path


def stamp() -> dict[str, str]:
    """What entries depend on beside the GPU: the version of Triton, and a hash of the kernel's source."""
    import triton

    digest = hashlib.blake2b(digest_size=8)
    for name in SOURCES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return {"triton": triton.__version__, "source": digest.hexdigest()}


def file_name(gpu: str) -> str:
    """The file of a GPU.

    >>> file_name("NVIDIA H200")
    'nvidia-h200.json'
    """
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@functools.cache
def _table(gpu: str, own: Path) -> dict[str, Any]:
    """All entries that count, the user's before those that ship."""
    name = file_name(gpu)
    entries: dict[str, Any] = _read(SHIPPED / name)["entries"] | _read(own / name)["entries"]
    return entries


def _read(path: Path) -> dict[str, Any]:
    """A file's content; no entries where there is none, or where it was made for something else."""
    if not path.is_file():
        return {"entries": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if {key: found.get(key) for key in stamp()} == stamp() else {"entries": {}}
