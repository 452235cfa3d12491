"""qcompiler: a quantizing compiler for model graphs.

The public names are these; each is imported when it is first used, so that `import qcompiler` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "calibration": ("Sample", "Segment", "Statistic"),
    "compiler": ("capture", "compile", "explain", "load"),
    "errors": (
        "BackendError",
        "CaptureError",
        "ContractError",
        "InputError",
        "No",
        "PassError",
        "QCompilerError",
        "RecipeError",
    ),
    "formats.checkpoint": ("Checkpoint", "Format"),
    "pipeline": ("Context", "Contract", "Pass"),
    "plugins": ("FrontEnd", "Plugin"),
    "program": ("Input", "Program", "Type"),
    "recipe": ("Recipe",),
    "report": ("LayerRecord", "PassRecord", "Report"),
    "scheme": ("QTensor", "Scheme"),
    "session": ("Session",),
    "torch_model": ("QuantizedLinear", "to_torch"),
    "target": ("Backend", "Decoder", "Kernel", "Runner"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'qcompiler' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"qcompiler.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
