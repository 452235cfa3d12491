"""What GGUF calls a tensor, and how transformers' reader reorders its rows: what a writer has to undo.

llama.cpp rotates neighbouring channels together, transformers those half a head apart; so the files of some
architectures store the rows of queries and keys in another order.
"""

import functools
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from qcompiler.errors import No, require
from qcompiler.formats.gguf import GgufFile
from qcompiler.program import Program


def processor_of(file: GgufFile) -> Any:
    """transformers' processor of tensors for the file's architecture, told what its metadata say of heads."""
    from transformers import modeling_gguf_pytorch_utils as reader

    kind: Any = reader.TENSOR_PROCESSORS.get(file.architecture, reader.TensorProcessor)
    heads = file.metadata.get(f"{file.architecture}.attention.head_count")
    shared = file.metadata.get(f"{file.architecture}.attention.head_count_kv", heads)
    return kind({"num_attention_heads": heads, "num_key_value_heads": shared})


def row_order(processor: Any, name: str, rows: int) -> "np.ndarray[Any, np.dtype[np.int64]] | No":
    """int64 [rows]: the file's row that transformers puts at each place; No if it does more than reorder rows."""
    probe = np.arange(rows * 2, dtype=np.int64).reshape(rows, 2)
    try:
        done = processor.process(probe, name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
    except Exception as error:  # noqa: BLE001  what the processor of another architecture makes of the probe
        return No(f"transformers' reader cannot say what it does to it ({type(error).__name__})", name)
    found = done.weights
    if done.name != name or found.shape != probe.shape or not np.array_equal(found, probe[found[:, 0] // 2 % rows]):
        return No("transformers' reader does more to it than to reorder its rows", name)
    order: np.ndarray[Any, np.dtype[np.int64]] = found[:, 0] // 2
    return order


def gguf_names(program: Program) -> dict[str, str]:
    """The names that GGUF has for a program's tensors, by theirs: those of the file it came from, or gguf-py's.

    A tensor for which neither has a name is left out.
    """
    known = {name: stored for stored, name in program.info.get("gguf", {}).get("names", {}).items()}
    tensors = {name.partition("::")[0] for name in program.tensors}
    return known or {name: found for name in sorted(tensors) if (found := gguf_name(name))}


def gguf_name(name: str) -> str:
    """The name that gguf-py's tables give to a tensor of a checkpoint; "" if they have none.

    >>> gguf_name("model.layers.11.self_attn.v_proj.weight")
    'blk.11.attn_v.weight'
    """
    module, _, part = name.rpartition(".")
    block = re.search(r"(?<=\.)\d+(?=\.)", module)
    pattern = module[: block.start()] + "{bid}" + module[block.end() :] if block else module
    found = _tables().get(pattern)
    return f"{found.format(bid=block[0]) if block else found}.{part}" if found else ""


@functools.cache
def _tables() -> dict[str, str]:
    """gguf-py's names by those of checkpoints, with {bid} where the number of the block stands."""
    gguf = require("gguf", "gguf")
    tables: Iterable[dict[Any, tuple[str, ...]]] = (
        gguf.TensorNameMap.mappings_cfg,
        gguf.TensorNameMap.block_mappings_cfg,
    )
    found: dict[str, str] = {}
    for table in tables:
        for tensor, names in table.items():
            for name in names:
                found.setdefault(name, gguf.TENSOR_NAMES[tensor])
    return found
