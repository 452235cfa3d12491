"""Calibration: segments, and statistics measured segment by segment against those of a whole run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from qcompiler import calibration
from qcompiler.calibration import Needs, Sample, Statistic, mark_segments, measure, sweep
from qcompiler.execution import execute
from qcompiler.ops import qc
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme
from tests.programs import Sketch, tiny_llama

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows(Statistic):
    """All rows seen, in order."""

    def start(self) -> list[Tensor]:
        return []

    def step(self, state: list[Tensor], x: Tensor) -> list[Tensor]:
        return [*state, x.clone()]

    def done(self, state: list[Tensor]) -> Tensor:
        return torch.cat(state) if state else torch.empty(0)


@dataclass(frozen=True)
class Count(Statistic):
    """How often something was seen."""

    def start(self) -> int:
        return 0

    def step(self, state: int, x: Tensor) -> int:
        return state + 1


def with_paths(program: Program) -> Program:
    """Give the calls the module path of the last parameter read before them, as a capture would."""
    path = ""
    for node in program.graph.nodes:
        if node.op == "get_attr":
            path = str(node.target).rpartition(".")[0]
        node.meta["path"] = path
    return program


def decoder(layers: int = 3) -> Program:
    return with_paths(tiny_llama(layers=layers))


def samples(*shapes: tuple[int, int], seed: int = 0) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 80, shape, generator=random)} for shape in shapes]


def activations(program: Program, data: Sequence[Sample]) -> dict[str, Tensor]:
    """The first arguments of the linear layers in whole runs, as rows without padding."""
    found: dict[str, list[Tensor]] = {}
    for sample in data:
        every: dict[fx.Node, Any] = {}
        execute(program.graph.nodes, program.bind(sample), program.tensors, every.__setitem__)
        real = sample.get("attention_mask", torch.ones_like(sample["input_ids"]))
        for node in program.calls(aten.linear.default, qc.linear):
            found.setdefault(node.name, []).append(every[node.args[0]][real != 0])  # type: ignore[index]
    return {name: torch.cat(rows) for name, rows in found.items()}


def everything(program: Program, statistic: Statistic) -> Needs:
    return {node.name: statistic for node in program.calls(aten.linear.default, qc.linear)}


# -- segments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 3])
def test_segments_are_the_layers(layers: int) -> None:
    program = with_paths(tiny_llama(layers=layers, tied=False))
    assert mark_segments(program) == layers + 2
    first = dict.fromkeys(("", "model.embed_tokens", "model.rotary_emb"), 0)
    last = dict.fromkeys(("model.norm", "lm_head"), layers + 1)
    for node in program.calls():
        path = node.meta["path"]
        expected = 1 + int(path.split(".")[2]) if "layers" in path else (first | last)[path]
        assert node.meta["segment"] == expected


def test_a_program_without_repetition_is_one_segment() -> None:
    assert mark_segments(decoder(1)) == 1
    assert mark_segments(tiny_llama(layers=2)) == 1  # no paths at all


def test_two_stacks() -> None:
    sk = Sketch()
    x = sk.input("x", ("batch", 4), torch.float32)
    for path in ("embed", "encoder.0", "encoder.1", "bridge", "decoder.0.experts.0", "decoder.1", "decoder.1", "head"):
        x = sk.call(aten.neg.default, x, to=("batch", 4))
        x.meta["path"] = path
    program = sk.done(y=x)
    assert mark_segments(program) == 6
    assert [node.meta["segment"] for node in program.calls()] == [0, 1, 2, 2, 3, 4, 4, 5]


# -- measuring -----------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=3), st.integers(1, 3))
def test_measured_is_what_a_whole_run_sees(shapes: list[tuple[int, int]], layers: int) -> None:
    program, data = decoder(layers), samples(*shapes)
    found = measure(program, data, everything(program, Rows()))
    expected = activations(program, data)
    assert set(found) == set(expected)
    for name, rows in expected.items():
        assert torch.equal(found[name], rows)
        assert found[name].shape == (sum(b * s for b, s in shapes), rows.shape[1])


def test_padding_does_not_count() -> None:
    program = decoder()
    (sample,) = samples((2, 5))
    sample["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = measure(program, [sample], everything(program, Rows()))
    for name, rows in activations(program, [sample]).items():
        assert rows.shape[0] == 8
        assert torch.equal(found[name], rows)


def test_only_what_is_needed_is_measured() -> None:
    program, data = decoder(), samples((1, 4), (2, 3))
    q, k = program.linears()[:2]
    assert measure(program, data, {}) == {}
    found = measure(program, data, {q.name: Count(), k.name: Count(), "no such node": Count()})
    assert found == {q.name: 2, k.name: 2}


def test_equal_needs_of_one_value_share_a_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v read the same activation: it is folded once."""
    program, steps = decoder(2), []
    step = Count.step
    monkeypatch.setattr(Count, "step", lambda self, state, x: (steps.append(1), step(self, state, x))[1])
    found = measure(program, samples((1, 4)), everything(program, Count()))
    assert set(found.values()) == {1}
    assert len(steps) == 2 * 4 + 1  # q k v | o | gate up | down, twice, and the head


