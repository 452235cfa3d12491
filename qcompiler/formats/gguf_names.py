"""How transformers' reader of GGUF reorders the rows of a tensor: what a writer has to undo.

llama.cpp rotates neighbouring channels together, transformers those half a head apart; so the files of some
architectures store the rows of queries and keys in another order.
"""

from typing import Any

import numpy as np

from qcompiler.errors import No
from qcompiler.formats.gguf import GgufFile


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
