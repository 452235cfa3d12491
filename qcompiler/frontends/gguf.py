"""GGUF files: the model through transformers' own reader of names and metadata, the codes as they are stored.

transformers takes most of its time for two things it does over and over: it walks the token lists of the header
one by one for each of configuration and model, and it builds its table of tensor names once for every module. Here
it sees the file's outline (the header without those lists), and a model without submodules; the answers are its own.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompiler.errors import CaptureError, InputError, No, require
from qcompiler.formats.gguf import GgufFile
from qcompiler.formats.gguf_names import row_order
from qcompiler.frontends import huggingface
from qcompiler.program import Program
from qcompiler.scheme import QTensor


def accepts(source: Any) -> bool | No:
    """True for the path of a .gguf file."""
    if not isinstance(source, (str, os.PathLike)):
        return No(f"a {type(source).__name__} is not a path")
    return Path(source).suffix.lower() == ".gguf" or No(f'"{source}" does not end in .gguf')


def capture(source: str | os.PathLike[str], example_inputs: Any = None) -> Program:
    """The Program of a GGUF file; `program.codes` holds the tensors whose stored codes a QTensor can hold.

    `program.info["tokenizer"]` says where `tokenizer` finds the tokenizer, `program.info["gguf"]` which tensor of the
    file is which of the program, for formats/gguf_write.py. Raises InputError for a file that is
    truncated, hostile or of an architecture transformers does not read, CaptureError if the program would not be
    the file's model.
    """
    if example_inputs is not None:
        raise InputError("a GGUF file is captured without example inputs; leave them out")
    path = Path(source)
    file = GgufFile.read(path)
    model, weights = load(file)
    program = huggingface.capture_model(model)
    names = _program_names(program, model)
    program.codes = {names[name]: record for name, record in weights.codes.items() if name in names}
    program.info |= {"frontend": "gguf", "source": str(path), "tokenizer": str(path.resolve())}
    places = {stored: names[name] for stored, name in weights.places.items() if name in names}
    program.info["gguf"] = {"file": str(path.resolve()), "names": places}
    return program


def tokenizer(path: str | os.PathLike[str]) -> Any:
    """The file's tokenizer, as a transformers tokenizer that can be saved as ordinary files."""
    require("gguf", "gguf")
    from transformers import AutoTokenizer

    file = GgufFile.read(Path(path))
    with _refused(file), _outline(file, keep=("tokenizer.",)) as outline:
        return AutoTokenizer.from_pretrained(outline.parent, gguf_file=outline.name)


def load(file: GgufFile) -> "tuple[nn.Module, _Weights]":
    """The float32 model of a GGUF file, and the tensors it was made of."""
    _check_counts(file)
    require("gguf", "gguf")
    from transformers import AutoModelForCausalLM
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    if file.architecture not in GGUF_CONFIG_MAPPING:
        known = ", ".join(sorted(GGUF_CONFIG_MAPPING))
        raise InputError(f'transformers does not read the GGUF architecture "{file.architecture}"; it reads {known}')
    config = _config(file)
    with _refused(file), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    weights = _Weights(file, empty)
    weights.read()
    weights.check()
    with _refused(file):
        config._name_or_path = file.path.stem
        model = type(empty).from_pretrained(None, config=config, state_dict=weights.tensors, dtype=torch.float32)
    weights.scale_rotary(model)
    return model.eval(), weights


def _check_counts(file: GgufFile) -> None:
    """Refuse layer and expert counts for which the file holds no tensors: they would cost memory and hours."""
    if not file.tensors:
        raise InputError(f'"{file.path}" holds no tensors (architecture "{file.architecture}")')
    limits = {"block_count": len(file.tensors), "expert_count": max(max(t.shape) for t in file.tensors.values())}
    for key, limit in limits.items():
        value = file.metadata.get(f"{file.architecture}.{key}", 0)
        if not isinstance(value, int) or not 0 <= value <= limit:
            raise InputError(f'"{file.path}": {file.architecture}.{key} is {value!r}, but the tensors allow {limit}')


def _config(file: GgufFile) -> Any:
    """transformers' configuration for the file."""
    from transformers import AutoConfig

    prefix = f"{file.architecture}."
    vocabulary = file.metadata.get(f"{prefix}vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", ())))
    with _refused(file), _outline(file) as outline:
        config = AutoConfig.from_pretrained(outline.parent, gguf_file=outline.name, vocab_size=vocabulary)
    scaling = file.metadata.get(f"{prefix}rope.scaling.type", "none")
    used = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaling != "none" and used == "default":
        raise CaptureError(
            f'"{file.path}" stretches its rotary positions ("{scaling}"), which transformers\' GGUF reader ignores; '
            "capture the original checkpoint instead"
        )
    return config


