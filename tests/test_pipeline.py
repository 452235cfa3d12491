"""The runner holds passes to their contracts, blames the right one, and leaves the program as it was when one fails."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qcompiler import calibration, pipeline, plugins
from qcompiler.calibration import Needs, Statistic
from qcompiler.comparison import mean_kl, relative_change
from qcompiler.errors import BackendError, ContractError, InputError, No, PassError, QCompilerError, RecipeError
from qcompiler.pipeline import Context, Contract, Pass, Runner
from qcompiler.plugins import FrontEnd, Plugin, Registry
from qcompiler.program import Program
from qcompiler.report import LayerRecord
from qcompiler.scheme import QTensor, Scheme
from qcompiler.target import Backend, Kernel, bits, group, k_multiple_of, place, without
from tests.programs import Sketch, tiny_llama

aten = torch.ops.aten
WEIGHT = "model.layers.0.mlp.up_proj.weight"
CHECKS = [
    {"input_ids": torch.arange(10).view(2, 5)},
    {"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
]


@dataclass(frozen=True)
class Does(Pass):
    """A pass that does what it is told."""

    name: ClassVar[str] = "does"
    contract: ClassVar[Contract] = Contract.LOSSY
    does: Callable[[Program, Context], Any] = lambda program, ctx: None

    def run(self, program: Program, ctx: Context) -> None:
        self.does(program, ctx)


class DoesExactly(Does):
    contract = Contract.EXACT


class Moves(Does):
    contract = Contract.LAYOUT


@dataclass(frozen=True)
class Mean(Statistic):
    """The mean of each channel."""

    def start(self) -> tuple[int, Any]:
        return 0, 0.0

    def step(self, state: tuple[int, Any], x: Tensor) -> tuple[int, Any]:
        return state[0] + len(x), state[1] + x.sum(0)

    def done(self, state: tuple[int, Any]) -> Any:
        return state[1] / state[0]


@dataclass(frozen=True)
class Largest(Mean):
    """Another statistic."""


@dataclass(frozen=True)
class Measures(Pass):
    """A pass that reads statistics of the first linear layers, and may change the model."""

    name: ClassVar[str] = "measures"
    contract: ClassVar[Contract] = Contract.LOSSY
    layers: int = 1
    change: float = 0.0
    seen: list[Any] | None = None

    def needs(self, program: Program) -> Needs:
        return {node.name: Mean() for node in program.linears()[: self.layers]}

    def run(self, program: Program, ctx: Context) -> None:
        assert len(ctx.statistics) == self.layers
        if self.seen is not None:
            self.seen.append(ctx.statistics)
        if self.change:
            program.tensors["model.norm.weight"] = program.tensors["model.norm.weight"] + self.change


class Looks(Measures):
    preserves = True


def runner(**options: Any) -> Runner:
    return Runner(Context(**options), CHECKS)


def scaled(name: str, factor: float) -> Callable[[Program, Context], None]:
    def change(program: Program, ctx: Context) -> None:
        program.tensors[name] = program.tensors[name] * factor

    return change


# -- what a pass is ------------------------------------------------------------------------------------------


def test_a_pass_is_its_text() -> None:
    @dataclass(frozen=True)
    class Rounds(Does):
        name: ClassVar[str] = "rounds"
        scheme: Scheme = Scheme.parse("int4:g128")
        include: tuple[str, ...] = ("*",)
        damping: float = 0.01

    assert str(Rounds()) == "rounds"
    assert str(Rounds(scheme=Scheme.parse("int3"), include=("a", "b"))) == "rounds{scheme=int3:channel:sym include=a|b}"
    assert not Rounds().uses_data
    assert Measures().uses_data
    assert Rounds().plan() == Rounds()


def test_the_context_keeps_what_passes_say() -> None:
    ctx, told = Context(seed=7, progress=lambda *news: told.append(news)), []
    program = tiny_llama(layers=1)
    nodes = program.linears()[:2]
    for node in ctx.each(nodes, "rounding"):
        assert ctx.node is node
    assert ctx.node is None
    assert told == [("rounding", 0, 2), ("rounding", 1, 2), ("rounding", 2, 2)]
    ctx.refuse(No("too small", "w"))
    ctx.note("fine")
    ctx.layer(LayerRecord("w", "int4", 20.0))
    assert ctx.record.refusals == ["w: too small"]
    assert ctx.record.notes == ["fine"]
    assert ctx.record.layers[0].name == "w"
    assert torch.equal(torch.rand(3, generator=ctx.generator()), torch.rand(3, generator=ctx.generator()))


# -- contracts -----------------------------------------------------------------------------------------------


def test_records_say_what_happened() -> None:
    def change(program: Program, ctx: Context) -> None:
        weight = QTensor.quantize(program.tensors[WEIGHT], Scheme.parse("int2"))
        program.quantize_tensor(WEIGHT, weight)
        ctx.note("rounded")

    program, run = tiny_llama(), runner()
    size = program.nbytes / 1e6
    run.run(program, [Does(does=change), Does()])
    first, second = run.records
    assert (first.name, first.contract, first.notes, first.changed) == ("does", "lossy", ["rounded"], True)
    assert first.megabytes == (size, program.nbytes / 1e6)
    assert first.nodes[1] == first.nodes[0] + 1  # two parts in the place of a weight
    assert first.output_change is not None
    assert first.output_change > 1e-3
    assert first.kl is not None
    assert first.kl > 0
    assert first.seconds > 0
    assert first.peak_rss_mb > 10
    assert (second.changed, second.output_change, second.notes) == (False, None, [])


def test_a_lossy_pass_may_change_the_outputs_and_an_exact_one_not() -> None:
    program = tiny_llama()
    before = program.fingerprint()
    with pytest.raises(
        ContractError,
        match=r'^pass "does": it is declared exact but changed the outputs by \d\.\d\de-0\d \(allowed 2e-04\)',
    ):
        runner().run(program, [DoesExactly(does=scaled(WEIGHT, 1.05))])
    assert program.fingerprint() == before
    runner().run(program, [Does(does=scaled(WEIGHT, 1.05))])
    assert program.fingerprint() != before


def test_an_exact_pass_may_round() -> None:
    def change(program: Program, ctx: Context) -> None:
        norm, up = "model.layers.0.post_attention_layernorm.weight", ("up_proj", "gate_proj")
        program.tensors[norm] = program.tensors[norm] * 3
        for part in up:
            program.tensors[f"model.layers.0.mlp.{part}.weight"] = (
                program.tensors[f"model.layers.0.mlp.{part}.weight"] / 3
            )

    run = runner()
    run.run(tiny_llama(), [DoesExactly(does=change)])
    assert run.records[0].changed
    assert run.records[0].output_change is not None
    assert run.records[0].output_change < 2e-4


def test_what_padding_computes_is_nobodys() -> None:
    """An exact pass may change outputs at padded positions."""

    def change(program: Program, ctx: Context) -> None:
        (logits,) = program.output_node.args[0]  # type: ignore[misc, union-attr]
        mask = program.placeholders[1]
        with program.graph.inserting_before(program.output_node):
            column = program.call(aten.unsqueeze.default, (mask, -1), like=mask)
            masked = program.call(aten.mul.Tensor, (logits, column), like=logits)
        program.output_node.args = ((masked,),)

    runner().run(tiny_llama(), [DoesExactly(does=change)])


def test_not_finite() -> None:
    with pytest.raises(ContractError, match='pass "does": the outputs are no longer finite after it'):
        runner().run(tiny_llama(), [Does(does=scaled(WEIGHT, float("nan")))])


def test_a_missing_output_is_noticed() -> None:
    sk = Sketch()
    x = sk.input("x", ("batch", 2), torch.float32)
    program = sk.done(y=sk.call(aten.neg.default, x, to=("batch", 2)), z=x)

    def drop(program: Program, ctx: Context) -> None:
        program.outputs = ("y",)
        program.output_node.args = (program.output_node.args[0][:1],)  # type: ignore[index]

    def reshape(program: Program, ctx: Context) -> None:
        program.output_node.args = ((x, program.placeholders[0]),)
        with program.graph.inserting_before(program.output_node):
            less = program.call(aten.select.int, (program.placeholders[0], 1, 0), like=program.placeholders[0])
        program.output_node.args = ((less, less),)

    checks = [{"x": torch.randn(3, 2)}]
    for does, message in ((drop, 'output "z" is gone'), (reshape, r'output "y" had shape \(3, 2\) and now has \(3,\)')):
        with pytest.raises(ContractError, match=f'^pass "does": {message}'):
            Runner(Context(), checks).run(program, [Does(does=does)])
        assert program.outputs == ("y", "z")


def test_a_layout_pass_keeps_every_bit() -> None:
    program = tiny_llama()
    q = QTensor.quantize(program.tensors[WEIGHT], Scheme.parse("int4:g48"))
    program.quantize_tensor(WEIGHT, q)
    wide = q.with_parts(scale=q.parts()["scale"].float())
    moves = [Moves(does=lambda p, ctx: p.replace_qtensor(WEIGHT, wide))]
    runner().run(program, moves)
    assert program.tensors[f"{WEIGHT}::scale"].dtype == torch.float32
    other = q.with_parts(scale=q.parts()["scale"].float() * (1 + 1e-7))
    with pytest.raises(ContractError, match=f'it is declared a layout change but "{WEIGHT}" no longer dequantizes to'):
        runner().run(program, [Moves(does=lambda p, ctx: p.replace_qtensor(WEIGHT, other))])
    name = "model.layers.1.mlp.up_proj.weight"
    coarse = QTensor.quantize(program.tensors[name], Scheme.parse("int8"))
    with pytest.raises(ContractError, match=f'"{name}" is not the same tensor, bit for bit'):
        runner().run(program, [Moves(does=lambda p, ctx: p.quantize_tensor(name, coarse))])


def test_writing_in_place_is_found() -> None:
    with pytest.raises(
        ContractError, match=f'pass "does": it wrote into tensor "{WEIGHT}" in place; store a new tensor'
    ):
        runner().run(tiny_llama(), [Does(does=lambda p, ctx: p.tensors[WEIGHT].add_(1))])


def test_dead_code_of_a_pass_is_cleaned() -> None:
    def litter(program: Program, ctx: Context) -> None:
        with program.graph.inserting_before(program.output_node):
            program.call(aten.neg.default, (program.linears()[0],), like=program.linears()[0])
        program.tensors["litter"] = torch.zeros(3)

    program, run = tiny_llama(), runner()
    before = program.fingerprint()
    run.run(program, [DoesExactly(does=litter)])
    assert program.fingerprint() == before
    assert not run.records[0].changed


def decoder_with_cache(broken: bool = False) -> Program:
    """The sum of all inputs so far, kept in a cache; or, broken, of the new ones only."""
    sk = Sketch()
    x = sk.input("input_ids", ("batch", "sequence"), torch.float32)
    past = sk.input("past", ("batch", "past"), torch.float32, "empty")
    grown = sk.call(aten.cat.default, [past, x], 1, to=("batch", "total"))
    length = sk.size(x, 1)
    total = sk.call(aten.cumsum.default, x if broken else grown, 1, to=("batch", "total"))
    start = sk.call(aten.sym_size.int, past, 1, to=())
    start.meta["type"] = None
    y = total if broken else sk.call(aten.narrow.default, total, 1, start, length, to=("batch", "sequence"))
    program = sk.done(sums=y, grown=grown)
    program.info["caches"] = {"past": "grown"}
    return program


def test_programs_with_caches_are_also_run_in_pieces() -> None:
    checks = [{"input_ids": torch.randn(2, 7)}]
    Runner(Context(), checks).run(decoder_with_cache(), [Does()])

    def forget(program: Program, ctx: Context) -> None:
        program.restore(decoder_with_cache(broken=True))

    program = decoder_with_cache()
    with pytest.raises(
        ContractError, match=r'pass "does": prefill then decode differs from one run by .* \(allowed 2e-04\)'
    ):
        Runner(Context(), checks).run(program, [DoesExactly(does=forget)])
    assert program.text() == decoder_with_cache().text()


# -- failing -------------------------------------------------------------------------------------------------


def broken(program: Program, ctx: Context) -> None:
    program.tensors.pop("model.norm.weight")
    program.info["half"] = "done"
    for node in ctx.each(program.linears(), "working"):
        node.meta["path"] = "layers.0.q_proj"
        raise KeyError("what")


@pytest.mark.parametrize(
    ("does", "kind", "message"),
    [
        (broken, PassError, r'^pass "does" at node "linear_default" \(layers.0.q_proj\): KeyError: \'what\'$'),
        (
            lambda p, ctx: p.tensors.clear(),
            QCompilerError,
            '^pass "does": node "model.*" reads tensor "model.*", which does',
        ),
        (lambda p, ctx: p.qtensor("x"), PassError, '^pass "does": KeyError: '),
        (lambda p, ctx: Scheme.parse("int1"), RecipeError, '^pass "does": scheme "int1": a scheme has 2 to 8 bits'),
    ],
)
def test_a_failing_pass_is_blamed_and_undone(does: Any, kind: type[Exception], message: str) -> None:
    program, run = tiny_llama(), runner()
    before = program.fingerprint()
    with pytest.raises(kind, match=message) as info:
        run.run(program, [Does(), Does(does=does), Does(does=lambda p, ctx: pytest.fail("not reached"))])
    assert type(info.value) is kind
    assert program.fingerprint() == before
    assert program.info == {}
    assert [record.name for record in run.records] == ["does"]
    assert run.context.node is None
    program.verify()


def test_gradients_and_chance_are_the_callers() -> None:
    program, state = tiny_llama(), torch.random.get_rng_state()
    program.tensors[WEIGHT] = torch.nn.Parameter(program.tensors[WEIGHT])
    grad: list[bool] = []
    runner().run(program, [Does(does=lambda p, ctx: grad.append(torch.is_grad_enabled()))])
    assert grad == [False]
    assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_check_samples() -> None:
    run = Runner(Context(), [])
    run.run(tiny_llama(), [DoesExactly(does=scaled(WEIGHT, 2.0))])
    assert run.records[0].output_change == 0.0


# -- statistics ----------------------------------------------------------------------------------------------


def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many statistics each sweep measured."""
    found: list[int] = []
    measure = calibration.measure

    def counted(program: Program, samples: Any, needs: Needs, progress: Any) -> Any:
        found.append(len(needs))
        return measure(program, samples, needs, progress)

    monkeypatch.setattr(calibration, "measure", counted)
    return found


