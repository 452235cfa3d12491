"""Models so old that ONNX Runtime has no kernels for their operators: converted to a newer opset, and held to that."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.errors import InputError, require
from qcompiler.formats.onnx_model import Source, read

NEWEST = 17  # what they are converted to


def raised(model: Source, refused: InputError) -> Source:
    """The model in a newer opset; raises `refused`, what ONNX Runtime said of it, where there is no such form."""
    onnx = require("onnx", "onnx")
    version = next((o.version for o in model.proto.opset_import if o.domain in ("", "ai.onnx")), NEWEST)
    if version >= NEWEST or "NOT_IMPLEMENTED" not in str(refused):
        raise refused
    try:
        made = onnx.version_converter.convert_version(model.complete(), NEWEST)
    except Exception as error:  # the converter raises RuntimeErrors of many texts
        raise InputError(f"{refused}; nor can it be converted from opset {version} to {NEWEST}") from error
    return read(made)


def check(original: Source, cases: Sequence[Mapping[str, Any]], refused: InputError) -> None:
    """Hold a converted model's values in `cases` to onnx's own evaluator of the original; `refused` if they differ.

    The converter has silently changed how old operators broadcast.
    """
    reference = require("onnx.reference", "onnx").ReferenceEvaluator(original.complete())
    names = list(reference.output_names)
    try:
        pairs = [
            (reference.run(None, {n: case[n] for n in reference.input_names if n in case}), case) for case in cases
        ]
        agree = all(
            np.allclose(found, case[name], rtol=1e-3, atol=1e-4, equal_nan=True)
            for values, case in pairs
            for found, name in zip(values, names, strict=True)
        )
    except Exception as error:  # the evaluator raises whatever its numpy code meets
        raise refused from error
    if not cases or not agree:
        raise refused
