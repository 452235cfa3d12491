"""Cached attention as ONNX Runtime's GroupQueryAttention: rotary positions and cache update inside the operator."""

import operator
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompiler.backends.onnxruntime.caches import Storage
from qcompiler.backends.onnxruntime.fusions import heads_last, is_vector
from qcompiler.backends.onnxruntime.graph import Stored, typed
from qcompiler.backends.onnxruntime.lowering import Lowering, operator_name, schema_arguments
from qcompiler.backends.onnxruntime.names import MASK
from qcompiler.errors import No
from qcompiler.execution import execute
from qcompiler.program import Program, Type
from qcompiler.rewrite import named_arguments

UNIT = 8  # the operator wants head sizes and rotary widths in these units


def group_query(low: Lowering, node: fx.Node) -> bool | No:
    """A causal `qc.cached_attention` with what it needs around it, or the reason why it stays apart."""
    given = named_arguments(node)
    q, k, v, sinks, left = (given[name] for name in ("q", "k", "v", "sinks", "left"))
    answer = fits(low, node)
    if not answer:
        return answer
    storage = Storage.of(low, node)
    if isinstance(storage, No):
        return storage
    turned = rotary(low, q, k)
    if isinstance(turned, No):
        low.refusals.append(turned.at(node.name))
        turned = None
    width = q.meta["type"].shape[3]
    if turned is not None:
        q, k = q.args[0], k.args[0]
    packed = packed_source(q, k, v)
    pasts = [given["past_k"], given["past_v"]]
    for past, kind in zip(pasts, storage.types([past.meta["type"] for past in pasts]), strict=True):
        low.store_input_as(past, kind)
    inputs = [low.value(packed), None, None] if packed else [heads_last(low, x) for x in (q, k, v)]
    last, total = lengths(low)
    attended, *present = low.contrib(
        "GroupQueryAttention",
        *inputs,
        *map(low.value, pasts),
        last,
        total,
        *(turned if turned is not None else (None, None)),
        None,
        None,
        low.value(sinks) if sinks is not None else None,
        *storage.inputs(low),
        outputs=3,
        num_heads=q.meta["type"].shape[1],
        kv_num_heads=k.meta["type"].shape[1],
        scale=given["scale"],
        softcap=given["softcap"] or None,
        local_window_size=left + 1 if left >= 0 else None,
        do_rotary=int(turned is not None),
        rotary_interleaved=int(rotary_interleaved(node)) or None,
        **storage.attributes(),
    )
    low.kernels[low.label] = f"GroupQueryAttention{f' in {storage.bits} bits' if storage.bits else ''}"
    spread(low, node, attended, width)
    kinds = storage.types(node.meta["type"][1:])
    low.values[node] = [None, *(typed(value, kind) for value, kind in zip(present, kinds, strict=True))]
    return True


def lengths(low: Lowering) -> tuple[ir.Value, ir.Value]:
    """What the operator wants to know, from the padding mask: each sequence's last position, the longest length."""
    if MASK not in low.memo:
        mask = low.cast(low.input(MASK, Type(("batch", "total"), torch.int64)), torch.int64)
        last = low.op("Sub", low.op("ReduceSum", mask, [1], keepdims=0), low.graph.constant(1, torch.int64))
        total = low.op("Squeeze", low.op("Shape", mask, start=1, end=2), [0])
        low.memo[MASK] = tuple(low.op("Cast", x, to=int(ir.DataType.INT32)) for x in (last, total))
    found: tuple[ir.Value, ir.Value] = low.memo[MASK]
    return found


def fits(low: Lowering, node: fx.Node) -> bool | No:
    """Whether the operator can express this attention."""
    given = named_arguments(node)
    q, k, v, padding, sinks = (given[name] for name in ("q", "k", "v", "padding", "sinks"))
    if low.options.padding and padding is not None:
        return No("GroupQueryAttention cannot mask padding on the left, and the option padding asks for that")
    if given["right"] != 0 or given["chunk"] or given["mask"] is not None or given["bias"] is not None:
        return No("GroupQueryAttention takes causal attention without mask, bias and chunks only")
    if padding is not None and padding.op != "placeholder":
        return No("GroupQueryAttention takes no padding mask that is computed")
    kinds = [x.meta["type"] for x in (q, k, v)]
    if kinds[0].dtype != torch.float32:
        return No(f"GroupQueryAttention takes float32 here, not {kinds[0].dtype}")
    if kinds[1].shape[3] != kinds[2].shape[3] or kinds[0].shape[3] != kinds[1].shape[3]:
        return No("GroupQueryAttention takes keys and values of one size only")
    if kinds[0].shape[3] % UNIT:
        return No(f"GroupQueryAttention takes heads of a multiple of {UNIT} channels, not {kinds[0].shape[3]}")
    if sinks is not None and not is_vector(sinks, kinds[0]):
        return No("its sinks are computed")
    return True


def rotary_interleaved(node: fx.Node) -> bool:
    """Whether the queries of an attention are rotated in neighbouring pairs."""
    q: Any = node.args[0]
    return operator_name(q) == "qc.rope" and bool(q.kwargs.get("interleaved", False))