def test_neighbours_that_preserve_share_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    found, run = sweeps(monkeypatch), runner(samples=CHECKS)
    run.run(tiny_llama(), [Looks(layers=2), Looks(layers=5), Looks(layers=1)])
    assert found == [5]


def test_a_change_makes_statistics_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = sweeps(monkeypatch), []
    passes = [
        Measures(1, 0.0, seen),
        Measures(1, 1.0, seen),
        Measures(1, 0.0, seen),
        Looks(1, 1.0, seen),
        Measures(1, 0.0, seen),
    ]
    runner(samples=CHECKS).run(tiny_llama(), passes)
    assert found == [1, 1]  # before the change, and after it; not after what changed nothing or preserves
    (name,) = seen[0]
    assert torch.equal(seen[0][name], seen[2][name])  # the final norm comes after the first layer


def test_different_statistics_of_one_node_take_two_sweeps() -> None:
    one, other = Mean(), Largest()
    found = pipeline._compatible([{"a": one, "b": one}, {"a": other, "c": one}])
    assert [sorted(sweep) for sweep in found] == [["a", "b", "c"], ["a"]]


def test_no_data_and_bad_needs() -> None:
    with pytest.raises(PassError, match='pass "measures" needs calibration data and there is none; give some'):
        runner().run(tiny_llama(), [Measures()])

    class Confused(Measures):
        def needs(self, program: Program) -> Needs:
            raise IndexError("lost")

    with pytest.raises(PassError, match=r'^pass "measures": IndexError: lost$'):
        runner(samples=CHECKS).run(tiny_llama(), [Confused()])


