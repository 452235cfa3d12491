"""GGUF, written: a program's tensors in the place of those of the file it came from, or of the file it would be.

Tokenizer, metadata and the names of tensors are the source's, or made from a transformers folder (gguf_model.py); the
rows of queries and keys go back to the order in which llama.cpp wants them; codes are moved, never computed.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler import atomic
from qcompiler.errors import InputError, No, require
from qcompiler.formats import gguf_types
from qcompiler.formats.checkpoint import Format
from qcompiler.formats.gguf import GgufFile
from qcompiler.formats.gguf_model import outline
from qcompiler.formats.gguf_names import processor_of, row_order
from qcompiler.formats.joined import members
from qcompiler.ops import qc
from qcompiler.program import Program
from qcompiler.scheme import QTensor

FLOATS = {"F32": torch.float32, "F16": torch.float16}
# What another graph computes than the one that llama.cpp builds from the architecture's name.
FOREIGN: dict[Any, str] = {
    qc.fake_quantize: "rounded activations",
    qc.integer_linear: "rounded activations",
    qc.hadamard: "rotations at run time",
    qc.reordered_norm: "reordered channels",
}


def write(program: Program, path: str | os.PathLike[str], *, floats: str = "F32") -> dict[str, str]:
    """Write a program that came from a GGUF file or a transformers folder, and return the type of each tensor by name.

    `floats` is the type of matrices that are not quantized, F32 or F16. The file stands at `path` complete or not at
    all. Raises InputError for a program that came from elsewhere, or that such a file cannot hold; its text names the
    tensor and says why.
    """
    if floats not in FLOATS:
        raise InputError(f'floats="{floats}" is none of {", ".join(FLOATS)}')
    file, names = _source(program)
    _check_graph(program, names)
    plan = list(_plan(program, file, names, floats))
    gguf = require("gguf", "gguf")
    with atomic.replacing_file(Path(path)) as fresh:
        writer = gguf.GGUFWriter(None, file.architecture)
        _add_metadata(writer, file, _file_type(program, plan))
        for item in plan:
            writer.add_tensor_info(
                item.name, item.byte_shape, np.dtype(np.uint8), item.nbytes, gguf.GGMLQuantizationType[item.kind]
            )
        writer.write_header_to_file(fresh)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in plan:
            writer.write_tensor_data(item.data())
        writer.close()
    return {item.name: item.kind for item in plan}


def compare(program: Program, path: str | os.PathLike[str]) -> None:
    """Read a file that `write` wrote with the decoder of the package gguf; InputError for a value that differs."""
    written = GgufFile.read(Path(path))
    for item in _plan(program, *_source(program), "F32"):
        values = item.value.dequantize() if isinstance(item.value, QTensor) else item.value
        values = values.float() if item.order is None else values[item.order].float()
        found = torch.from_numpy(np.array(written.floats(item.name)))
        if found.shape != values.shape or not torch.allclose(found, values, rtol=1e-6, atol=0):
            raise InputError(f'verification failed: "{item.name}" does not have the values it had; please report this')


@dataclass(frozen=True, eq=False)
class Item:
    """One tensor to write: a record in GGUF's form or floats, as transformers has it, and the order of its rows."""

    name: str
    kind: str
    value: Tensor | QTensor
    order: Tensor | None

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape of the stored bytes, outermost axis first."""
        *outer, last = self.value.shape
        kind = gguf_types.KINDS.get(self.kind)
        return (*outer, last // kind.block * kind.nbytes if kind else last * FLOATS[self.kind].itemsize)

    @property
    def nbytes(self) -> int:
        """How many bytes are stored."""
        return math.prod(self.byte_shape)

    def data(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The stored bytes, uint8."""
        if isinstance(self.value, Tensor):
            rows = self.value if self.order is None else self.value[self.order]
            return rows.detach().to(FLOATS[self.kind]).contiguous().view(-1).view(torch.uint8).numpy()
        record = self.value if self.order is None else self.value.take(self.order)
        answer = gguf_types.encode(record)
        if isinstance(answer, No):
            raise _refused(self.name, answer)
        return answer[1].contiguous().view(-1).numpy()


def _source(program: Program) -> tuple[GgufFile, dict[str, str]]:
    """The file the program came from, or the outline of one; and the program's names of its tensors."""
    if "gguf" not in program.info:
        return outline(program)
    path = Path(program.info["gguf"]["file"])
    if not path.is_file():
        raise InputError(f'"{path}", from which metadata and tokenizer would be taken, is gone; put it back')
    return GgufFile.read(path), program.info["gguf"]["names"]


