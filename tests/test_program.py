"""Programs: they run, print, change and fingerprint as their description says, and refuse what is not well-formed."""

import gc
import operator
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from qcompiler.errors import InputError, QCompilerError
from qcompiler.execution import execute
from qcompiler.ops import qc
from qcompiler.program import Input, Program, Type, type_of
from qcompiler.scheme import QTensor, Scheme, part_names
from qcompiler.text import target_name
from tests.programs import BS, Sketch, tiny_encoder, tiny_llama

aten = torch.ops.aten
IDS = torch.arange(12).view(2, 6)
QUANTIZED = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")


@pytest.fixture
def program() -> Program:
    return tiny_llama(bias=True)


def quantize(program: Program, name: str, scheme: str = "int8:g48:asym") -> QTensor:
    q = QTensor.quantize(program.tensors[name], Scheme.parse(scheme))
    program.quantize_tensor(name, q)
    return q


# -- running -------------------------------------------------------------------------------------------------


def test_a_program_is_its_graph(program: Program) -> None:
    """The same as torch.fx running the same graph."""
    root = torch.nn.Module()
    graph = program.copy().graph
    for i, node in enumerate(n for n in graph.nodes if n.op == "get_attr"):
        root.register_buffer(f"t{i}", program.tensors[str(node.target)])
        node.target = f"t{i}"
    module = fx.GraphModule(root, graph)
    positions = torch.arange(6).expand(2, -1)
    (expected,) = module(IDS, torch.ones_like(IDS), positions)
    found = program(input_ids=IDS)
    assert list(found) == ["logits"]
    assert torch.equal(found["logits"], expected)
    assert not found["logits"].requires_grad


def test_defaults_are_what_their_names_say(program: Program) -> None:
    given_all = program(input_ids=IDS, attention_mask=torch.ones_like(IDS), position_ids=torch.arange(6).expand(2, -1))
    assert torch.equal(program(input_ids=IDS)["logits"], given_all["logits"])
    shifted = program(input_ids=IDS, position_ids=torch.arange(6).expand(2, -1) + 5)
    assert torch.allclose(shifted["logits"], given_all["logits"], atol=1e-4)  # rotary positions are relative