# -- comparing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [2.0, -4.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0], [1e-30], 1.0),
        ([float("-inf"), 2.0], [float("-inf"), 1.0], 0.5),
        ([float("-inf"), 2.0], [0.0, 2.0], float("inf")),
        ([1.0], [float("nan")], float("inf")),
        ([float("nan")], [float("nan")], float("inf")),
        ([], [], 0.0),
    ],
)
def test_relative_change(old: list[float], new: list[float], expected: float) -> None:
    assert relative_change({"y": torch.tensor(old)}, {"y": torch.tensor(new)}) == pytest.approx(expected)


def test_relative_change_of_integers_and_padding() -> None:
    same, other = {"y": torch.tensor([1, 2])}, {"y": torch.tensor([1, 3])}
    assert relative_change(same, same) == 0.0
    assert relative_change(same, other) == float("inf")
    one, two = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    two[0, 0] = 5
    assert relative_change({"y": one}, {"y": two}, torch.tensor([[0, 1]])) == 0.0
    assert relative_change({"y": one}, {"y": two}, torch.tensor([[1, 1]])) == 4.0


def test_mean_kl() -> None:
    p, q = torch.tensor([[[0.25, 0.75]]]), torch.tensor([[[0.5, 0.5]]])
    expected = float((p * (p / q).log()).sum())
    assert mean_kl([{"logits": p.log()}], [{"logits": q.log() + 3}]) == pytest.approx(expected, rel=1e-6)
    assert mean_kl([{"logits": p.log()}], [{"logits": p.log()}]) == pytest.approx(0, abs=1e-9)
    assert mean_kl([{"hidden": p}], [{"hidden": q}]) is None
    assert mean_kl([], []) is None


