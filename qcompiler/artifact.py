"""Artifact: a compiled model as a folder, written in one step, read memory-mapped, without pickle.

| file | holds |
|---|---|
| `manifest.json` | format version, model, recipe, backend, schemes, versions, signature, size and hash of every file |
| `graph.json` | the graph (graph_json.py) |
| `model*.safetensors` | the tensors, quantized ones as their canonical parts |
| `report.json`, `report.html` | what was done; the page is for people and is never read back |
| tokenizer files | as transformers writes them |
| any other | what the backend made for itself, for example `model.onnx` |
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

from torch import Tensor

from qcompiler import atomic, graph_json, html, manifest
from qcompiler.errors import InputError
from qcompiler.formats import safetensors
from qcompiler.manifest import GRAPH, MANIFEST, REPORT, damaged
from qcompiler.program import Program, Type
from qcompiler.report import Report, versions


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: its folder, manifest, program (tensors memory-mapped) and report."""

    folder: Path
    manifest: Mapping[str, Any]
    program: Program
    report: Report


# -- writing -------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    program: Program,
    report: Report,
    *,
    recipe: str,
    backend: str,
    files: Path | None = None,
    tokenizer: Any = None,
    shard_bytes: int = 2 * 10**9,
) -> None:
    """Write `program` as an artifact at `folder`, in the place of the artifact that is there, if any.

    `program.codes`, which only passes of the same compilation use, are not kept.
    `files` is a folder of what the backend made, or another artifact, of which the backend's files are taken; they are
    hard-linked or copied. `tokenizer` is anything with `save_pretrained(folder)`. Raises InputError for a folder that
    holds something else, a program that cannot be saved, or no space left; everything is then as it was.
    """
    _check_target(folder)
    program.verify()
    _check_info(program.info, "info")
    graph = graph_json.dump(program)
    tied = safetensors.same_memory(program.tensors)
    own = {name: tensor for name, tensor in program.tensors.items() if name not in tied}
    try:
        with atomic.replacing(folder) as fresh:
            shards = safetensors.write(fresh, own, shard_bytes)
            (fresh / GRAPH).write_text(graph, encoding="utf-8")
            report.save(fresh / REPORT)
            (fresh / "report.html").write_text(html.page(report), encoding="utf-8")
            fields = {
                "model": report.model,
                "recipe": recipe,
                "backend": backend,
                "schemes": dict(Counter(json.loads(spec)["scheme"] for spec in program.quantized.values())),
                "versions": versions(),
                "inputs": {i.name: str(i.type) for i in program.inputs},
                "outputs": _outputs(program),
                "info": program.info,
                "shards": shards,
                "tied": tied,
                "tokenizer_files": _save_tokenizer(tokenizer, fresh),
                "backend_files": _take_files(files, fresh),
            }
            manifest.write(fresh, fields)
    except OSError as error:
        raise InputError(_why_not_written(folder, error, program.nbytes)) from error


def _check_target(folder: Path) -> None:
    if not folder.exists() or is_artifact(folder):
        return
    if not folder.is_dir():
        raise InputError(f'"{folder}" is a file; an artifact is a folder: give the name of a new one')
    if any(folder.iterdir()):
        raise InputError(
            f'"{folder}" exists and is not a qcompiler artifact; give the name of a new folder, or remove this one'
        )


def _check_info(value: Any, where: str) -> None:
    """InputError, naming the key, for what JSON cannot hold (tuples come back as lists)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InputError(f"program.{where} has the key {key!r}; keys must be texts to be saved")
            _check_info(inner, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            _check_info(inner, f"{where}[{i}]")
    elif isinstance(value, float) and not abs(value) < float("inf"):
        raise InputError(f"program.{where} is {value}, which JSON cannot hold; use None or a text")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise InputError(f"program.{where} is a {type(value).__name__}; info is JSON: texts, numbers, lists, dicts")


def _outputs(program: Program) -> dict[str, str]:
    """The outputs' types, as text."""
    nodes = program.output_node.args[0]
    assert isinstance(nodes, (tuple, list))
    found = {}
    for name, node in zip(program.outputs, nodes, strict=True):
        kind = getattr(node, "meta", {}).get("type")
        found[name] = str(kind) if isinstance(kind, Type) else ""
    return found


def _save_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    """The names of the files that the tokenizer wrote."""
    if tokenizer is None:
        return []
    before = set(manifest.names(folder))
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:  # tokenizers raises plain Exceptions
        raise InputError(f"the tokenizer could not be saved: {error}") from error
    return [name for name in manifest.names(folder) if name not in before]


def _take_files(source: Path | None, folder: Path) -> list[str]:
    """Hard-link or copy the backend's files into `folder`; returns their names."""
    if source is None or not source.is_dir():
        return []
    names = manifest.read(source)["backend_files"] if is_artifact(source) else manifest.names(source)
    for name in names:
        place = folder / name
        if place.exists() or name == MANIFEST:
            raise InputError(f'the backend made a file "{name}", a name the artifact needs itself; rename it')
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, place)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(source / name, place)
    return list(names)


def _why_not_written(folder: Path, error: OSError, nbytes: int) -> str:
    if error.errno in (ENOSPC, EDQUOT):
        return (
            f'no space left to write "{folder}", whose tensors alone take {nbytes / 1e6:.0f} MB; '
            "free some or choose another disk (nothing was left behind)"
        )
    return f'"{folder}" cannot be written: {error.strerror or error}; choose another folder'


# -- reading -------------------------------------------------------------------------------------------------


def is_artifact(folder: Path) -> bool:
    """Whether `folder` holds the manifest of an artifact; the other files are not looked at."""
    try:
        manifest.read(folder)
    except InputError:
        return False
    return True


def load(folder: Path, verify: bool = False) -> Artifact:
    """Read an artifact; tensors are memory-mapped.

    Every file must have the size that the manifest says, small files (all, with `verify`) also the hash. Raises
    InputError that names the file that is missing, damaged or not to be trusted.
    """
    if not folder.exists():
        atomic.recover(folder)
    found = manifest.read(folder)
    manifest.check(folder, found, everything=verify)
    return Artifact(folder, found, _load_program(folder, found), _load_report(folder / REPORT))


def tokenizer(folder: Path) -> Any:
    """The tokenizer saved with an artifact; None if there is none. Raises InputError if it cannot be read."""
    if not manifest.read(folder)["tokenizer_files"]:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise whatever they met
        raise InputError(f'the tokenizer in "{folder}" cannot be read: {error}') from error


def _load_program(folder: Path, found: Mapping[str, Any]) -> Program:
    tensors = _load_tensors(folder, found)
    try:
        program = graph_json.load(manifest.text(folder / GRAPH), tensors)
    except InputError as error:
        raise damaged(folder / GRAPH, error) from error
    program.info = found["info"]
    return program


def _load_tensors(folder: Path, found: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = safetensors.read(folder / name for name in found["shards"])
    for name, same in found["tied"].items():
        if same not in tensors:
            raise damaged(folder / MANIFEST, f'"{name}" is tied to "{same}", which does not exist')
        tensors[name] = tensors[same]
    return tensors


def _load_report(path: Path) -> Report:
    try:
        return Report.from_json(manifest.text(path))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