@contextmanager
def _refused(file: GgufFile) -> Iterator[None]:
    """Whatever transformers makes of impossible metadata is one InputError."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f'transformers cannot read "{file.path}": {reason}') from error


@contextmanager
def _outline(file: GgufFile, keep: tuple[str, ...] = ()) -> Iterator[Path]:
    """A temporary GGUF file with the same metadata and tensor names, one number a tensor, and no token lists.

    Metadata under the prefixes `keep` stays whatever its length.
    """
    lists = [k for k, v in file.metadata.items() if k.startswith("tokenizer.") and isinstance(v, list)]
    kept = [key for key in file.spans if key not in lists or key.startswith(keep)]
    with file.path.open("rb") as source, tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        path = Path(folder, "outline.gguf")
        with path.open("wb") as out:
            out.write(b"GGUF" + (3).to_bytes(4, "little"))
            out.write(len(file.tensors).to_bytes(8, "little") + len(kept).to_bytes(8, "little"))
            for key in kept:
                start, end = file.spans[key]
                source.seek(start)
                out.write(source.read(end - start))
            alignment = file.metadata.get("general.alignment", 32)
            for i, name in enumerate(file.tensors):
                text = name.encode()
                out.write(len(text).to_bytes(8, "little") + text)
                shape_and_type = (1).to_bytes(4, "little") + (1).to_bytes(8, "little") + (0).to_bytes(4, "little")
                out.write(shape_and_type + (alignment * i).to_bytes(8, "little"))
            out.truncate((out.tell() // alignment + 1 + len(file.tensors)) * alignment)
        yield path


@dataclass
class _Flat:
    """A model as transformers' table of tensor names wants to see it, without its submodules."""

    config: Any
    names: dict[str, Tensor]
    children: dict[str, "_Flat"] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Tensor]:
        return self.names

    def named_children(self) -> list[tuple[str, "_Flat"]]:
        return list(self.children.items())


@dataclass
class _Weights:
    """A file's tensors under their transformers names: as float32, and as codes where a QTensor holds them.

    `places` has the transformers names by the file's.
    """

    file: GgufFile
    model: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, QTensor] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    unplaced: list[str] = field(default_factory=list)

    def read(self) -> None:
        """Decode every tensor and let transformers' processor of this architecture bring it into its own form."""
        from transformers import modeling_gguf_pytorch_utils as reader

        processor_class: Any = reader.TENSOR_PROCESSORS.get(self.file.architecture, reader.TensorProcessor)
        processor = processor_class(self.model.config.to_dict())
        names = self._names(processor)
        for stored in self.file.tensors:
            answer = self.file.qtensor(stored)
            record = answer if isinstance(answer, QTensor) else None
            floats = record.dequantize().numpy() if record else self.file.floats(stored)
            if not np.isfinite(floats).all():
                raise InputError(f'"{self.file.path}": tensor "{stored}" holds values that are not finite numbers')
            before = len(self.tensors)
            done = processor.process(
                floats, stored, tensor_key_mapping=names, parsed_parameters={"tensors": self.tensors}
            )
            if done.name in names:
                self.places[stored] = names[done.name]
                # A copy: what came from the file mapped is read-only, and may be a view in another order.
                self.tensors[names[done.name]] = torch.from_numpy(np.array(done.weights, np.float32, order="C"))
                if record:
                    self._keep_codes(names[done.name], record, floats, done, processor)
            elif len(self.tensors) == before and done.name is not None:
                self.unplaced.append(stored)

    def _names(self, processor: Any) -> dict[str, str]:
        """transformers' table from the file's names to its own."""
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        names = self.model.state_dict()
        prefix = self.model.base_model_prefix
        base = {n.removeprefix(prefix + "."): t for n, t in names.items() if n.startswith(prefix + ".")}
        flat = _Flat(self.model.config, names, {prefix: _Flat(self.model.config, base)})
        return dict(get_gguf_hf_weights_map(flat, processor))

    def _keep_codes(self, name: str, record: QTensor, floats: Any, done: Any, processor: Any) -> None:
        """Keep the codes of a tensor that the processor left alone, or whose rows it only reordered."""
        if done.weights is not floats:
            order = row_order(processor, done.name, len(floats))
            if isinstance(order, No) or not np.array_equal(floats[order], done.weights):
                return
            record = record.take(torch.from_numpy(order))
        self.codes[name] = record

    def check(self) -> None:
        """Refuse a file that lacks a parameter, or holds something the model has no place for."""
        expected = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        if missing := sorted(set(expected) - set(self.tensors)):
            raise InputError(f'"{self.file.path}" lacks {len(missing)} tensors of the model, first "{missing[0]}"')
        for name, shape in expected.items():
            found = tuple(self.tensors[name].shape)
            if found != shape:
                raise InputError(
                    f'"{self.file.path}": "{name}" is {list(found)}, but its metadata ask for {list(shape)}'
                )
        foreign = [name for name in self.unplaced if name != "rope_freqs.weight"]
        if foreign:
            raise CaptureError(
                f'"{self.file.path}" holds {len(foreign)} tensors that transformers\' {type(self.model).__name__} has '
                f'no place for, first "{foreign[0]}"; a program without them would be another model'
            )

    def scale_rotary(self, model: nn.Module) -> None:
        """Apply `rope_freqs.weight`, by which llama.cpp divides the rotary frequencies and transformers does not."""
        if "rope_freqs.weight" not in self.unplaced:
            return
        factors = torch.from_numpy(self.file.floats("rope_freqs.weight").copy())
        found = [b for name, b in model.named_buffers() if name.endswith("inv_freq")]
        if not found or any(buffer.shape != factors.shape for buffer in found):
            raise CaptureError(f'"{self.file.path}": no rotary frequencies fit rope_freqs.weight {list(factors.shape)}')
        for buffer in found:
            buffer.div_(factors)


def _program_names(program: Program, model: nn.Module) -> dict[str, str]:
    """The names of the program's tensors by those of the model's parameters: a tied tensor has one of several."""
    places = {tensor.data_ptr(): name for name, tensor in program.tensors.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {name: places.get(parameter.data_ptr(), name) for name, parameter in parameters.items()}
    return {name: place for name, place in found.items() if place in program.tensors}
