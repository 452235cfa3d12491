"""Front ends: each turns a kind of model into a Program. What they need is imported when they are asked.

The checkpoint formats that one of them reads are listed here too, for all plugins' formats to stand in one table.
"""

import importlib
from typing import Any

from qcompiler.errors import No
from qcompiler.formats import FORMATS
from qcompiler.plugins import FrontEnd, Plugin


def _lazy(name: str) -> FrontEnd:
    """The front end in the module of that name, imported at its first use."""
    path = f"qcompiler.frontends.{name}"

    def accepts(source: Any) -> bool | No:
        answer: bool | No = importlib.import_module(path).accepts(source)
        return answer

    def capture(source: Any, example_inputs: Any = None) -> Any:
        return importlib.import_module(path).capture(source, example_inputs)

    def tokenizer(place: Any) -> Any:
        read = getattr(importlib.import_module(path), "tokenizer", None)
        return read(place) if read else None

    return FrontEnd(name, accepts, capture, tokenizer)


# A quantized checkpoint is a model folder too: who knows its format is asked first.
PLUGIN = Plugin(
    frontends=tuple(map(_lazy, ("checkpoint", "huggingface", "gguf", "onnx", "fx", "torch_module"))), formats=FORMATS
)
