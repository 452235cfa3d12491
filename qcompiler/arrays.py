"""Calibration data as arrays: an .npz file with one array for each input of a model, samples along the first axis."""

from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from qcompiler.calibration import Sample
from qcompiler.errors import InputError
from qcompiler.program import Input, Program

ROWS = 8  # samples that run together, where the first axis of every input is free


def read(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file by name; InputError for a file that is missing, damaged, or holds objects."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: torch.from_numpy(file[name]) for name in file.files}
    except FileNotFoundError:
        raise InputError(f'calibration file "{path}" does not exist; give an .npz file of arrays') from None
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f'calibration file "{path}" is no .npz file of numbers: {reason}') from None
    if not found:
        raise InputError(f'calibration file "{path}" holds no arrays; save one for each input of the model')
    return found


def samples(arrays: Mapping[str, Tensor], program: Program, most: int) -> list[Sample]:
    """The first `most` samples of `arrays`, each a batch of inputs for `program`.

    An array has the axes of its input, samples along the first one, or one axis more in front of them. InputError
    says which array does not fit its input.
    """
    needed = {spec.name: spec for spec in program.inputs if not spec.default or spec.name in arrays}
    if set(needed) != set(arrays):
        raise InputError(f"the calibration arrays are {sorted(arrays)}; the model takes {sorted(needed)}")
    counts = {name: len(array) if array.dim() else 0 for name, array in arrays.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise InputError(f"the calibration arrays hold {counts} samples; each must hold as many, at least one")
    fitted = {name: _fit(array[:most], needed[name]) for name, array in arrays.items()}
    joined = all(array.dim() == needed[name].type.rank for name, array in fitted.items())
    free = joined and all(isinstance(spec.type.shape[0], str) for spec in needed.values())
    count = next(iter(counts.values()))
    width = ROWS if free else 1
    return [
        {n: a[i : i + width] if a.dim() == needed[n].type.rank else a[i] for n, a in fitted.items()}
        for i in range(0, min(count, most), width)
    ]


def _fit(array: Tensor, spec: Input) -> Tensor:
    """The array in the input's dtype; InputError if dtype or shape cannot be the input's."""
    wanted = spec.type
    if array.is_floating_point() != wanted.dtype.is_floating_point:
        raise InputError(f'calibration array "{spec.name}" is {array.dtype}; the model takes {wanted}')
    extra = array.dim() - wanted.rank
    sizes = wanted.shape if extra == 1 else wanted.shape[1:]
    fits = all(isinstance(size, str) or size == have for size, have in zip(sizes, array.shape[1:], strict=False))
    single = extra == 0 and wanted.rank and wanted.shape[0] not in (1,) and not isinstance(wanted.shape[0], str)
    if extra not in (0, 1) or single or not fits:
        shown = f"[samples, {', '.join(map(str, wanted.shape))}]"
        raise InputError(
            f'calibration array "{spec.name}" is {list(array.shape)}; the model takes {wanted}: save it as {shown}'
        )
    return array.to(wanted.dtype)
