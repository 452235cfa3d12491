"""block_tune: closer to the float block than rounding or gptq alone, and it goes on where it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler import data
from qcompiler.errors import PassError, RecipeError
from qcompiler.journal import Journal
from qcompiler.ops import meaning, qc
from qcompiler.passes.activations import Activations
from qcompiler.passes.block_tune import BlockTune, Soft, unrounded
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.kv import Kv
from qcompiler.passes.rtn import Rtn
from qcompiler.pipeline import Context, Pass, Runner
from qcompiler.program import Program
from qcompiler.rounding import fake_quantize
from qcompiler.scheme import QTensor, Scheme
from tests.programs import located, tiny_llama

LOW = Scheme.parse("int2:g16:asym")
TUNE = BlockTune(LOW, steps=40, rate=0.02)


def model(seed: int = 0) -> Program:
    """Two blocks and a head."""
    return located(tiny_llama(seed=seed))


def samples(count: int = 6) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 50, (4, 16), generator=random)} for _ in range(count)]


def ran(program: Program, *steps: Pass, journal: Journal | None = None, progress: Any = None) -> Runner:
    context = Context(samples=samples(), journal=journal or Journal())
    context.progress = progress or context.progress
    runner = Runner(context, data.check_samples(program))
    runner.run(program, steps)
    return runner


def distance(program: Program, expected: Program) -> float:
    found, wanted = (p(input_ids=samples()[0]["input_ids"])["logits"] for p in (program, expected))
    return float((found - wanted).norm() / wanted.norm())


def test_it_beats_rounding_and_gptq() -> None:
    """Fails if the method is replaced by round-to-nearest."""
    base = model()
    errors = {}
    for name, step in {"rtn": Rtn(LOW), "gptq": Gptq(LOW), "tuned": TUNE}.items():
        copy = base.copy()
        runner = ran(copy, step)
        errors[name] = distance(copy, base)
    assert errors["tuned"] < errors["gptq"] < errors["rtn"], errors
    assert errors["tuned"] < 0.9 * errors["rtn"], errors
    notes = runner.records[0].notes
    assert any("relative error" in note for note in notes)
    assert all(layer.scheme == str(LOW) for layer in runner.records[0].layers)


def test_a_block_never_ends_worse_than_it_began() -> None:
    base = model()
    wild, start = base.copy(), base.copy()
    ran(wild, BlockTune(LOW, start="rtn", steps=3, rate=5.0, scale_rate=0.5))
    ran(start, Rtn(LOW))
    for name in start.quantized:
        assert torch.equal(wild.qtensor(name).dequantize(), start.qtensor(name).dequantize())


def test_it_makes_up_for_rounded_activations() -> None:
    base = model()
    rough = [Activations(Scheme.parse("int3:token:asym:dynamic")), Kv(Scheme.parse("int3:token:asym:dynamic"))]
    errors = {}
    for name, step in {"gptq": Gptq(LOW), "tuned": TUNE}.items():
        copy = base.copy()
        ran(copy, *rough, step)
        assert any(copy.calls(qc.fake_quantize))
        errors[name] = distance(copy, base)
    assert errors["tuned"] < errors["gptq"], errors


def test_the_target_has_floats_everywhere() -> None:
    base = model()
    rough = base.copy()
    ran(rough, Activations(), Kv())
    ids = samples()[0]["input_ids"]
    assert not torch.equal(rough(input_ids=ids)["logits"], base(input_ids=ids)["logits"])
    assert torch.equal(unrounded(rough)(input_ids=ids)["logits"], base(input_ids=ids)["logits"])


class Crash(Exception):
    """Stands for a machine that stops."""


def test_a_run_that_died_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal")
    whole, again = model(), model()
    ran(whole, TUNE)
    descents: list[int] = []
    descend = BlockTune._descend

    def counted(self: BlockTune, block: Any, *rest: Any) -> None:
        descents.append(block.segment.index)
        if len(descents) == 2:
            raise Crash
        descend(self, block, *rest)

    monkeypatch.setattr(BlockTune, "_descend", counted)
    with pytest.raises(PassError, match="Crash"):
        ran(again, TUNE, journal=journal)
    assert not again.quantized
    ran(again, TUNE, journal=journal)
    assert descents == [1, 2, 2]  # the first block was not tuned a second time
    assert again.fingerprint() == whole.fingerprint()
    ran(model(seed=1), TUNE, journal=journal)
    assert descents == [1, 2, 2, 1, 2]  # another model has pages of its own


def test_a_page_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    q = QTensor.quantize(torch.randn(4, 32), LOW)

    def fail(self: Path, target: Path) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            journal.put(0, {"w": q})
    assert journal.get(0) is None
    journal.put(0, {"w": QTensor.quantize(torch.randn(4, 32), LOW), "model.v": q})
    found = journal.get(0)
    assert found is not None
    assert found.keys() == {"w", "model.v"}
    assert torch.equal(found["model.v"].dequantize(), q.dequantize())


def test_soft_weights_begin_at_the_codes() -> None:
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    for text in ("int2:g16:asym", "int4:g16:sym", "int3:channel:asym", "int4:tensor:asym"):
        q = QTensor.quantize(weight, Scheme.parse(text))
        soft = Soft(q, weight)
        assert torch.allclose(soft(), q.dequantize(), atol=1e-6)
        soft().square().sum().backward()
        assert soft.place.grad is not None
        assert bool((soft.place.grad != 0).any())
        assert torch.equal(soft.hard().dequantize(), q.dequantize())


def test_rounding_has_the_straight_through_derivative() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    fake_quantize(x, [], scheme="int4:token:asym:dynamic").sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(3, 8))
    assert meaning(qc.fake_quantize) is fake_quantize
    assert meaning(torch.ops.aten.silu.default) is torch.ops.aten.silu.default


@pytest.mark.parametrize(
    ("step", "error", "text"),
    [
        (BlockTune(start="awq"), RecipeError, 'start "awq" is none of gptq, rtn'),
        (BlockTune(steps=0), RecipeError, "steps=0 batch=2: at least 1 of each; for the start alone use gptq"),
    ],
)
def test_bad_options(step: BlockTune, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ran(model(), step)


def test_it_needs_data() -> None:
    program = model()
    with pytest.raises(PassError, match="needs calibration data"):
        Runner(Context(), data.check_samples(program)).run(program, [BlockTune()])
    assert isinstance(BlockTune().plan(), Rtn)