# -- placing -------------------------------------------------------------------------------------------------


class Anything(Backend):
    name = "anything"

    def accepts(self, program: Program, node: Any) -> Any:
        return True

    def lower(self, program: Program, folder: Path | None = None) -> Any:
        return None


class Picky(Anything):
    name = "picky"

    def accepts(self, program: Program, node: Any) -> Any:
        return node.target is not aten.silu.default or No("no silu here")


class Absent(Anything):
    name = "absent"

    def available(self) -> Any:
        return No("no such chip")


def test_place_keeps_every_refusal() -> None:
    program = tiny_llama(layers=2)
    placed = place(program, [Absent(), Picky(), Anything()])
    assert placed.backend.name == "anything"
    assert [str(no) for no in placed.refusals] == [
        *("backend absent: no such chip", "silu_default: picky: no silu here", "silu_default_1: picky: no silu here"),
    ]
    with pytest.raises(
        BackendError, match=r"no backend of \['absent', 'picky'\] can run this program: backend absent: no"
    ):
        place(program, [Absent(), Picky()])


def test_conditions_print_and_refuse() -> None:
    accepts = bits(4, 8) & group(32, 64) & k_multiple_of(64) & without("permutation", "codebook")
    assert str(accepts) == "bits(4, 8) & group(32, 64) & k_multiple_of(64) & without(permutation, codebook)"

    def answer(columns: int, scheme: str, **parts: Any) -> str:
        found = accepts(QTensor.quantize(torch.randn(2, columns), Scheme.parse(scheme)).with_parts(**parts))
        return str(found)

    assert answer(128, "int4:g32") == "True"
    assert answer(128, "int3:g32") == "3 bits, not one of [4, 8]"
    assert answer(128, "int4:g16") == "groups of 16, not one of [32, 64]"
    assert answer(96, "int4:g32") == "k=96 is not a multiple of 64"
    assert answer(128, "int4:g32", permutation=torch.arange(128)) == "has a permutation"


