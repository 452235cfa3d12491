"""Rule and matching: a pattern over the graph, what to put in its place, and why it did not fire.

A pattern is ordinary Python, traced once: `op` makes calls, operators make the calls they look like, and `|` offers
another spelling. Parameters are captures; one used twice must stand for the same value both times.

    class Softplus(Rule):
        '''log(1 + exp(x))  ->  softplus(x)'''

        def pattern(self, x):
            return op.log(op.exp(x) + 1)

        def rewrite(self, program, node, x):
            return program.call(aten.softplus.default, (x,), like=node)
"""

import abc
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.program import Program, Type
from qcompiler.text import target_name

_COMMUTES = frozenset({"add", "mul", "eq", "ne", "minimum", "maximum", "logical_and", "bitwise_and"})
_DIMENSIONS = frozenset({"dim", "dims", "dim0", "dim1", "start_dim", "end_dim"})
_GROWS = frozenset({"unsqueeze", "stack"})  # their dimension is one of the result
_END = 2**63 - 1  # how export spells the end of a slice


# -- reading nodes ---------------------------------------------------------------------------------------------


def op_name(node: Any) -> str:
    """The name that patterns call a node by, without overload: `mul`, `qc.rope`, `getitem`; "" for anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    space, _, name = node.target._schema.name.partition("::")
    return name if space == "aten" else f"{space}.{name}"


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator's call by name, in the order of its schema, defaults included, as they are written.

    Those of a Python function go by their place.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): argument for i, argument in enumerate(node.args)}
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by parameter name, in one spelling: defaults filled in, dimensions counted from the end,
    slice bounds within the size where that is a number (None at a dynamic end)."""
    if node.target is operator.getitem:
        return dict(zip(("value", "index"), node.args, strict=True))
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    found = named_arguments(node)
    if (rank := _rank(node)) is not None:
        for name in _DIMENSIONS & found.keys():
            found[name] = _from_end(found[name], rank)
    if op_name(node) == "slice":
        found |= _bounds(found)
    return found


def type_of_node(value: Any) -> Type | None:
    """The Type of a node that is one tensor; None for numbers, tuples and anything that is no node."""
    kind = value.meta.get("type") if isinstance(value, fx.Node) else None
    return kind if isinstance(kind, Type) else None


def _rank(node: fx.Node) -> int | None:
    """The rank that a node's dimension arguments count in."""
    first = node.args[0] if node.args else None
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    kind = type_of_node(first)
    return None if kind is None else kind.rank + (op_name(node) in _GROWS)


def _from_end(value: Any, rank: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_from_end(v, rank) for v in value]
    return value - rank if isinstance(value, int) and value >= 0 else value


def _bounds(found: dict[str, Any]) -> dict[str, Any]:
    kind = type_of_node(found["self"])
    size = kind.shape[found["dim"]] if kind is not None else None
    start, end = found["start"] or 0, found["end"]
    if isinstance(size, int) and isinstance(start, int) and (end is None or isinstance(end, int)):
        start, end, _ = slice(start, end).indices(size)
    elif end == _END:
        end = None
    return {"start": start, "end": end}


# -- patterns --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a match has bound so far, and the calls it covers."""

    values: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()


@dataclass
class Search:
    """Remembers where a match failed that had come furthest."""

    depth: int = 0
    reason: str = ""

    def fail(self, found: Found, value: Any, expected: str) -> None:
        """Note that `value` is not what the pattern wants."""
        if len(found.nodes) > self.depth:
            self.depth, self.reason = len(found.nodes), f"expected {expected}, found {_described(value)}"


