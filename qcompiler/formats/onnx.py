"""ONNX folders, as ONNX Runtime GenAI's model builder and qcompiler's own backend write them: read, not written.

The graph is not interpreted: its quantized products and constants are taken by their names for the parameters of
transformers' model, and whatever has no place there is refused. Folders of this kind have no config.json, which says
the rest (epsilons, rotary angles): the model's own must be put beside the file.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError, No
from qcompiler.formats import onnx_model
from qcompiler.formats.checkpoint import Checkpoint, Format, Lazy, Value
from qcompiler.formats.folder import finite, plain_integers
from qcompiler.formats.onnx_blocks import packed_of
from qcompiler.formats.shards import read_json
from qcompiler.scheme import QTensor
from qcompiler.skeleton import Skeleton

# Architectures whose constants the model builder stores as they are; in others it adds or multiplies.
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ROUNDS = ("DynamicQuantizeLinear", "QuantizeLinear", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul")
# The builder's names, and the parts' that the backend writes, as transformers has them.
NAMES = (
    (r"::.*$", ""),
    (r"\.(?:MatMul|Gemm|Add|layernorm)(?=\.(?:weight|bias))", ""),
    (r"(?<=weight)_Q\d+$", ""),
    (r"\.attn\.", ".self_attn."),
    (r"^model\.layers\.\d+\.final_norm_layernorm\.", "model.norm."),
)


def detect(folder: Path) -> bool | No:
    """Whether the folder holds an ONNX model and its config.json, and no other weights."""
    if not folder.is_dir():
        return No(f'"{folder}" is not a folder')
    if any(folder.glob("*.safetensors")):
        return No("its weights are safetensors")
    file = _file(folder)
    if isinstance(file, No):
        return file
    return (folder / "config.json").is_file() or No(
        f'"{file.name}" has no config.json beside it; put the model\'s there'
    )


def _file(folder: Path) -> Path | No:
    """The model's file: the one that genai_config.json names, or model.onnx."""
    name = "model.onnx"
    if (folder / "genai_config.json").is_file():
        inner: Any = read_json(folder / "genai_config.json")
        for key in ("model", "decoder", "filename"):
            inner = inner.get(key) if isinstance(inner, dict) else None
        name = inner if isinstance(inner, str) else name
    if Path(name).name != name or not (folder / name).is_file():
        return No(f'it holds no file "{name[:80]}"')
    return folder / name


def read(folder: Path) -> Checkpoint:
    """The checkpoint; quantized matrices are QTensors. InputError says what is wrong with the folder."""
    file = _file(folder)
    if isinstance(file, No):
        raise InputError(f'"{folder}" is no ONNX folder: {file}')
    config = read_json(folder / "config.json")
    if config.get("model_type") not in KNOWN:
        raise InputError(
            f'"{folder}": constants of a {config.get("model_type")!r} may not be stored as they are; ONNX folders are '
            f"read of {', '.join(KNOWN)}"
        )
    source = onnx_model.read(file)
    for node in source.proto.graph.node:
        if node.op_type in ROUNDS:
            raise InputError(f'"{file}" rounds activations ({node.op_type} "{node.name}"), which is not read')
    makers = dict(_values(source, folder))
    skeleton = Skeleton.of(config, len(makers))
    if set(skeleton.tied) & set(makers):
        config["tie_word_embeddings"] = False
        skeleton = Skeleton.of(config, len(makers))
    return Checkpoint(config, Lazy(dict(_placed(makers, skeleton, file))), folder)


def name_of(stored: str) -> str:
    """transformers' name of a constant.

    >>> name_of("model.layers.0.attn.o_proj.MatMul.weight_Q4")
    'model.layers.0.self_attn.o_proj.weight'
    """
    for pattern, plain in NAMES:
        stored = re.sub(pattern, plain, stored)
    return stored


Makers = Mapping[str, Callable[[], Value]]


def _values(source: onnx_model.Source, folder: Path) -> Iterator[tuple[str, Callable[[], Value]]]:
    """Every constant that may be a parameter, by its name there; packed parts only as the matrix they make."""
    graph = source.proto.graph
    protos = {tensor.name: tensor for tensor in graph.initializer}
    done: set[str] = set()

    def get(name: str) -> Tensor:
        return source.tensors[name] if name in source.tensors else onnx_model.proto_values(protos[name])

    def record(packed: Any) -> Value:
        made: QTensor = packed.record(get)
        assert isinstance(made.scale, Tensor)
        return made.with_parts(scale=finite(made.scale, packed.scale, folder), dtype=torch.float32)

    for node in graph.node:
        packed = packed_of(node, protos)
        if not isinstance(packed, No):
            done |= {packed.codes, packed.scale, packed.zero}
            yield name_of(packed.codes), partial(record, packed)
        elif node.op_type == "MatMul" and node.input[1] in source.tensors:
            done.add(node.input[1])
            yield name_of(node.input[1]), partial(_floats, source.tensors[node.input[1]].T)
    for name, tensor in source.tensors.items():
        if name not in done and tensor.is_floating_point() and tensor.dim():
            yield name_of(name), partial(_floats, tensor)


def _floats(stored: Tensor) -> Tensor:
    return stored.float().contiguous()


def _placed(makers: Makers, skeleton: Skeleton, file: Path) -> Iterator[tuple[str, Callable[[], Value]]]:
    """The parameters, joined ones apart; InputError for a constant without a place."""
    sizes = {name: shape[0] for name, shape in skeleton.parameters.items()}
    for name, make in makers.items():
        stem, _, kind = name.rpartition(".")
        path, _, last = stem.rpartition(".")
        members = [f"{path}.{member}.{kind}" for member in JOINED.get(last, ())]
        if name in sizes:
            yield name, make
        elif members and all(member in sizes for member in members):
            parts = [sizes[member] for member in members]
            for i, member in enumerate(members):
                yield member, partial(_rows, make, parts, i, f'"{file}": "{name}"')
        elif not re.search(r"(^|[._/])(cos|sin)", name) and len(make().shape) > 1:
            raise InputError(
                f'"{file}" holds the matrix "{name}", for which transformers\' {type(skeleton.model).__name__} has no '
                "place; a checkpoint without it would be another model"
            )


def _rows(make: Callable[[], Value], parts: Sequence[int], i: int, what: str) -> Value:
    """The rows of one of several matrices in one, or numbers of a bias."""
    whole, start = make(), sum(parts[:i])
    if whole.shape[0] != sum(parts):
        raise InputError(f"{what} has {whole.shape[0]} rows, but config.json asks for {' + '.join(map(str, parts))}")
    end = start + parts[i]
    return whole.take(torch.arange(start, end)) if isinstance(whole, QTensor) else whole[start:end]


def holds(record: QTensor) -> bool | No:
    """Whether MatMulNBits stores this weight exactly."""
    answer = plain_integers(record, (2, 4, 8))
    if not answer:
        return answer
    size = record.scheme.group_size
    if size and (size < 16 or size > 256 or size & (size - 1)):
        return No(f"its groups of {size} are no power of two from 16 to 256")
    if record.permutation is not None:
        return No("its channels are stored in another order (act-order)")
    return True if isinstance(record.scale, Tensor) else No("its scales are quantized too")


FORMATS = (
    Format(
        "onnx",
        detect,
        read,
        holds=holds,
        conditions="integers of 2, 4 or 8 bits in blocks of 16 to 256 (MatMulNBits, GatherBlockQuantized, "
        "DequantizeLinear); folders of ONNX Runtime GenAI with the model's config.json; written by the backend "
        "onnxruntime",
    ),
)
