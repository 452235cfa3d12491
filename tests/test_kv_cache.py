"""kv_cache: going on from a cache gives what one run over everything gives, or the pass says why it cannot."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from qcompiler.errors import ContractError
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.fuse import Fuse
from qcompiler.passes.kv_cache import KvCache
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program, Type
from tests.programs import BS, Sketch, tiny_encoder, tiny_llama

aten = torch.ops.aten
IDS = torch.randint(0, 80, (2, 11), generator=torch.Generator().manual_seed(0))


def in_pieces(program: Program, ids: Tensor, *sizes: int) -> Tensor:
    """Logits of all positions, computed a piece at a time."""
    caches: dict[str, Tensor] = {}
    found = []
    for piece in ids.split(list(sizes), dim=1):
        outputs = program(input_ids=piece, **caches)
        caches = program.cache_updates(outputs)
        found.append(outputs["logits"])
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0, "sinks": True}, {"rotary": 8}])
def test_pieces_are_the_whole(options: dict) -> None:
    program = tiny_llama(**options)
    before = program(input_ids=IDS)["logits"]
    Fuse().run(program, Context())
    KvCache().run(program, Context())
    program.verify()
    torch.testing.assert_close(program(input_ids=IDS)["logits"], before)
    torch.testing.assert_close(in_pieces(program, IDS, 5, 1, 1, 4), before)


def test_signature() -> None:
    program = tiny_llama(layers=1, kv_heads=2, head_dim=16)
    KvCache().run(program, Context())
    types = {i.name: str(i.type) for i in program.inputs}
    assert types["past_key_0"] == "float32[batch, 2, past, 16]"
    assert types["attention_mask"] == "int64[batch, total]"
    assert types["logits_positions"] == "int64[kept]"
    assert program.outputs == ("logits", "present_key_0", "present_value_0")
    assert program.info["caches"] == {"past_key_0": "present_key_0", "past_value_0": "present_value_0"}
    logits = program.output_node.args[0][0]
    assert str(logits.meta["type"]) == "float32[batch, kept, 80]"


def test_only_the_positions_asked_for() -> None:
    program = tiny_llama()
    KvCache().run(program, Context())
    every = program(input_ids=IDS)["logits"]
    last = program(input_ids=IDS, logits_positions=torch.tensor([10]))["logits"]
    assert last.shape == (2, 1, 80)
    torch.testing.assert_close(last, every[:, -1:])


def test_left_padding() -> None:
    program = tiny_llama()
    KvCache().run(program, Context())
    mask = torch.ones(1, 11, dtype=torch.int64)
    mask[:, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = program(input_ids=IDS[:1], attention_mask=mask, position_ids=positions)["logits"][:, 3:]
    torch.testing.assert_close(padded, program(input_ids=IDS[:1, 3:])["logits"])


def test_twice_is_once() -> None:
    program = tiny_llama()
    KvCache().run(program, Context())
    text = program.text()
    KvCache().run(program, Context())
    assert program.text() == text


def language_model(mix: Callable[[Sketch, fx.Node, fx.Node], fx.Node], positions: bool = True) -> Program:
    """Embedding, an attention, something that may look at other positions, and a head."""
    from qcompiler.ops import qc

    sk = Sketch()
    ids = sk.input("input_ids", BS, torch.int64)
    sk.input("attention_mask", BS, torch.int64, "ones")
    if positions:
        sk.input("position_ids", BS, torch.int64, "positions")
    x = sk.call(aten.embedding.default, sk.parameter("embed.weight", 20, 8), ids, to=(*BS, 8))
    heads = sk.call(aten.unsqueeze.default, x, 1, to=("batch", 1, "sequence", 8))
    y = sk.call(qc.attention, heads, heads, heads, to=("batch", 1, "sequence", 8), right=0)
    x = sk.call(aten.squeeze.dim, y, 1, to=(*BS, 8))
    x = mix(sk, x, ids)
    return sk.done(logits=sk.call(aten.linear.default, x, sk.parameter("head.weight", 20, 8), to=(*BS, 20)))


def counting(sk: Sketch, x: fx.Node, ids: fx.Node) -> fx.Node:
    places = sk.call(aten.arange.default, sk.size(ids, 1), to=("sequence",), dtype=torch.int64)
    return sk.call(
        aten.add.Tensor,
        x,
        sk.call(aten.embedding.default, sk.parameter("places.weight", 32, 8), places, to=("sequence", 8)),
        to=(*BS, 8),
    )


def relating(sk: Sketch, x: fx.Node, ids: fx.Node) -> fx.Node:
    turned = sk.call(aten.transpose.int, x, 1, 2, to=("batch", 8, "sequence"))
    score = sk.call(aten.matmul.default, x, turned, to=("batch", "sequence", "sequence"))
    return sk.call(aten.matmul.default, score, x, to=(*BS, 8))


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (
            lambda sk, x, ids: sk.call(aten.cumsum.default, x, 1, to=(*BS, 8)),
            "aten.cumsum works along the sequence",
        ),
        (
            lambda sk, x, ids: sk.call(aten.mean.dim, x, [1], True, to=("batch", 1, 8)),
            "aten.mean works along",
        ),
        (lambda sk, x, ids: sk.call(aten.flip.default, x, [1], to=(*BS, 8)), "aten.flip works along"),
        (lambda sk, x, ids: sk.call(aten.slice.Tensor, x, 1, 0, -1, to=(*BS, 8)), "aten.slice works along"),
        (
            lambda sk, x, ids: sk.call(aten.constant_pad_nd.default, x, [0, 0, 1, -1], to=(*BS, 8)),
            "aten.constant_pad_nd works along",
        ),
        (counting, "counts positions by itself"),
        (relating, "relates positions to positions"),
    ],
)
def test_what_looks_across_positions_is_named(mix: Callable[..., fx.Node], reason: str) -> None:
    program = language_model(mix)
    ctx = Context()
    KvCache().run(program, ctx)
    assert not program.caches
    assert re.search(reason, ctx.record.refusals[0])


@pytest.mark.parametrize(
    "mix",
    [
        lambda sk, x, ids: sk.call(aten.softmax.int, x, -1, to=(*BS, 8)),
        lambda sk, x, ids: sk.call(aten.slice.Tensor, x, 1, 0, 2**63 - 1, to=(*BS, 8)),
    ],
)
def test_what_stays_at_its_position_is_let_through(mix: Callable[..., fx.Node]) -> None:
    program = language_model(mix)
    KvCache().run(program, Context())
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(in_pieces(program, ids, 4, 2), program(input_ids=ids)["logits"])


def test_refusals_without_positions_or_attention() -> None:
    ctx = Context()
    KvCache().run(language_model(lambda sk, x, ids: x, positions=False), ctx)
    KvCache().run(tiny_encoder(), ctx)
    assert "takes no position_ids" in ctx.record.refusals[0]
    assert len(ctx.record.refusals) == 2


def test_positions_counted_from_the_mask() -> None:
    """As OPT counts them: the mask of past and new positions is given whole, its positions are cut to the new ones."""
    from tests.test_canonicalize import captured

    program, _ = captured("opt")
    Canonicalize().run(program, Context())
    assert "position_ids" not in {i.name for i in program.inputs}
    ids = IDS % 60
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    whole = program(input_ids=ids, attention_mask=mask)["logits"]
    KvCache().run(program, Context())
    program.verify()
    assert program.caches
    torch.testing.assert_close(program(input_ids=ids, attention_mask=mask)["logits"][mask != 0], whole[mask != 0])
    caches: dict[str, Tensor] = {}
    found = []
    for start, stop in ((0, 6), (6, 7), (7, 11)):
        outputs = program(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], **caches)
        caches = program.cache_updates(outputs)
        found.append(outputs["logits"])
    torch.testing.assert_close(torch.cat(found, 1)[mask != 0], whole[mask != 0], atol=1e-5, rtol=1e-4)


def test_a_sum_over_the_mask_would_see_the_future() -> None:
    """What is made of the mask may look across it, but one run and several must agree: the pipeline compares them."""
    program = tiny_llama()
    reader = next(program.calls(aten.add.Tensor))
    mask = next(n for n in program.placeholders if n.target == "attention_mask")
    with program.graph.inserting_before(reader):
        kind = mask.meta["type"]
        total = program.call(aten.flip.default, (mask, [1]), like=reader, type=kind)
        counted = program.call(aten.cumsum.default, (total, 1), like=reader, type=kind)
        back = program.call(aten.flip.default, (counted, [1]), like=reader, type=kind)  # counted from the end
        wide = program.call(aten.unsqueeze.default, (back, 2), like=reader, type=Type((*BS, 1), kind.dtype))
        added = program.call(aten.add.Tensor, (reader.args[0], wide), like=reader)
    reader.update_arg(0, added)
    runner = Runner(Context(), [{"input_ids": IDS}])
    with pytest.raises(ContractError):
        runner.run(program, [KvCache()])
    assert not program.caches
