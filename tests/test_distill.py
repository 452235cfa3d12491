"""distill: closer to the float model's predictions than what it is given, codes unchanged, and never worse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qcompiler
from qcompiler import data
from qcompiler.errors import PassError, RecipeError
from qcompiler.passes.activations import Activations
from qcompiler.passes.distill import Distill, Student, distance, divergence, outputs
from qcompiler.passes.fuse import Fuse
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.nf4 import Nf4
from qcompiler.passes.reference import unrounded
from qcompiler.passes.rtn import Rtn
from qcompiler.pipeline import Context, Pass, Runner
from qcompiler.program import Program
from qcompiler.scheme import Scheme
from qcompiler.testing import assert_conforms
from tests.programs import located, tiny_encoder, tiny_folder, tiny_llama

LOW = Scheme.parse("int3:g16:asym")
TUNE = Distill(steps=60, rate=0.01)


def model(seed: int = 0) -> Program:
    return located(tiny_llama(seed=seed))


def samples(count: int = 4, seed: int = 1) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 50, (4, 16), generator=random)} for _ in range(count)]


def ran(program: Program, *steps: Pass, given: Any = None) -> Runner:
    runner = Runner(Context(samples=samples() if given is None else given), data.check_samples(program))
    runner.run(program, steps)
    return runner


def lost(program: Program, floats: Program, seed: int = 1) -> float:
    """Nats a token; with another seed on sequences that calibrated nothing."""
    given = samples(seed=seed)
    return sum(float(distance(program(**sample), floats(**sample), sample)) for sample in given)


@pytest.mark.parametrize("step", [Rtn(LOW), Gptq(LOW), Nf4()], ids=str)
def test_it_beats_what_it_starts_from(step: Pass) -> None:
    """Fails if the method is replaced by doing nothing."""
    floats = model()
    start, tuned = floats.copy(), floats.copy()
    ran(start, step)
    runner = ran(tuned, step, TUNE)
    assert lost(tuned, floats) < 0.95 * lost(start, floats)
    assert lost(tuned, floats, seed=7) < lost(start, floats, seed=7)
    assert any("divergence" in note for note in runner.records[-1].notes)
    for name in start.quantized:
        assert torch.equal(start.qtensor(name).codes, tuned.qtensor(name).codes)


def test_without_norms_only_scales_move() -> None:
    start, scales, both = model(), model(), model()
    ran(start, Rtn(LOW))
    ran(scales, Rtn(LOW), replace(TUNE, norms=False))
    ran(both, Rtn(LOW), TUNE)
    vectors = [name for name, tensor in start.tensors.items() if tensor.dim() == 1 and "norm" in name]
    assert vectors
    assert all(torch.equal(start.tensors[name], scales.tensors[name]) for name in vectors)
    assert not any(torch.equal(start.tensors[name], both.tensors[name]) for name in vectors)


def test_it_makes_up_for_rounded_activations() -> None:
    floats = model()
    rough = Activations(Scheme.parse("int3:token:asym:dynamic"))
    start, tuned = floats.copy(), floats.copy()
    ran(start, rough, Rtn(LOW))
    ran(tuned, rough, Rtn(LOW), TUNE)
    assert lost(tuned, floats) < lost(start, floats)


def test_an_end_that_is_worse_is_dropped() -> None:
    start, wild = model(), model()
    ran(start, Rtn(LOW))
    runner = ran(wild, Rtn(LOW), Distill(steps=12, rate=0.9))
    assert wild.fingerprint() == start.fingerprint()
    assert "everything stays as it was" in str(runner.records[-1].refusals)


def test_a_model_without_logits_learns_its_outputs() -> None:
    floats = located(tiny_encoder())
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    given = [{"input_ids": ids, "attention_mask": mask}]
    start, tuned = floats.copy(), floats.copy()
    ran(start, Rtn(LOW), given=given)
    ran(tuned, Rtn(LOW), TUNE, given=given)
    before, after = (float(distance(p(**given[0]), floats(**given[0]), given[0])) for p in (start, tuned))
    assert after < 0.9 * before
    noise = {name: torch.where(mask[..., None] == 0, 9.0, value) for name, value in floats(**given[0]).items()}
    assert float(distance(noise, floats(**given[0]), given[0])) == 0.0  # padding does not count


def test_gradients_are_those_of_the_numbers_moved() -> None:
    """Against finite differences, in a scale and in a norm's weight."""
    floats = model()
    low = floats.copy()
    ran(low, Rtn(LOW))
    student, [sample] = Student(low, norms=True, ctx=Context()), samples(1)
    wanted = unrounded(floats)(**sample)
    with torch.enable_grad():
        found = dict(zip(student.program.outputs, run(student, sample), strict=True))
        distance(found, wanted, sample).backward()
    for name in (next(iter(student.records)), student.vectors[0]):
        move = student.moves[name]
        assert move.grad is not None
        place = tuple(int(i) for i in (move.grad.abs() == move.grad.abs().max()).nonzero()[0])
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                move[place] += step
                ends.append(divergence(floats, student, sample))
                move[place] -= step
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(move.grad[place]), rel=0.05)