class Pattern(abc.ABC):
    """A shape of expression; `match` yields every way in which a value has it."""

    @abc.abstractmethod
    def match(self, value: Any, found: Found, search: Search) -> Iterator[Found]:
        """The ways to extend `found` so that `value` matches."""

    @property
    def roots(self) -> frozenset[str]:
        """Names of the ops a match can begin with; empty if any may."""
        return frozenset()

    def __add__(self, other: Any) -> "Pattern":
        return Call("add", (self, other))

    def __radd__(self, other: Any) -> "Pattern":
        return Call("add", (other, self))

    def __sub__(self, other: Any) -> "Pattern":
        return Call("sub", (self, other))

    def __mul__(self, other: Any) -> "Pattern":
        return Call("mul", (self, other))

    def __rmul__(self, other: Any) -> "Pattern":
        return Call("mul", (other, self))

    def __truediv__(self, other: Any) -> "Pattern":
        return Call("div", (self, other))

    def __pow__(self, other: Any) -> "Pattern":
        return Call("pow", (self, other))

    def __neg__(self) -> "Pattern":
        return Call("neg", (self,))

    def __or__(self, other: "Pattern") -> "Pattern":
        return Either((self, other))


@dataclass(frozen=True)
class Capture(Pattern):
    """Anything, remembered by name; at its second place it must be the same thing again."""

    name: str

    def match(self, value: Any, found: Found, search: Search) -> Iterator[Found]:
        if self.name not in found.values:
            yield Found({**found.values, self.name: value}, found.nodes)
        elif same(found.values[self.name], value):
            yield found
        else:
            search.fail(found, value, f"the same {self.name} as before ({_described(found.values[self.name])})")


@dataclass(frozen=True)
class Either(Pattern):
    """One of several spellings."""

    options: tuple[Pattern, ...]

    def match(self, value: Any, found: Found, search: Search) -> Iterator[Found]:
        for option in self.options:
            yield from option.match(value, found, search)

    @property
    def roots(self) -> frozenset[str]:
        every = [option.roots for option in self.options]
        return frozenset().union(*every) if all(every) else frozenset()


@dataclass(frozen=True)
class Call(Pattern):
    """A call of the op `name`; arguments that the pattern does not mention must have their default value."""

    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def match(self, value: Any, found: Found, search: Search) -> Iterator[Found]:
        if op_name(value) != self.name:
            search.fail(found, value, self.name)
            return
        given = arguments(value)
        named = {**dict(zip(given, self.args, strict=False)), **dict(self.kwargs)}
        if len(self.args) > len(given) or not named.keys() <= given.keys():
            search.fail(found, value, f"{self.name} with arguments {list(named)}")
            return
        if not all(name in named or _is_default(value, name, given[name]) for name in given):
            search.fail(found, value, f"{self.name} without further options")
            return
        inside = Found(found.values, (*found.nodes, value))
        names = list(named)
        yield from _match_all(list(named.values()), [given[n] for n in names], inside, search)
        if self.name in _COMMUTES and len(self.args) == 2:
            swapped = [names[1], names[0], *names[2:]]
            yield from _match_all(list(named.values()), [given[n] for n in swapped], inside, search)

    @property
    def roots(self) -> frozenset[str]:
        return frozenset({self.name})


class _Op:
    """`op.rsqrt(x)` is the pattern of a call of `rsqrt`; `op.qc.rope(x, cos, sin)` that of an op of qcompiler."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix

    @property
    def qc(self) -> "_Op":
        return _Op("qc.")

    def __getattr__(self, name: str) -> Callable[..., Pattern]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: Call(self._prefix + name, args, tuple(kwargs.items()))


op = _Op()


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are one node, or equal constants; a number is not a flag.

    >>> same(2, 2.0), same(1, True), same([1, 2], (1, 2))
    (True, False, True)
    """
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _match_all(patterns: Sequence[Any], values: Sequence[Any], found: Found, search: Search) -> Iterator[Found]:
    if len(patterns) != len(values):
        search.fail(found, values, f"{len(patterns)} values")
        return
    if not patterns:
        yield found
        return
    for extended in _match_one(patterns[0], values[0], found, search):
        yield from _match_all(patterns[1:], values[1:], extended, search)


def _match_one(pattern: Any, value: Any, found: Found, search: Search) -> Iterator[Found]:
    if isinstance(pattern, Pattern):
        yield from pattern.match(value, found, search)
    elif isinstance(pattern, (list, tuple)) and isinstance(value, (list, tuple)):
        yield from _match_all(pattern, value, found, search)
    elif same(pattern, value):
        yield found
    else:
        search.fail(found, value, repr(pattern))


