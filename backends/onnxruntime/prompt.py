"""Reading prompts: a second form of a program, whose linear layers multiply 8-bit integers and which has no head.

Decoding is bound by the bytes of the weights, reading a prompt by arithmetic: MatMulNBits unpacks its codes again for
every few tokens, while a product of 8-bit codes runs at the rate of the integer units. Its weights are twice those of
4 bits. So that they are not all in memory beside those, the form is cut into pieces that run one after the other, each
over the whole prompt, and its reader maps the weights of one piece at a time (reader.py).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from qcompiler.backends.onnxruntime.caches import spread
from qcompiler.backends.onnxruntime.lowering import operator_name, schema_arguments
from qcompiler.backends.onnxruntime.names import SCALE
from qcompiler.calibration import mark_segments
from qcompiler.errors import No
from qcompiler.ops import qc
from qcompiler.program import Input, Program, Type
from qcompiler.rewrite import named_arguments
from qcompiler.scheme import QTensor, Scheme
from qcompiler.target import Answer

WEIGHTS, ACTIVATIONS = Scheme.parse("int8:channel:sym"), "int8:token:sym:dynamic"
PIECES = 4


def readable(program: Program, about: Mapping[str, Any]) -> Answer:
    """Whether a form that reads prompts can stand beside the program, lowered as `about` says, or why not."""
    if not program.caches:
        return No("prompts are read in integers by programs that have a cache")
    if not about["shared_cache"]:
        return No("prompts are read in integers where past and present share a buffer, which its attention cannot")
    if next(program.calls(qc.linear), None) is None:
        return No("prompts are read in integers where linear layers are quantized and their inputs are not")
    if any(Scheme.parse(scheme).bits != 8 for node in _attentions(program) for scheme in _storage(node).values()):
        return No("prompts are read in integers into caches of floats or of 8 bits")
    return True


def prompt_form(program: Program) -> Program:
    """A copy that fills the caches and gives nothing else, but the scales of caches that hold codes.

    Quantized weights are rounded again to 8 bits, one scale a row; what they multiply is rounded to 8 bits, one scale
    a token. Its caches are floats throughout: attention is faster over these, and who runs it rounds what it found.
    """
    copy = program.copy()
    values = dict(zip(copy.outputs, copy.output_node.args[0], strict=True))  # type: ignore[arg-type]
    kept = {name: values[name] for name in program.info["caches"].values()}
    for node in _attentions(copy):
        kept |= _keep_floats(copy, node)
    copy.outputs, copy.output_node.args = tuple(kept), (tuple(kept.values()),)
    copy.clean()
    for node in copy.calls(qc.linear):
        for place, rows in _apart(node, copy.weight(node)):
            eight = QTensor.quantize(rows, WEIGHTS)
            with copy.graph.inserting_before(place):
                parts = copy.add_qtensor(f"{place.name}.prompt", eight)
            spec = {"spec": eight.spec(), "scheme": ACTIVATIONS}
            copy.replace(place, qc.integer_linear, (node.args[0], parts, [], *node.args[2:3]), spec)
    copy.clean()
    return copy


def _apart(node: fx.Node, weight: Tensor) -> list[tuple[fx.Node, Tensor]]:
    """Where the outputs of merged layers go on, each with its rows of the weight; the layer itself if that is better.

    Merging saves the starts of products, which count in a step of one token. In a prompt it costs a copy of all that
    they give, but before attention, which takes queries, keys and values side by side.
    """
    whole = [(node, weight)]
    (split, *others) = node.users
    if others or operator_name(split) != "aten.split_with_sizes" or any(node.args[2:3]):
        return whole
    _, sizes, axis = schema_arguments(split)
    viewed = any(operator_name(user) in ("aten.view", "aten.reshape") for piece in split.users for user in piece.users)
    if viewed or axis not in (-1, node.meta["type"].rank - 1):
        return whole
    rows = weight.split(sizes)
    return [(piece, rows[piece.args[1]]) for piece in split.users]


def _attentions(program: Program) -> list[fx.Node]:
    return list(program.calls(qc.cached_attention))


def _storage(node: fx.Node) -> dict[str, str]:
    """How an attention stores its past: the schemes of keys and values, none where it stores floats."""
    given = named_arguments(node)
    return {past: given[name] for past, name in (("past_k", "key"), ("past_v", "value")) if given[name]}


def _keep_floats(program: Program, node: fx.Node) -> dict[str, fx.Node]:
    """Let an attention store floats; the scales of the codes it would store, by the names of outputs."""
    found, given = {}, named_arguments(node)
    for past, scheme in _storage(node).items():
        which = past[-1]
        scale = spread(program, Scheme.parse(scheme), given["key_grid" if which == "k" else "value_grid"], given[which])
        name = f"{given[past].target}{SCALE}"
        with program.graph.inserting_before(node):
            found[name] = program.store(f"{name}s", scale, like=node)
    taken = ("key", "value", "key_grid", "value_grid")
    node.kwargs = {name: value for name, value in node.kwargs.items() if name not in taken}
    return found


def cut(form: Program, count: int = PIECES) -> list[Program]:
    """The form as at most `count` programs that give its outputs, each from the inputs and what those before it left.

    It is cut between repeated blocks, into pieces of as many. What stands before the blocks is computed again by
    every piece that reads it.
    """
    blocks = mark_segments(form) - 1
    size = max(1, -(-blocks // count))
    places = {node: max(0, node.meta["segment"] - 1) // size for node in form.calls()}
    shared = {node for node in form.calls() if node.meta["segment"] == 0}
    left = [
        node
        for node in form.calls()
        if node not in shared and any(places.get(user, -1) > places[node] for user in node.users)
    ]
    if any(not isinstance(node.meta["type"], Type) for node in left):
        return [form]
    return [_piece(form, i, places, left) for i in range(max(places.values()) + 1)]


def _piece(form: Program, index: int, places: Mapping[fx.Node, int], left: list[fx.Node]) -> Program:
    """What a form computes in one place; `left` are all values that one piece leaves to later ones."""
    copy = form.copy()
    twins = dict(zip(form.graph.nodes, copy.graph.nodes, strict=True))
    values = dict(zip(form.outputs, form.output_node.args[0], strict=True))  # type: ignore[arg-type]
    outputs = {name: node for name, node in values.items() if _place(node, places) == index}
    outputs |= {node.name: node for node in left if places[node] == index}
    copy.outputs, copy.output_node.args = tuple(outputs), (tuple(twins[node] for node in outputs.values()),)
    for node in left:
        if places[node] < index:
            with copy.graph.inserting_after(copy.placeholders[-1]):
                given = copy.graph.placeholder(node.name)
            given.meta = {"type": node.meta["type"]}
            copy.inputs += (Input(node.name, node.meta["type"]),)
            twins[node].replace_all_uses_with(given)
    copy.clean()
    return copy


def _place(node: fx.Node, places: Mapping[fx.Node, int]) -> int:
    """The piece that gives an output; a tensor comes with the call behind it."""
    while node not in places:
        node = node.next
    return places[node]
