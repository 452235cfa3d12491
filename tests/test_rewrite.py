"""Patterns and rules: what matches, in which order, what is bound, and what is told when it does not."""

import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from qcompiler.errors import No
from qcompiler.program import Program
from qcompiler.rewrite import (
    Capture,
    Pattern,
    Rule,
    apply,
    arguments,
    matches,
    op,
    op_name,
    same,
    traced,
)
from tests.programs import Sketch

aten = torch.ops.aten
SHAPE = ("batch", 8)
x, y, z = map(Capture, "xyz")


class Drawing(Sketch):
    """A sketch of elementwise calls on values [batch, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (self.input(name, SHAPE, torch.float32) for name in "ab")

    def do(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.call(target, *args, to=SHAPE, **kwargs)


def mul(d: Drawing, left: Any, right: Any) -> fx.Node:
    return d.do(aten.mul.Tensor, left, right)


# -- matching --------------------------------------------------------------------------------------------------


def test_captures_bind_the_arguments() -> None:
    d = Drawing()
    assert matches(x - y, d.do(aten.sub.Tensor, d.a, d.b)) == {"x": d.a, "y": d.b}


def test_a_capture_used_twice_must_be_the_same_value() -> None:
    d = Drawing()
    assert matches(x * x, mul(d, d.a, d.a)) == {"x": d.a}
    assert matches(x * x, mul(d, d.a, d.b)) is None


def test_commutative_calls_match_in_both_orders() -> None:
    d = Drawing()
    root = d.do(aten.rsqrt.default, d.a)
    for node in (mul(d, root, d.b), mul(d, d.b, root)):
        assert matches(op.rsqrt(x) * y, node) == {"x": d.a, "y": d.b}


def test_other_calls_match_in_their_order_only() -> None:
    d = Drawing()
    root = d.do(aten.rsqrt.default, d.a)
    assert matches(op.rsqrt(x) - y, d.do(aten.sub.Tensor, d.b, root)) is None


def test_matching_goes_back_when_the_first_order_leads_nowhere() -> None:
    d = Drawing()
    node = d.do(aten.add.Tensor, mul(d, d.a, d.b), mul(d, d.b, d.do(aten.neg.default, d.b)))
    # The first product binds x to a; only the other way round can the second one match.
    assert matches(x * y + x * -x, node) == {"x": d.b, "y": d.a}


def test_any_spelling_will_do() -> None:
    d = Drawing()
    square = x**2 | x * x | op.square(x)
    for node in (d.do(aten.pow.Tensor_Scalar, d.a, 2.0), mul(d, d.a, d.a), d.do(aten.square.default, d.a)):
        assert matches(square, node) == {"x": d.a}
    assert matches(square, d.do(aten.pow.Tensor_Scalar, d.a, 3)) is None


def test_options_that_a_pattern_does_not_mention_must_be_the_default() -> None:
    d = Drawing()
    assert matches(x + y, d.do(aten.add.Tensor, d.a, d.b)) is not None
    assert matches(x + y, d.do(aten.add.Tensor, d.a, d.b, alpha=1)) is not None
    assert matches(x + y, d.do(aten.add.Tensor, d.a, d.b, alpha=2)) is None
    assert matches(op.add(x, y, alpha=z), d.do(aten.add.Tensor, d.a, d.b, alpha=2)) == {"x": d.a, "y": d.b, "z": 2}


def test_reflected_operators_make_the_same_pattern() -> None:
    d = Drawing()
    assert matches(2 + x, d.do(aten.add.Tensor, d.a, 2)) == {"x": d.a}
    assert matches(2 * x, d.do(aten.mul.Tensor, d.a, 2)) == {"x": d.a}


def test_lists_match_item_by_item() -> None:
    d = Drawing()
    node = d.call(aten.cat.default, [d.a, d.b], -1, to=("batch", 16))
    assert matches(op.cat([x, y], -1), node) == {"x": d.a, "y": d.b}
    assert matches(op.cat([x, y, z], -1), node) is None


def test_numbers_and_flags_are_different_things() -> None:
    assert same(2, 2.0)
    assert not same(1, True)
    assert not same([1, 2], [1, 2, 3])


def test_results_of_a_split_and_ops_of_our_own_have_names() -> None:
    d = Drawing()
    pair = d.do(aten.split_with_sizes.default, d.a, [4, 4], -1)
    half = d.do(operator.getitem, pair, 1)
    assert op_name(half) == "getitem"
    assert matches(op.getitem(op.split_with_sizes(x, [y, y], -1), 1), half) == {"x": d.a, "y": 4}
    assert op_name(d.a) == op_name(3) == ""


# -- one spelling of arguments ---------------------------------------------------------------------------------


@given(dim=st.integers(-3, 2))
def test_dimensions_are_counted_from_the_end(dim: int) -> None:
    d = Sketch()
    a = d.input("a", ("batch", 4, 6), torch.float32)
    found = arguments(d.call(aten.unsqueeze.default, a, dim, to=()))["dim"]
    assert found == (dim if dim < 0 else dim - 4)
    assert arguments(d.call(aten.mean.dim, a, [dim], True, to=()))["dim"] == [dim if dim < 0 else dim - 3]


@given(start=st.integers(-12, 12), end=st.integers(-12, 12) | st.just(2**63 - 1))
def test_slices_say_where_they_begin_and_end(start: int, end: int) -> None:
    d = Sketch()
    a = d.input("a", ("batch", 8), torch.float32)
    found = arguments(d.call(aten.slice.Tensor, a, 1, start, end, to=()))
    values = list(range(8))
    assert values[found["start"] : found["end"]] == values[start:end]
    assert 0 <= found["start"] <= 8
    assert 0 <= max(found["end"], 0) <= 8


def test_the_end_of_a_dynamic_slice_is_open() -> None:
    d = Sketch()
    a = d.input("a", ("batch", "sequence"), torch.float32)
    found = arguments(d.call(aten.slice.Tensor, a, 1, None, 2**63 - 1, to=()))
    assert (found["start"], found["end"], found["step"]) == (0, None, 1)


# -- rules -----------------------------------------------------------------------------------------------------


class Tangent(Rule):
    """sin(x) / cos(x)  ->  tan(x)"""

    near = 2

    def pattern(self, x: Pattern) -> Pattern:
        return op.sin(x) / op.cos(x)

    def rewrite(self, program: Program, node: fx.Node, x: Any) -> fx.Node | No:
        if x.meta["type"].dtype != torch.float32:
            return No("only of float32")
        return program.call(aten.tan.default, (x,), like=node)


def quotient(numerator: Any, denominator: Any, dtype: torch.dtype = torch.float32, same_angle: bool = True) -> Program:
    d = Sketch()
    a, b = (d.input(name, SHAPE, dtype) for name in "ab")
    top = d.call(numerator, a, to=SHAPE, dtype=dtype)
    bottom = d.call(denominator, a if same_angle else b, to=SHAPE, dtype=dtype)
    return d.done(out=d.call(aten.div.Tensor, top, bottom, to=SHAPE, dtype=dtype))


def applied(program: Program) -> tuple[dict[str, int], list[str]]:
    told: list[No] = []
    fired = apply(program, [Tangent()], told.append)
    program.clean()
    program.verify()
    return dict(fired), [str(no) for no in told]


def test_a_rule_puts_its_replacement_in_place() -> None:
    program = quotient(aten.sin.default, aten.cos.default)
    values = {"a": torch.rand(2, 8), "b": torch.rand(2, 8)}
    before = program(**values)["out"]
    assert applied(program) == ({"Tangent": 1}, [])
    assert [n.target for n in program.calls()] == [aten.tan.default]
    torch.testing.assert_close(program(**values)["out"], before)


def test_a_refusal_keeps_its_reason_and_place() -> None:
    program = quotient(aten.sin.default, aten.cos.default, torch.float64)
    assert applied(program) == ({}, ["div_tensor: Tangent: only of float32"])


def test_a_near_miss_says_what_was_expected() -> None:
    program = quotient(aten.sin.default, aten.tan.default)
    assert applied(program) == ({}, ["div_tensor: Tangent: expected cos, found aten.tan"])


def test_a_near_miss_names_the_value_that_should_have_been_the_same() -> None:
    program = quotient(aten.sin.default, aten.cos.default, same_angle=False)
    assert applied(program) == (
        {},
        ["div_tensor: Tangent: expected the same x as before (placeholder a), found placeholder b"],
    )


def test_what_is_far_off_is_not_told() -> None:
    assert applied(quotient(aten.tan.default, aten.cos.default)) == ({}, [])


def test_a_rule_leaves_alone_what_nobody_uses() -> None:
    d = Drawing()
    d.do(aten.div.Tensor, d.do(aten.sin.default, d.a), d.do(aten.cos.default, d.a))
    program = d.done(out=d.b)
    assert apply(program, [Tangent()]) == {}


def test_a_value_with_other_users_stays() -> None:
    d = Drawing()
    sine = d.do(aten.sin.default, d.a)
    tangent = d.do(aten.div.Tensor, sine, d.do(aten.cos.default, d.a))
    program = d.done(tangent=tangent, sine=sine)
    assert applied(program)[0] == {"Tangent": 1}
    assert [n.target for n in program.calls()] == [aten.sin.default, aten.tan.default]


def test_patterns_are_traced_from_their_parameters() -> None:
    pattern, names = traced(Tangent().pattern)
    assert names == ("x",)
    assert pattern.roots == {"div"}
    assert (op.sin(x) | x).roots == frozenset()


# -- any expression finds itself -------------------------------------------------------------------------------


@st.composite
def expressions(draw: Any) -> Any:
    """A nested expression: a letter, or (operator, operands)."""
    leaf = st.sampled_from("ab")
    unary, binary = st.sampled_from(["neg", "rsqrt", "sin"]), st.sampled_from(["add", "mul", "sub", "div"])
    grow = lambda inner: st.tuples(unary, inner) | st.tuples(binary, inner, inner)  # noqa: E731
    return draw(st.recursive(leaf, grow, max_leaves=6))


TARGETS = {n: getattr(aten, n).default for n in ("neg", "rsqrt", "sin")} | {
    n: getattr(aten, n).Tensor for n in ("add", "mul", "sub", "div")
}


def as_graph(d: Drawing, tree: Any, swap: bool) -> fx.Node:
    if isinstance(tree, str):
        return d.a if tree == "a" else d.b
    operands = [as_graph(d, t, swap) for t in tree[1:]]
    if swap and tree[0] in ("add", "mul"):
        operands.reverse()
    return d.do(TARGETS[tree[0]], *operands)


def as_pattern(tree: Any) -> Pattern:
    return Capture(tree) if isinstance(tree, str) else getattr(op, tree[0])(*map(as_pattern, tree[1:]))


@given(tree=expressions(), swap=st.booleans())
def test_any_expression_matches_its_own_pattern(tree: Any, swap: bool) -> None:
    d = Drawing()
    node = as_graph(d, tree, swap)
    found = matches(as_pattern(tree), node)
    assert found is not None
    assert set(found) <= {"a", "b"}


@given(tree=expressions(), other=expressions())
def test_a_match_says_the_same_expression(tree: Any, other: Any) -> None:
    """Where another expression's pattern matches, putting the captures back gives the same numbers."""
    d = Drawing()
    node = as_graph(d, tree, swap=False)
    found = matches(as_pattern(other), node)
    if found is None or not isinstance(other, tuple):
        return
    values = {d.a: torch.tensor(0.7), d.b: torch.tensor(1.9)}
    assert evaluate_graph(node, values) == pytest.approx(evaluate_tree(other, found, values), nan_ok=True)


def evaluate_graph(node: fx.Node, values: dict[fx.Node, Any]) -> float:
    return float(_graph(node, values))


def _graph(node: Any, values: dict[fx.Node, Any]) -> Any:
    return values[node] if node in values else node.target(*(_graph(n, values) for n in node.args))


def evaluate_tree(tree: Any, found: dict[str, Any], values: dict[fx.Node, Any]) -> float:
    def value(t: Any) -> Any:
        return _graph(found[t], values) if isinstance(t, str) else TARGETS[t[0]](*map(value, t[1:]))

    return float(value(tree))


def test_a_rule_is_named_after_its_class() -> None:
    assert Tangent().name == "Tangent"
