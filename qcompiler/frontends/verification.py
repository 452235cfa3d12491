"""Does a captured program compute what the original does? Asked on data, at other sizes than it was traced with."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.errors import No
from qcompiler.program import Program

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One question: inputs, and where the outputs count.

    `real` [batch, sequence] is True at real tokens; outputs at other positions mean nothing and are not compared,
    nor are outputs without positions (a pooled state may look at a padded one). None compares everything.
    """

    name: str
    inputs: Mapping[str, Tensor]
    real: Tensor | None = None


def tolerance(dtype: torch.dtype) -> float:
    """The largest accepted max |difference| / max |reference|: 1e-4, and 8 units in the last place of a short float.

    >>> tolerance(torch.float32), tolerance(torch.bfloat16)
    (0.0001, 0.0625)
    """
    return max(1e-4, 8 * torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0


def verify(program: Program, original: Callable[[Mapping[str, Tensor]], Outputs], cases: Iterable[Case]) -> float | No:
    """The largest relative error over all cases, or a No that says which case differs and by how much."""
    worst = 0.0
    for case in cases:
        try:
            got = program(**case.inputs)
        except Exception as error:  # noqa: BLE001  the graph may fail anywhere at a size it was wrongly specialised to
            return No(f"the capture fails with {case.name}: {type(error).__name__}: {str(error)[:200]}")
        expected = original(case.inputs)
        for name, reference in expected.items():
            if name not in got:
                return No(f'output "{name}" is missing with {case.name}')
            answer = compare(got[name], reference, case.real)
            if isinstance(answer, No):
                return No(f'output "{name}" {answer.reason} ({case.name})')
            worst = max(worst, answer)
    return worst


def compare(got: Tensor, reference: Tensor, real: Tensor | None = None, loose: float = 0.0) -> float | No:
    """max |got - reference| / max |reference| at real positions, or a No if that is more than the tolerance.

    `loose` is a larger tolerance for floats.

    >>> compare(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1])).reason
    'differs by 4.8e-02 relative, more than 1.0e-04'
    """
    if got.shape != reference.shape:
        return No(f"has shape {list(got.shape)} instead of {list(reference.shape)}")
    if got.dtype != reference.dtype:
        return No(f"has dtype {got.dtype} instead of {reference.dtype}")
    if real is not None:
        if reference.shape[:2] != real.shape:
            return 0.0
        got, reference = got[real], reference[real]
    if not reference.numel():
        return 0.0
    allowed = max(tolerance(reference.dtype), loose) if reference.is_floating_point() else 0.0
    got, reference = got.double(), reference.double()
    if not bool(reference.isfinite().all()):
        return No("is not finite in the original")
    error = float((got - reference).abs().max() / reference.abs().max().clamp_min(1e-30))
    if not error <= allowed:  # NaN too
        return No(f"differs by {error:.1e} relative, more than {allowed:.1e}")
    return error