def test_defaults_of_a_program_with_a_cache() -> None:
    sk = Sketch()
    ids = sk.input("input_ids", BS, torch.int64)
    mask = sk.input("attention_mask", ("batch", "total"), torch.int64, "ones")
    positions = sk.input("position_ids", BS, torch.int64, "positions")
    kept = sk.input("logits_positions", ("kept",), torch.int64, "every")
    past = sk.input("past", ("batch", 2, "past", 3), torch.float16, "empty")
    grown = sk.call(aten.cat.default, [past, past], 2, to=("batch", 2, "total", 3), dtype=torch.float16)
    program = sk.done(ids=ids, mask=mask, positions=positions, kept=kept, grown=grown)
    program.info["caches"] = {"past": "grown"}
    first = program(input_ids=IDS)
    assert first["mask"].tolist() == [[1] * 6] * 2
    assert first["positions"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert first["kept"].tolist() == [0, 1, 2, 3, 4, 5]
    assert first["grown"].shape == (2, 2, 0, 3)
    assert first["grown"].dtype == torch.float16
    later = program(input_ids=IDS[:, :1], past=torch.zeros(2, 2, 4, 3).half())
    assert later["mask"].tolist() == [[1] * 5] * 2
    assert later["positions"].tolist() == [[4]] * 2
    assert later["kept"].tolist() == [0]
    assert program.cache_updates(later)["past"] is later["grown"]
    assert [i.name for i in program.caches] == ["past"]


def test_inputs_are_checked(program: Program) -> None:
    with pytest.raises(InputError, match=r"unknown input \['ids'\]; the program takes \['attention_mask', 'input_ids'"):
        program(input_ids=IDS, ids=IDS)
    with pytest.raises(InputError, match=r'input "input_ids" is missing; the program takes \[.input_ids'):
        program(attention_mask=torch.ones_like(IDS))


def test_values_are_dropped_after_their_last_use(program: Program) -> None:
    alive: list[int] = []
    env = program.bind({"input_ids": IDS})
    execute(program.graph.nodes, env, program.tensors, lambda node, value: alive.append(len(env)))
    assert set(env) == {program.output_node}
    assert max(alive) < 15  # of some 60 calls


def test_values_used_outside_the_list_stay(program: Program) -> None:
    calls = list(program.calls())
    whole = program.bind({"input_ids": IDS})
    parts = dict(whole)
    execute(program.graph.nodes, whole, program.tensors)
    for start in range(0, len(calls), 7):
        execute(calls[start : start + 7], parts, program.tensors)
    execute([program.output_node], parts, program.tensors)
    assert torch.equal(parts[program.output_node][0], whole[program.output_node][0])


# -- reading -------------------------------------------------------------------------------------------------


def test_text(golden: Callable[[str, str], None]) -> None:
    program = tiny_llama(layers=1)
    quantize(program, "model.layers.0.mlp.up_proj.weight", "int4:g48")
    golden("program/tiny_llama", program.text())
    golden("program/tiny_encoder", tiny_encoder().text())


@given(st.lists(st.integers(0, 9) | st.sampled_from(["batch", "2*s + 1"]), max_size=4))
def test_types_print(shape: list[int | str]) -> None:
    kind = Type(tuple(shape), torch.bfloat16)
    assert str(kind) == f"bfloat16[{', '.join(str(size) for size in shape)}]"
    assert kind.rank == len(shape)


def test_type_of() -> None:
    value = torch.zeros(2, 3, dtype=torch.int8)
    assert type_of((value, [value], 3)) == (Type((2, 3), torch.int8), (Type((2, 3), torch.int8),), None)
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = mode.from_tensor(torch.zeros(4, 6))
        exported = torch.export.export(
            torch.nn.Flatten(0), (torch.zeros(4, 6),), dynamic_shapes=({0: torch.export.Dim("n")},)
        )
    assert type_of(fake).rank == 2
    node = exported.graph.output_node().args[0][0]
    symbol = str(next(iter(exported.range_constraints)))
    assert type_of(node.meta["val"], {symbol: "batch"}).shape == ("6*batch",)


def test_target_names() -> None:
    assert target_name(aten.add.Tensor) == "aten.add.Tensor"
    assert target_name(qc.rope) == "qc.rope"
    assert target_name(operator.getitem) == "operator.getitem"
    assert target_name(torch.sym_max) == "torch.sym_max"


def test_calls_survive_their_replacement(program: Program) -> None:
    seen = 0
    for node in program.calls(aten.silu.default, aten.add.Tensor):
        program.replace(node, node.target, node.args)
        seen += 1
    assert seen == 2 + 4
    program.verify()


def test_linears(program: Program) -> None:
    assert len(program.linears()) == 2 * 7 + 1
    quantize(program, "model.layers.0.mlp.up_proj.weight")
    assert len(program.linears()) == 2 * 7
    assert program.tensor_of(program.linears()[0].args[1]) is program.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert program.tensor_of(program.linears()[0].args[0]) is None
    assert program.tensor_of(3) is None


# -- changing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantize_and_restore(program: Program, name: str) -> None:
    """At every use of the tensor: a linear, an embedding tied to a linear, a norm."""
    before = program(input_ids=IDS)["logits"]
    nbytes, size = program.nbytes, program.tensors[name].nbytes
    q = quantize(program, name, "int8:tensor" if "norm" in name else "int8:g48:asym")
    program.verify()
    assert name not in program.tensors
    assert program.nbytes == nbytes - size + q.nbytes
    assert torch.equal(program.qtensor(name).dequantize(), q.dequantize())
    after = program(input_ids=IDS)["logits"]
    assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()
    twin = tiny_llama(bias=True)
    twin.tensors[name] = q.dequantize()
    assert torch.equal(after, twin(input_ids=IDS)["logits"])
    coarse = QTensor.quantize(q.dequantize(), Scheme.parse("int2"))
    program.replace_qtensor(name, coarse)
    program.verify()
    twin.tensors[name] = coarse.dequantize()
    assert torch.equal(program(input_ids=IDS)["logits"], twin(input_ids=IDS)["logits"])
    program.restore_tensor(name)
    program.verify()
    assert program.quantized == {}
    assert torch.equal(program(input_ids=IDS)["logits"], twin(input_ids=IDS)["logits"])


def test_quantized_nodes_keep_their_origin(program: Program) -> None:
    for node in program.graph.nodes:
        node.meta |= {"path": f"at.{node.name}", "segment": 3}
    quantize(program, "model.layers.0.mlp.up_proj.weight")
    (node,) = program.calls(qc.linear)
    assert node.meta["path"].startswith("at.linear")
    assert all(part.meta["segment"] == 3 for part in node.args[1])  # type: ignore[union-attr]
    assert node.meta["type"] == Type((*BS, 96), torch.float32)


def test_a_bias_given_by_name_is_kept() -> None:
    sk = Sketch()
    x = sk.input("x", ("batch", 4), torch.float32)
    weight, bias = sk.parameter("w", 3, 4), sk.parameter("b", 3, spread=1.0)
    program = sk.done(y=sk.call(aten.linear.default, x, weight, bias=bias, to=("batch", 3)))
    q = quantize(program, "w", "int8")
    value = torch.randn(2, 4)
    expected = torch.nn.functional.linear(value, q.dequantize(), program.tensors["b"])
    assert torch.equal(program(x=value)["y"], expected)


def test_clean_removes_what_nobody_reads(program: Program) -> None:
    (logits,) = program.output_node.args[0]  # type: ignore[misc, union-attr]
    with program.graph.inserting_before(program.output_node):
        dead = program.call(aten.mul.Tensor, (logits, program.get("model.norm.weight")), like=logits)
        program.call(aten.neg.default, (dead,), like=logits)
    program.tensors["unused"] = torch.zeros(1)
    program.quantized["unused"] = '{"parts": []}'
    program.codes["gone"] = QTensor.quantize(torch.ones(1, 2), Scheme.parse("int4"))
    before = program.text()
    assert program.clean() == 3
    assert "aten.neg" in before
    assert program.text() == tiny_llama(bias=True).text()
    assert "unused" not in program.tensors
    assert program.quantized == {}
    assert program.codes == {}
    assert program.clean() == 0


def test_copies_are_independent(program: Program) -> None:
    program.info["deep"] = {"list": [1]}
    text, print_ = program.text(), program.fingerprint()
    copy = program.copy()
    assert copy.text() == text
    assert copy.fingerprint() == print_
    quantize(copy, "model.embed_tokens.weight")
    copy.info["deep"]["list"].append(2)
    copy.outputs = ("other",)
    assert program.text() == text
    assert program.fingerprint() == print_
    assert program.info == {"deep": {"list": [1]}}
    snapshot = program.copy()
    quantize(program, "model.embed_tokens.weight")
    program.info["deep"]["list"].append(3)
    program.restore(snapshot)
    assert program.fingerprint() == print_
    assert program.info == {"deep": {"list": [1]}}
    quantize(program, "model.embed_tokens.weight")  # the snapshot can be used again
    program.restore(snapshot)
    assert program.fingerprint() == print_


# -- fingerprints --------------------------------------------------------------------------------------------


def another(program: Program, tensor: torch.Tensor) -> None:
    program.tensors["model.norm.weight"] = tensor


CHANGES: dict[str, Callable[[Program], Any]] = {
    "a value": lambda p: another(p, p.tensors["model.norm.weight"] + 1e-6),
    "in place": lambda p: p.tensors["model.norm.weight"].mul_(1.5),
    "a dtype": lambda p: another(p, p.tensors["model.norm.weight"].view(torch.int32)),
    "a shape": lambda p: another(p, p.tensors["model.norm.weight"].view(8, 8)),
    "an argument": lambda p: next(p.calls(aten.transpose.int)).update_arg(2, 3),
    "an operator": lambda p: setattr(next(p.calls(aten.silu.default)), "target", aten.relu.default),
    "an output name": lambda p: setattr(p, "outputs", ("scores",)),
    "a quantized tensor": lambda p: quantize(p, "model.embed_tokens.weight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprints_see(program: Program, change: str) -> None:
    before = program.fingerprint()
    assert program.fingerprint() == before == tiny_llama(bias=True).fingerprint()
    CHANGES[change](program)
    assert program.fingerprint() != before


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([torch.bfloat16, torch.bool, torch.float64, torch.float8_e4m3fn]),
    st.lists(st.integers(0, 3), max_size=3),
)
def test_any_tensor_has_a_fingerprint(dtype: torch.dtype, shape: list[int]) -> None:
    sk = Sketch()
    program = sk.done(y=sk.constant("t", torch.zeros(shape).to(dtype)))
    before = program.fingerprint()
    program.tensors["t"] = program.tensors["t"].clone()
    assert program.fingerprint() == before
    if program.tensors["t"].dim() > 1:  # the same numbers, stored otherwise
        program.tensors["t"] = program.tensors["t"].transpose(0, 1).contiguous().transpose(0, 1)
        assert program.fingerprint() == before


# -- checking ------------------------------------------------------------------------------------------------


def late(program: Program) -> None:
    silu, last = next(program.calls(aten.silu.default)), list(program.calls(aten.add.Tensor))[-1]
    silu.update_arg(0, last)


FAULTS: list[tuple[Callable[[Program], Any], str]] = [
    (
        lambda p: setattr(p, "inputs", p.inputs[:1]),
        r"placeholders \['input_ids', .* are not the inputs \['input_ids'\]",
    ),
    (late, r'node "silu\w*" uses "\w+", which comes later or is gone'),
    (lambda p: p.tensors.pop("model.norm.weight"), 'reads tensor "model.norm.weight", which does not exist'),
    (
        lambda p: setattr(next(p.calls()), "op", "call_module"),
        "is a call_module; programs hold calls of functions only",
    ),
    (lambda p: next(p.calls()).meta.pop("type"), r'node "\w+" has no type'),
    (lambda p: p.quantized.update(a='{"parts": ["codes"]}'), 'quantized tensor "a" has no part "codes"'),
    (lambda p: setattr(p, "outputs", ("a", "b")), r"the output node does not give the outputs \['a', 'b'\]"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_verify_names_what_is_wrong(program: Program, fault: Callable[[Program], Any], message: str) -> None:
    program.verify()
    fault(program)
    with pytest.raises(QCompilerError, match=message):
        program.verify()


def test_nested_part_names() -> None:
    spec = '{"parts": ["codes", ["scale", {"parts": ["codes", ["scale", {"parts": ["codes"]}]]}]]}'
    assert part_names(spec) == ["codes", "scale.codes", "scale.scale.codes"]


def test_a_program_of_two_outputs_runs() -> None:
    program = tiny_encoder()
    found = program(input_ids=IDS)
    assert list(found) == ["last_hidden_state", "first_half"]
    assert torch.equal(found["first_half"], found["last_hidden_state"][..., :16])
    assert Input("x", Type((1,), torch.int64)).default == ""


def test_fingerprints_keep_no_tensor_alive() -> None:
    program = tiny_llama()
    name = "model.layers.0.mlp.up_proj.weight"
    program.fingerprint()
    gone = weakref.ref(program.tensors[name])
    program.quantize_tensor(name, QTensor.quantize(program.tensors[name], Scheme.parse("int4:g32")))
    program.fingerprint()
    gc.collect()
    assert gone() is None
