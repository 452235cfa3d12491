"""Folders and files that appear complete or not at all: written beside their place, forced to disk, then moved."""

import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh folder to fill; when the block ends well it stands at `target`, in the place of what was there.

    A crash leaves the old folder or the new one, and perhaps a hidden sibling that the next `recover` removes; a
    block that raises leaves everything as it was. Raises OSError where the file system refuses.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    fresh = _sibling(target, "new")
    fresh.mkdir()
    try:
        yield fresh
        _flush(fresh)
        _move(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # after an exchange it holds the old folder
    _flush_one(target.parent)


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """The path of a fresh file to write; when the block ends well it stands at `target`, whatever was there.

    A block that raises leaves everything as it was. Raises OSError where the file system refuses.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _sibling(target, "new")
    try:
        yield fresh
        _flush_one(fresh)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)
    _flush_one(target.parent)


def recover(target: Path) -> None:
    """Clean up after processes that died while replacing `target`, and put back an old folder they had set aside."""
    target = target.resolve()
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-[0-9a-f]+\.(new|old)")
    if not target.parent.is_dir():
        return
    for sibling in list(target.parent.iterdir()):
        match = pattern.fullmatch(sibling.name)
        if not match or psutil.pid_exists(int(match[1])):
            continue
        if match[2] == "old" and not target.exists():
            sibling.rename(target)
        else:
            shutil.rmtree(sibling, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.{kind}"


def _move(fresh: Path, target: Path) -> None:
    """Put `fresh` at `target`; what was there is afterwards at `fresh`, or gone."""
    if not target.exists():
        fresh.rename(target)
    elif not _exchange(fresh, target):
        aside = _sibling(target, "old")
        target.rename(aside)
        try:
            fresh.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _flush(folder: Path) -> None:
    """Force a folder and everything in it to disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush_one(Path(parent, name))
        _flush_one(Path(parent))


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