def _is_default(node: fx.Node, name: str, value: Any) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    parameter = next(p for p in node.target._schema.arguments if p.name == name)
    return parameter.has_default_value() and same(parameter.default_value, value)


def _described(value: Any) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    return target_name(value.target) if value.op == "call_function" else f"{value.op} {value.target}"


# -- rules -----------------------------------------------------------------------------------------------------


class Rule(abc.ABC):
    """A pattern and its replacement; the docstring shows both.

    `near` is how many calls of the pattern must have matched for a failure to be worth telling; 0 keeps silent.
    """

    near: ClassVar[int] = 0

    @property
    def name(self) -> str:
        """The rule's name in reports."""
        return type(self).__name__

    @abc.abstractmethod
    def pattern(self, *captures: Any) -> Pattern:
        """The expression to look for; parameters are captures."""

    @abc.abstractmethod
    def rewrite(self, program: Program, node: fx.Node, *captures: Any) -> "fx.Node | No | None":
        """The value to use in place of `node`, made at the insertion point, or why not.

        None stands for a No that is not worth telling: the match is something else altogether. Captures that the
        matching spelling does not mention are None.
        """


def apply(program: Program, rules: Sequence[Rule], refuse: Callable[[No], None] | None = None) -> Counter[str]:
    """Apply each rule at every node, rule after rule; returns how often each fired, by name.

    `refuse` is told the near misses of nodes that no rule rewrote. Nodes that were rewritten stay until
    `Program.clean`.
    """
    fired: Counter[str] = Counter()
    misses: dict[fx.Node, No] = {}
    for rule in rules:
        pattern, names = traced(rule.pattern)
        for node in _alive(program):
            if pattern.roots and op_name(node) not in pattern.roots:
                continue
            answer = _try(program, rule, pattern, names, node)
            if answer:
                fired[rule.name] += 1
                misses.pop(node, None)
            elif isinstance(answer, No):
                misses.setdefault(node, answer)
    alive = _alive(program) if refuse and misses else {}
    for node, no in misses.items():
        if refuse and node in alive:
            refuse(no.at(_place(node)))
    return fired


def _alive(program: Program) -> dict[fx.Node, None]:
    """The nodes that the outputs depend on, in graph order; rewritten ones stay in the graph until it is cleaned."""
    used: set[fx.Node] = {program.output_node}
    for node in reversed(program.graph.nodes):
        if node in used:
            used.update(node.all_input_nodes)
    return {node: None for node in program.graph.nodes if node in used}


def traced(pattern: Callable[..., Pattern]) -> tuple[Pattern, tuple[str, ...]]:
    """A pattern function as a Pattern, and the names of its captures."""
    names = tuple(inspect.signature(pattern).parameters)
    return pattern(*map(Capture, names)), names


def matches(pattern: Pattern, value: Any) -> dict[str, Any] | None:
    """The captures of the first match of `pattern` at `value`; None if there is none."""
    found = next(pattern.match(value, Found(), Search()), None)
    return None if found is None else found.values


def _try(program: Program, rule: Rule, pattern: Pattern, names: Sequence[str], node: fx.Node) -> "fx.Node | No | None":
    """Rewrite at one node: the new node, a No worth telling, or None."""
    search, refusal = Search(), None
    for found in pattern.match(node, Found(), search):
        with program.graph.inserting_before(node):
            answer = rule.rewrite(program, node, *map(found.values.get, names))
        if answer:
            assert isinstance(answer, fx.Node)
            node.replace_all_uses_with(answer, propagate_meta=False)
            return answer
        refusal = refusal or answer
    if refusal is not None:
        assert isinstance(refusal, No)
        return No(f"{rule.name}: {refusal.reason}")
    if rule.near and search.depth >= rule.near:
        return No(f"{rule.name}: {search.reason}")
    return None


def _place(node: fx.Node) -> str:
    path = node.meta.get("path")
    return f"{node.name} ({path})" if path else node.name
