"""The manifest of an artifact: what the folder holds, and whether it still does."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qcompiler.errors import InputError

FORMAT = "qcompiler artifact"
VERSION = 1
MANIFEST, GRAPH, REPORT = "manifest.json", "graph.json", "report.json"

# Files up to this size are always read and compared with their hash; of larger ones only the size, unless asked.
SMALL = 64 * 2**20

_KEYS: Mapping[str, type] = {
    "model": str,
    "recipe": str,
    "backend": str,
    "info": dict,
    "shards": list,
    "tied": dict,
    "tokenizer_files": list,
    "backend_files": list,
    "files": dict,
}


def write(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write the manifest of what `folder` holds by now: `fields`, and size and hash of every other file."""
    others = [name for name in names(folder) if name != MANIFEST]
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in others}
    found = {"format": FORMAT, "version": VERSION, **fields, "files": files}
    (folder / MANIFEST).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def names(folder: Path) -> list[str]:
    """Every file below `folder`, by its path from there, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`; InputError if there is none, or one that is damaged or of another format."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f'"{folder}" does not exist or is no folder; give a folder that qcompiler wrote')
    if not path.is_file():
        raise InputError(f'"{folder}" is not a qcompiler artifact: it has no {MANIFEST}; give a folder qcompiler wrote')
    try:
        found = json.loads(text(path))
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f'"{folder}" is not a qcompiler artifact: its {MANIFEST} is that of something else')
    if found.get("version") != VERSION:
        raise InputError(
            f'"{folder}" has format version {found.get("version")}, this qcompiler reads {VERSION}; '
            "use the qcompiler that wrote it, or compile the model again"
        )
    _check_keys(path, found)
    return found


def _check_keys(path: Path, found: Mapping[str, Any]) -> None:
    for key, kind in _KEYS.items():
        if not isinstance(found.get(key), kind):
            raise damaged(path, f'its "{key}" is missing or wrong')
    listed = set(found["files"])
    for name in (GRAPH, REPORT, *found["shards"], *found["backend_files"]):
        if not isinstance(name, str) or name not in listed:
            raise damaged(path, f'it does not list "{name}"')
    for name in listed:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise damaged(path, f'it names "{name}", which is outside the folder')


def check(folder: Path, manifest: Mapping[str, Any], everything: bool = False) -> None:
    """Compare the files with the manifest: size, and hash if small (or asked for `everything`).

    Raises InputError that names the first file that is missing or damaged.
    """
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise damaged(path, "it is missing")
        size = path.stat().st_size
        if not isinstance(expected, dict) or size != expected.get("bytes"):
            raise damaged(path, f"it has {size} bytes, not as many as when it was written")
        if (everything or size <= SMALL) and _sha256(path) != expected.get("sha256"):
            raise damaged(path, "its content is not what was written")


def text(path: Path) -> str:
    """The text of a file; InputError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, why: object) -> InputError:
    """The error for a file of an artifact that cannot be used."""
    return InputError(f'"{path}" is damaged: {why}; copy or write the artifact again')


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
