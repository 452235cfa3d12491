"""What a GGUF file says about a model that came from a transformers folder: metadata, and the names of its tensors.

llama.cpp builds the graph from the architecture's name and these numbers; what they cannot say is refused with the
reason. Sources: the GGUF specification, gguf-py's constants, llama.cpp's loaders of the architectures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.errors import InputError, No, require
from qcompiler.formats.gguf import GgufFile, Stored
from qcompiler.formats.gguf_tokenizer import FLOAT, TEXT, UINT, Pairs, tokenizer_pairs
from qcompiler.formats.joined import members
from qcompiler.program import Program
from qcompiler.skeleton import Skeleton

# llama.cpp's architecture by transformers' model_type.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
NUMBERS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Outline(GgufFile):
    """A file that is still to be written; its path is the source's folder, `extra` what the program does not hold."""

    extra: Mapping[str, Tensor]

    def floats(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A tensor that the program does not hold."""
        return self.extra[name].numpy()


def outline(program: Program) -> tuple[Outline, dict[str, str]]:
    """The file that stands for a program captured from a transformers folder, and the program's names by the file's.

    Raises InputError for a model that llama.cpp's graph of its architecture does not compute, for a tokenizer it has
    no name for, and for a program without either.
    """
    config, folder = program.info.get("config"), program.info.get("tokenizer")
    if not isinstance(config, dict) or not isinstance(folder, str):
        raise InputError(
            "a GGUF file needs metadata and a tokenizer: capture a model folder with a tokenizer.json, or a GGUF file"
        )
    for refuse in (_refused_model, _refused_rope):
        if isinstance(answer := refuse(config), No):
            raise InputError(f"the model cannot be written as a GGUF file: {answer.reason}")
    architecture = ARCHITECTURES[config["model_type"]]
    extra = {ROPE_FACTORS: _rope_factors(config)} if _rope(config).get("rope_type") == "llama3" else {}
    tensors, names = _tensors(program, architecture, config["num_hidden_layers"])
    tensors |= {name: Stored(name, tuple(value.shape), "F32", 0, 0) for name, value in extra.items()}
    pairs = dict([*_model_pairs(config, architecture, Path(folder)), *tokenizer_pairs(Path(folder), config)])
    kinds = {key: (number, inner) for key, (_, number, inner) in pairs.items()}
    metadata = {key: value for key, (value, *_) in pairs.items()}
    return Outline(Path(folder), metadata, {}, tensors, kinds, extra), names


def _refused_model(config: Mapping[str, Any]) -> bool | No:
    """What llama.cpp's graphs of these architectures do not compute."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        return No(f"its architecture {kind!r} is not among {', '.join(ARCHITECTURES)}; convert its own GGUF file")
    if config.get("hidden_act") != "silu":
        return No(f"its activation is {config.get('hidden_act')!r}, not silu")
    window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window") else None
    if window and window < config["max_position_embeddings"]:
        return No(f"its attention has a window of {window}, which llama.cpp's graph of it has not")
    return True


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings."""
    return config.get("rope_parameters") or {}


def _refused_rope(config: Mapping[str, Any]) -> bool | No:
    """Rotary positions that the metadata cannot say."""
    rope = _rope(config)
    if (kind := rope.get("rope_type", "default")) not in ("default", "linear", "llama3"):
        return No(f"its rotary positions are stretched by {kind!r}; default, linear and llama3 are written")
    return float(rope.get("partial_rotary_factor", 1.0)) == 1.0 or No("only a part of each head is rotated")


def _rope_factors(config: Mapping[str, Any]) -> Tensor:
    """By how much each rotary frequency is divided, float32 [head_dim / 2]: Llama 3's smooth stretching."""
    rope, size = _rope(config), _head_size(config)
    base = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = float(rope["original_max_position_embeddings"]) * base / (2 * torch.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _model_pairs(config: Mapping[str, Any], architecture: str, folder: Path) -> Pairs:
    """The metadata of the model."""
    yield "general.architecture", (architecture, TEXT, None)
    yield "general.type", ("model", TEXT, None)
    yield "general.name", (str(config.get("_name_or_path") or folder.resolve().name), TEXT, None)
    for key, name in NUMBERS.items():
        yield f"{architecture}.{key}", (int(config[name]), UINT, None)
    yield f"{architecture}.attention.layer_norm_rms_epsilon", (float(config["rms_norm_eps"]), FLOAT, None)
    rope, size = _rope(config), _head_size(config)
    yield f"{architecture}.rope.freq_base", (float(rope.get("rope_theta", 10000.0)), FLOAT, None)
    yield f"{architecture}.rope.dimension_count", (size, UINT, None)
    if size * config["num_attention_heads"] != config["hidden_size"]:
        yield f"{architecture}.attention.key_length", (size, UINT, None)
        yield f"{architecture}.attention.value_length", (size, UINT, None)
    if rope.get("rope_type") == "linear":
        yield f"{architecture}.rope.scaling.type", ("linear", TEXT, None)
        yield f"{architecture}.rope.scaling.factor", (float(rope["factor"]), FLOAT, None)


def _tensors(program: Program, architecture: str, layers: int) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors to write by the file's names, and the program's names of them."""
    gguf = require("gguf", "gguf")
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, layers)
    tensors, names = {}, {}
    for name, value in members(program):
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is not None:
            tensors[stored] = Stored(stored, tuple(value.shape), "F32", 0, 0)
            names[stored] = name
    parameters = Skeleton.of(program.info["config"], len(program.tensors)).parameters
    if nameless := sorted(set(parameters) & {name for name, _ in members(program)} - set(names.values())):
        raise InputError(f'"{nameless[0]}" has no name in GGUF files of the architecture {architecture}')
    return tensors, names