def _check_graph(program: Program, names: Mapping[str, str]) -> None:
    """Refuse what llama.cpp's graph of this architecture does not compute, and weights it has no name for."""
    for node in program.calls(*FOREIGN):
        raise InputError(
            f'node "{node.name}" is {FOREIGN[node.target]}, which llama.cpp\'s graph has no place for; '
            "use a recipe that quantizes weights only"
        )
    named = set(names.values())
    aten = torch.ops.aten
    for node in program.calls(aten.linear.default, aten.embedding.default, qc.linear, qc.embedding):
        for name in _tensors_of(node):
            known = {name, *program.info.get("fused", {}).get(name, {})}
            if not known & named:
                raise InputError(f'"{name}" has no name in the GGUF file: a pass made it; leave that pass out')


def _tensors_of(node: Any) -> list[str]:
    """The names of the weights that a call reads."""
    sources = [n for n in node.all_input_nodes if n.op == "get_attr"]
    return [name for n in sources if not (name := str(n.target).partition("::")[0]).endswith("bias")]


def _plan(program: Program, file: GgufFile, names: Mapping[str, str], floats: str) -> Iterator[Item]:
    """What to write for each tensor of the source, in its order."""
    found, processor = dict(members(program)), processor_of(file)
    for name, stored in file.tensors.items():
        if name not in names:  # rope_freqs and the like, which no pass touches
            yield Item(name, "F32", torch.from_numpy(np.array(file.floats(name))), None)
            continue
        value = found.get(names[name])
        if value is None or tuple(value.shape) != stored.shape:
            what = "is gone" if value is None else f"has become {list(value.shape)}"
            raise InputError(f'tensor "{name}" ({names[name]}) {what}: a pass of the recipe did that; leave it out')
        order = row_order(processor, name, stored.shape[0])
        if isinstance(order, No):
            raise _refused(name, order)
        back = None if np.array_equal(order, np.arange(len(order))) else torch.from_numpy(np.argsort(order))
        if isinstance(value, Tensor):
            yield Item(name, floats if value.dim() > 1 else "F32", value, back)
            continue
        record = gguf_types.in_form(value)
        if isinstance(record, No):
            raise _refused(name, record)
        yield Item(name, str(gguf_types.kind_of(record)), record, back)


def _refused(name: str, no: No) -> InputError:
    return InputError(f'tensor "{name}" cannot be written to a GGUF file: {no.reason}')


def _add_metadata(writer: Any, file: GgufFile, file_type: int) -> None:
    """The source's pairs with their types, but for what says how tensors are stored."""
    gguf = require("gguf", "gguf")
    for key, value in file.metadata.items():
        kind, inner = (None if number is None else gguf.GGUFValueType(number) for number in file.types[key])
        if key.startswith("split.") or key in ("general.architecture", "general.alignment", "general.file_type"):
            continue
        writer.add_key_value(key, value, kind, inner)
    writer.add_file_type(file_type)
    if "general.quantization_version" not in file.metadata:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _file_type(program: Program, plan: list[Item]) -> int:
    """llama.cpp's number for the mixture, or for the type that most values have."""
    types = require("gguf", "gguf").LlamaFileType
    count: Counter[str] = Counter()
    for item in plan:
        count[item.kind] += math.prod(item.value.shape)
    most = count.most_common(1)[0][0]
    names = (program.info.get("gguf_mixture", ""), most, f"{most}_M", f"{most}_MOE")
    found = [kind for name in names for kind in types if kind.name in (f"MOSTLY_{name}", f"ALL_{name}")]
    return int(found[0] if found else types.GUESSED)


def _detect(path: Path) -> bool | No:
    return path.suffix.lower() == ".gguf" or No(f'"{path}" does not end in .gguf')


def _holds(weight: QTensor) -> bool | No:
    record = gguf_types.in_form(weight)
    return record if isinstance(record, No) else True


FORMATS = (
    Format(
        "gguf",
        _detect,
        holds=_holds,
        conditions="blocks of 32 or 256 along rows (Q4_0 to Q8_0, Q2_K to Q6_K, IQ4); models that came from a "
        "GGUF file, and llama, mistral, qwen2 and qwen3 folders with a byte-level BPE tokenizer",
        write_program=write,
        compare=compare,
    ),
)
