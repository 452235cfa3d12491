"""Two programs held against one another: their outputs on samples, their stored numbers, one run against two pieces."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.calibration import Sample
from qcompiler.errors import ContractError
from qcompiler.ops import qc
from qcompiler.program import Program


def in_double(program: Program) -> Program:
    """A copy that computes in double precision throughout."""
    copy = widened(program)
    copy.tensors = {name: t.double() if t.is_floating_point() else t for name, t in copy.tensors.items()}
    return copy


def widened(program: Program) -> Program:
    """A copy whose calls name double precision wherever they name a float type."""
    copy = program.copy()
    for node in copy.calls():
        node.args = tuple(map(_wide, node.args))
        node.kwargs = {name: _wide(value) for name, value in node.kwargs.items()}
    return copy


class Doubled(dict[str, Tensor]):
    """Stored tensors that are doubled when they are read, so that a large program is never held twice over.

    For running only: a copy of it holds the tensors as they are.
    """

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        return tensor.double() if tensor.is_floating_point() else tensor


def _wide(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument


def wide_inputs(sample: Sample) -> Sample:
    """The inputs, floats in double precision."""
    return {name: value.double() if value.is_floating_point() else value for name, value in sample.items()}


def rounds(program: Program) -> bool:
    """Whether activations are rounded, as such or inside attention."""
    inside = ("key", "value", "levels")
    return any(n.target is qc.fake_quantize or any(n.kwargs.get(k) for k in inside) for n in program.calls())


def no_writes(versions: Mapping[str, tuple[Tensor, int]]) -> None:
    """Nobody wrote into a tensor since its version was noted; raises ContractError."""
    for name, (tensor, version) in versions.items():
        if tensor._version != version:
            raise ContractError(f'it wrote into tensor "{name}" in place; store a new tensor instead')


def same_values(program: Program, snapshot: Program) -> None:
    """Every quantized tensor that was there before still stands for the same numbers, bit for bit."""
    for name in snapshot.quantized:
        if name not in program.quantized or _parts(program, name) == _parts(snapshot, name):
            continue
        if not torch.equal(program.qtensor(name).dequantize(), snapshot.qtensor(name).dequantize()):
            raise ContractError(f'it is declared a layout change but "{name}" no longer dequantizes to the same bits')
    for name in program.quantized:
        if name in snapshot.tensors and not torch.equal(program.qtensor(name).dequantize(), snapshot.tensors[name]):
            raise ContractError(f'it is declared a layout change but "{name}" is not the same tensor, bit for bit')


def _parts(program: Program, name: str) -> list[int]:
    """The identities of a quantized tensor's parts: equal lists are the same record."""
    return [id(part) for part in program.qtensor(name).parts().values()]


def same_in_pieces(program: Program, sample: Sample, whole: Mapping[str, Tensor], tolerance: float) -> None:
    """Prefill, then the rest over the cache, must give what one run gives; raises ContractError."""
    first = program.inputs[0].name
    length = sample[first].shape[1]
    outputs: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    pieces = []
    for start, stop in ((0, length // 2), (length // 2, length)):
        inputs = {name: _piece(name, value, start, stop) for name, value in sample.items()}
        outputs = program(**inputs, **state)
        state = program.cache_updates(outputs)
        pieces.append(outputs[program.outputs[0]])
    joined = {program.outputs[0]: torch.cat(pieces, dim=1)}
    change = relative_change({program.outputs[0]: whole[program.outputs[0]]}, joined, real=sample.get("attention_mask"))
    if not change <= tolerance:
        raise ContractError(f"prefill then decode differs from one run by {change:.2e} (allowed {tolerance:.0e})")


def _piece(name: str, value: Tensor, start: int, stop: int) -> Tensor:
    # The padding mask covers the past too; ids and positions are those of the new tokens.
    return value[:, :stop] if name == "attention_mask" else value[:, start:stop]


def relative_change(old: Mapping[str, Tensor], new: Mapping[str, Tensor], real: Tensor | None = None) -> float:
    """Largest absolute difference of any output, relative to that output's largest magnitude.

    With `real` [batch, sequence], only positions where it is nonzero count.
    """
    worst = 0.0
    for name, before in old.items():
        if name not in new:
            raise ContractError(f'output "{name}" is gone')
        after = new[name]
        if before.shape != after.shape:
            raise ContractError(f'output "{name}" had shape {tuple(before.shape)} and now has {tuple(after.shape)}')
        if not before.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(before, after) else float("inf"))
            continue
        if real is not None and real.shape == before.shape[:2]:
            before, after = before[real != 0], after[real != 0]
        worst = max(worst, _change(before.double(), after.double()))
    return worst


def _change(before: Tensor, after: Tensor) -> float:
    """Largest absolute difference relative to the largest finite magnitude; equal infinities do not differ."""
    differing = before != after
    if not bool(differing.any()):
        return 0.0
    size = before.abs()[before.isfinite()]
    scale = max(size.max().item() if size.numel() else 0.0, 1e-30)
    change = (after - before).abs()[differing].max().item() / scale
    return float("inf") if math.isnan(change) else change


def mean_kl(old: Sequence[Mapping[str, Tensor]], new: Sequence[Mapping[str, Tensor]]) -> float | None:
    """Mean KL divergence (nats) of the predictions in output "logits"; None where there is no such output."""
    if not old or "logits" not in old[0]:
        return None
    total, count = 0.0, 0
    for before, after in zip(old, new, strict=True):
        p, q = before["logits"].double().log_softmax(-1), after["logits"].double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        total, count = total + kl.sum().item(), count + kl.numel()
    return total / max(count, 1)


def finite(outputs: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether no float among the outputs is infinite or none."""
    return all(bool(torch.isfinite(v).all()) for out in outputs for v in out.values() if v.is_floating_point())