def run(student: Student, sample: dict[str, Tensor]) -> list[Tensor]:
    return list(outputs(student.program, sample, student.tensors()).values())


def test_what_it_says() -> None:
    with pytest.raises(RecipeError, match=r"steps=3 batch=0 rate=0.002: at least one sequence, a rate in \(0, 1\)"):
        ran(model(), Rtn(LOW), Distill(steps=3, batch=0))
    with pytest.raises(PassError, match="needs calibration data; give calibration="):
        ran(model(), Rtn(LOW), TUNE, given=[])
    runner = ran(model(), TUNE)
    assert "nothing was quantized from floats before it; put it after gptq" in str(runner.records[-1].refusals)


def test_floats_are_kept_only_for_passes_that_want_them() -> None:
    program = model()
    runner = ran(program, Rtn(LOW))
    assert runner.context.floats is None
    runner = Runner(Context(samples=samples()), data.check_samples(program))
    runner.run(fresh := model(), [Rtn(LOW)], ahead=[TUNE])
    assert runner.context.floats is not None
    assert not runner.context.floats.quantized
    runner.run(fresh, [replace(TUNE, steps=2)])
    runner.run(model(), [Rtn(LOW)])
    assert runner.context.floats is None


def test_it_conforms() -> None:
    program = model()
    ran(program, Rtn(LOW))
    assert_conforms(Distill(steps=2), program)


def test_a_recipe_of_its_own_passes_keeps_the_floats(tmp_path: Path) -> None:
    """Plain rounding needs no data and runs before there is any; the floats must outlive it."""
    session = qcompiler.compile(
        tiny_folder(tmp_path),
        "canonicalize, rtn{scheme=int3:g16}, distill{steps=30 rate=0.01}, kv_cache, pack",
        calibration=[torch.randint(0, 16, (1, 12), generator=torch.Generator().manual_seed(2)) for _ in range(8)],
        backend="reference",
    )
    [record] = [record for record in session.report.passes if record.name == "distill"]
    before, after = map(float, record.notes[0].partition(": ")[2].split(" -> "))
    assert 0 < after < before
    assert qcompiler.explain(tmp_path, "canonicalize, rtn, distill, kv_cache, pack").passes[2].changed is False


def test_what_is_checked_is_what_was_tuned() -> None:
    """The codes stay: who keeps decoded weights must look at the scales too."""
    program = model()
    runner = ran(program, Rtn(LOW), TUNE)
    outputs, *_ = runner._outputs or [{}]
    assert torch.equal(outputs["logits"], program.decoded()(**runner.checks[0])["logits"])
    runner.run(program, [Fuse()])
    assert (runner.records[-1].output_change or 0.0) < 1e-4