def test_a_segment_sees_what_earlier_ones_have_become() -> None:
    """Quantize each segment's weights as the sweep goes: later segments measure the quantized model."""
    program, data, found = decoder(), samples((2, 6), (1, 3)), {}
    twin = decoder()
    scheme = Scheme.parse("int3")
    for segment in sweep(program, data, lambda nodes: everything(program, Rows())):
        found |= segment.statistics
        for node in segment.nodes:
            if node.target is aten.linear.default and "layers" in str(node.args[1].target):  # type: ignore[union-attr]
                name = str(node.args[1].target)  # type: ignore[union-attr]
                program.quantize_tensor(name, QTensor.quantize(program.tensors[name], scheme))
    names = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("self_attn.q_proj", "mlp.down_proj")]
    assert all(name in program.quantized for name in names)
    # What layer 1 measured is what a model with layer 0 quantized computes, and so on.
    linears = [node.name for node in twin.linears()]
    for i in range(3):
        seen = activations(twin, data)
        for j, node in enumerate(twin.calls(aten.linear.default, qc.linear)):
            if j // 7 == i:
                assert torch.equal(found[linears[j]], seen[node.name])
        for name in [n for n in list(twin.tensors) if n.startswith(f"model.layers.{i}.") and "proj" in n]:
            twin.quantize_tensor(name, QTensor.quantize(twin.tensors[name], scheme))
    (head,) = twin.linears()
    assert torch.equal(found[linears[-1]], activations(twin, data)[head.name])


def test_segments_are_described() -> None:
    program, told = decoder(2), []
    indices = []
    for segment in sweep(program, samples((1, 2)), lambda nodes: {}, lambda *news: told.append(news)):
        indices.append(segment.index)
        assert segment.count == 4
        assert segment.statistics == {}
        assert all(node.meta["segment"] == segment.index for node in segment.nodes)
    assert indices == [0, 1, 2, 3]
    assert told == [("calibrating", i, 4) for i in range(5)]


def test_the_logits_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads what comes after the last measured value; for a real vocabulary that is gigabytes."""
    program, widths = decoder(2), []

    def watched(nodes: Any, env: Any, tensors: Any, watch: Any = None) -> None:
        execute(nodes, env, tensors, watch)
        widths.extend(value.shape[-1] for value in env.values() if isinstance(value, Tensor))

    monkeypatch.setattr(calibration, "execute", watched)
    measure(program, samples((1, 4)), everything(program, Rows()))
    assert widths
    assert 80 not in widths


def test_a_sweep_that_only_measures_runs_each_node_once(monkeypatch: pytest.MonkeyPatch) -> None:
    program, runs = decoder(2), {True: 0, False: 0}
    found: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for changes in (True, False):

        def counted(nodes: Any, *rest: Any, changes: bool = changes) -> None:
            runs[changes] += len(list(nodes))
            execute(nodes, *rest)

        monkeypatch.setattr(calibration, "execute", counted)
        for segment in sweep(program, samples((1, 4)), lambda nodes: everything(program, Rows()), changes=changes):
            found[changes] |= segment.statistics
            assert bool(segment.inputs) == changes
    assert all(torch.equal(found[False][name], rows) for name, rows in found[True].items())
    assert runs[False] < len(list(program.calls())) < runs[True]


def test_nothing_of_the_caller_is_changed() -> None:
    program, state = decoder(2), torch.random.get_rng_state()
    before = program.fingerprint()
    for _ in sweep(program, samples((1, 4)), lambda nodes: everything(program, Rows())):
        assert torch.is_grad_enabled()
        break
    assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert program.fingerprint() == before