def rotary(low: Lowering, q: fx.Node, k: fx.Node) -> tuple[ir.Value, ir.Value] | No | None:
    """The tables of cosines and sines by position if q and k are rotated by them; None if they are not rotated."""
    ropes = [operator_name(x) == "qc.rope" for x in (q, k)]
    if not any(ropes):
        return None
    if not all(ropes) or q.args[1:3] != k.args[1:3] or q.kwargs != k.kwargs:
        return No("queries and keys are rotated differently, so the rotation stays apart")
    tables = []
    for angle in q.args[1:3]:
        assert isinstance(angle, fx.Node)
        if angle not in low.memo:
            low.memo[angle] = position_table(low.program, angle, low.options.max_positions)
        table = low.memo[angle]
        if isinstance(table, No):
            return table
        if table.shape[1] % UNIT:
            return No(f"{table.shape[1]} rotary pairs are not a multiple of {UNIT}, so the rotation stays apart")
        stored = Stored(tuple(table.shape), table.dtype, partial(torch.clone, table), f"{angle.name}:table")
        tables.append(low.graph.store(f"{angle.name}.table", stored))
    return tables[0], tables[1]


def position_table(program: Program, angle: fx.Node, count: int) -> Tensor | No:
    """`angle` [batch, sequence, r / 2] for positions 0 .. count - 1: the program's own nodes, executed.

    No if it depends on anything but each position.
    """
    wanted = ancestors(angle)
    inputs = {node for node in wanted if node.op == "placeholder"}
    positions = [node for node in program.placeholders if node.target == "position_ids"]
    if inputs != set(positions):
        return No("the rotary angles depend on more than position_ids, so the rotation stays apart")
    ordered = [node for node in program.graph.nodes if node in wanted and node.op != "placeholder"]

    def table(ids: Tensor) -> Tensor:
        env: dict[fx.Node, Any] = {positions[0]: ids[None]}
        with torch.no_grad():
            execute(ordered, env, program.tensors)
        found: Tensor = env[angle]
        return found[0].float()

    whole = table(torch.arange(count))
    some = torch.tensor([min(5, count - 1), 0, min(3, count - 1)])
    if whole.shape[0] != count or not torch.allclose(table(some), whole[some], rtol=1e-5, atol=1e-6):
        return No("the rotary angles of a position depend on the other positions, so the rotation stays apart")
    return whole


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all it depends on."""
    found, pending = {node}, [node]
    while pending:
        for argument in pending.pop().all_input_nodes:
            if argument not in found:
                found.add(argument)
                pending.append(argument)
    return found


def packed_source(q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node | None:
    """The one value [batch, sequence, (heads + 2 * kv_heads) * d] that q, k and v are views of, in this order."""
    pieces = [piece_of(x) for x in (q, k, v)]
    if any(piece is None for piece in pieces):
        return None
    splits = {piece[0] for piece in pieces if piece is not None}
    if len(splits) != 1 or [piece[1] for piece in pieces if piece is not None] != [0, 1, 2]:
        return None
    split = splits.pop()
    source, sizes, axis = schema_arguments(split)
    whole = source.meta["type"].rank == 3 and axis in (-1, 2) and len(sizes) == 3
    return source if whole else None


def piece_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Which piece of which split a value [batch, heads, sequence, d] is a view of."""
    chain: list[Any] = [node]
    for names in (("aten.transpose",), ("aten.view", "aten.reshape"), ("operator.getitem",)):
        if not isinstance(chain[-1], fx.Node) or operator_name(chain[-1]) not in names:
            return None
        chain.append(chain[-1].args[0])
    transpose, item, split = chain[0], chain[2], chain[3]
    if set(transpose.args[1:]) != {1, 2} or operator_name(split) != "aten.split_with_sizes":
        return None
    return split, item.args[1]


def spread(low: Lowering, node: fx.Node, attended: ir.Value, width: int) -> None:
    """Give the operator's output [batch, sequence, heads * d] to the nodes that take it apart and join it again."""
    for item in node.users:
        if item.target is not operator.getitem or item.args[1] != 0:
            continue
        kind = item.meta["type"]
        split = low.op("Reshape", attended, [0, 0, kind.shape[1], width])
        low.values[item] = typed(low.op("Transpose", split, perm=[0, 2, 1, 3]), kind)
        for turned in item.users:
            if operator_name(turned) == "aten.transpose" and set(turned.args[1:]) == {1, 2}:
                low.values[turned] = typed(split, turned.meta["type"])
                joined(low, turned, attended)


def joined(low: Lowering, node: fx.Node, attended: ir.Value) -> None:
    """The views of `node` that put the heads side by side are the operator's output itself."""
    for user in node.users:
        if operator_name(user) in ("aten.clone", "aten.contiguous"):
            low.values[user] = low.values[node]
            joined(low, user, attended)
        elif operator_name(user) in ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten"):
            kind = user.meta["type"]
            if kind.rank == 3 and kind.shape[:2] == node.meta["type"].shape[:2]:
                low.values[user] = typed(attended, kind)