# -- plugins -------------------------------------------------------------------------------------------------


class Point:
    """An entry point."""

    def __init__(self, name: str, value: Any, source: str = "stranger:PLUGIN") -> None:
        self.name, self._value, self.value = name, value, source

    def load(self) -> Any:
        if isinstance(self._value, BaseException):
            raise self._value
        return self._value


def test_broken_plugins_are_isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text("passes: [does]")
    mine = Plugin(passes=(Does,), backends=(Anything,), recipes=tmp_path)
    points = [
        Point("thief", Plugin(passes=(Moves,))),
        Point("crash", ImportError("no module named chips")),
        Point("quits", SystemExit(3)),
        Point("wrong", 3),
        Point("twice", Plugin(passes=(Measures, Looks))),
        Point("built in", mine, "qcompiler.passes:PLUGIN"),
        Point("good", Plugin(kernels=(Kernel("k", "qc.linear", bits(4)),))),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    plugins.registry.cache_clear()
    try:
        found = plugins.registry()
        assert set(found.passes) == {"does"}
        assert set(found.backends) == {"anything"}
        assert found.recipes == {"quick": tmp_path / "quick.yaml"}
        assert set(found.kernels) == {"k"}
        assert found.owners["does"] == "built in"
        assert [str(no) for no in found.broken] == [
            "plugin crash: ImportError: no module named chips",
            "plugin quits: SystemExit: 3",
            'plugin thief: RecipeError: "does" is already taken by plugin "built in"; plugin "thief" must rename it',
            'plugin twice: RecipeError: "measures" is already taken by plugin "twice"; plugin "twice" must rename it',
            "plugin wrong: TypeError: stranger:PLUGIN is of type int, not a Plugin",
        ]
        assert plugins.lookup("passes", "does") is Does
        with pytest.raises(
            RecipeError, match=r'there is no pass "dose"; did you mean "does"\? Known: does; not loaded: '
        ):
            plugins.lookup("passes", "dose")
        points[:] = points[1:5]
        plugins.registry.cache_clear()
        with pytest.raises(InputError, match=r"not installed properly: no plugins found; run: pip install -e \."):
            plugins.registry()
    finally:
        plugins.registry.cache_clear()


def test_a_plugin_is_taken_whole_or_not_at_all() -> None:
    registry = Registry()
    registry.add("one", Plugin(passes=(Does,)))
    front_end = FrontEnd("new", lambda source: True, lambda source, inputs: None)
    with pytest.raises(RecipeError):
        registry.add("two", Plugin(frontends=(front_end,), passes=(Does,)))
    assert registry.frontends == {}
