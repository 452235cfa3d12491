"""Symmetry sites: found where a person would find them, and transforming them all changes nothing."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler import data
from qcompiler.comparison import in_double
from qcompiler.errors import QCompilerError
from qcompiler.ops import qc
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.sites import Kind, Site, find, find_with_ends
from qcompiler.testing import check_sites
from tests.programs import tiny_encoder, tiny_llama
from tests.test_canonicalize import canonical, random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

FAMILIES = (
    "bert",  # norms after the sums: the residual stream is one site all the same, factors end at each norm
    "bloom",  # one matrix for query, key and value, head by head
    "cohere",  # interleaved rotary; one norm feeds attention and MLP
    "falcon",  # one key for all heads, picked out of the fused matrix
    "gemma2",  # norms around each block
    "gemma3_text",  # query and key norms shared by the heads; two rotary tables
    "gpt2",  # a fused matrix split in three; tied embeddings
    "gpt_neox",  # partial rotary inside a fused matrix, parallel blocks
    "llama",
    "mistral",
    "mixtral",  # experts: stacks of matrices that share their channels
    "olmo2",  # query and key norms over all heads together
    "opt",  # relu lets factors through
    "phi",  # partial rotary, parallel blocks
    "phi3",  # gate and up in one matrix
    "qwen2",  # biases
    "qwen3",  # query and key norms
    "stablelm",  # a norm for each head
)
QUICK = ("llama", "gpt2", "bert", "gemma3_text", "mixtral")


def canonicalized(program: Program) -> Program:
    Runner(Context(), data.check_samples(program)).run(program, [Canonicalize()])
    return program


def listed(program: Program) -> str:
    """Every site, a line each; then why the others end, each reason once.

    Whether a rotary table is stored as it came or in another shape (`_folded`) is the model's spelling, not the site's.
    """
    lines = []
    for kind in Kind:
        sites, ends = find_with_ends(program, kind)
        lines += sorted(
            str(site).replace("inv_freq_folded", "inv_freq") for site in sites
        )  # transformers keeps some rotary tables in a set
        lines += [f"  no: {reason}" for reason in sorted({no.reason for no in ends})]
    return "\n".join(lines)


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_families(family: str, golden: Callable[[str, str], None]) -> None:
    from tiny_models import tiny_model

    from qcompiler.frontends.huggingface import capture

    program = canonicalized(capture(tiny_model(family)))
    golden(f"sites/{family}", listed(program))
    for kind in Kind:
        _, change = check_sites(program, kind)
        assert change <= 1e-9, kind


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("make", [tiny_llama, tiny_encoder])
def test_transforming_every_site_changes_nothing(make: Callable[[], Program], kind: Kind) -> None:
    count, change = check_sites(canonicalized(make()), kind, seed=3)
    assert count >= 2
    assert change <= 1e-12


def test_the_check_can_fail() -> None:
    """A site that forgets one of its tensors changes the outputs."""
    program = in_double(canonicalized(tiny_llama()))
    sample = data.check_samples(program)[0]
    before = program(**sample)["logits"]
    site = next(s for s in find(program, Kind.PERMUTE) if "gate_proj" in str(s) and "down_proj" in str(s))
    partial = Site(site.kind, site.uses[:-1], site.positions[:-1], site.exponents[:-1])
    partial.permute(program, torch.arange(site.channels).flip(0)[None])
    assert not torch.allclose(program(**sample)["logits"], before)


# -- rules, one by one ---------------------------------------------------------------------------------------------


def mlp(act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda up, down, x: F.linear(act(F.linear(x, up)), down)


def glu(up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, value = F.linear(x, up).chunk(2, -1)
    return F.linear(F.silu(gate) * value, down)


def halves(up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """The first half goes through a function, the second does not: they must not mix."""
    first, second = F.linear(x, up).split([8, 16], -1)
    return F.linear(torch.cat([torch.tanh(first), second], -1), down)


def one_for_all(up: Tensor, down: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """A factor for each head: a channel stays in its head."""
    heads = F.linear(x, up).unflatten(-1, (4, 6)) * weight
    return F.linear(heads.flatten(-2), down)


def reads(what: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda up, down, x: F.linear(what(F.linear(x, up)), down)


BOTH = "up rows, down columns"
RULES: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor], list[str]]] = {
    "two linear layers admit anything": (
        mlp(lambda x: x),
        {"up": random(24, 10), "down": random(7, 24)},
        [f"{kind} 24 channels: {BOTH}" for kind in ("permute", "scale", "rotate", "sign")],
    ),
    "relu lets factors through": (
        mlp(F.relu),
        {"up": random(24, 10), "down": random(7, 24)},
        [f"permute 24 channels: {BOTH}", f"scale 24 channels: {BOTH}"],
    ),
    "tanh lets signs through": (
        mlp(torch.tanh),
        {"up": random(24, 10), "down": random(7, 24)},
        [f"permute 24 channels: {BOTH}", f"sign 24 channels: {BOTH}"],
    ),
    "an RMSNorm lets signs through": (
        mlp(lambda x: F.rms_norm(x, (24,))),
        {"up": random(24, 10), "down": random(7, 24)},
        [f"{kind} 24 channels: {BOTH}" for kind in ("permute", "rotate", "sign")],
    ),
    "a LayerNorm does not": (
        mlp(lambda x: F.layer_norm(x, (24,))),
        {"up": random(24, 10), "down": random(7, 24)},
        [f"permute 24 channels: {BOTH}"],
    ),
    "a maximum over channels does not mind their order": (
        lambda up, down, x: F.linear(F.linear(x, up) * F.linear(x, up).amax(-1, keepdim=True), down),
        {"up": random(24, 10), "down": random(7, 24)},
        [f"permute 24 channels: {BOTH}"],
    ),
    "silu does not": (
        mlp(F.silu),
        {"up": random(24, 10), "down": random(7, 24)},
        [f"permute 24 channels: {BOTH}"],
    ),
    "a gate ties two halves of one matrix; factors pass through the other half": (
        glu,
        {"up": random(48, 10), "down": random(7, 24)},
        [f"{kind} 24 channels: {BOTH}" for kind in ("permute", "scale", "sign")],
    ),
    "pieces that are treated differently": (
        halves,
        {"up": random(24, 10), "down": random(7, 24)},
        [f"{what} channels: {BOTH}" for what in ("permute 8", "permute 16", "scale 16", "rotate 16", "sign 24")],
    ),
    "a factor for each head": (
        one_for_all,
        {"up": random(24, 10), "down": random(7, 24), "weight": random(4, 1)},
        [f"permute 4 x 6 channels: {BOTH}", f"scale 24 channels: {BOTH}", f"sign 24 channels: {BOTH}"],
    ),
    "a sum over channels does not mind their order": (
        lambda up, down, x: F.linear(F.linear(x, up) * F.linear(x, up).mean(-1, keepdim=True), down),
        {"up": random(24, 10), "down": random(7, 24)},
        [f"permute 24 channels: {BOTH}"],
    ),
    "a table read by position": (
        lambda up, down, table, x: F.linear(F.linear(x, up) + table[torch.arange(x.shape[1])], down),
        {"up": random(24, 10), "down": random(7, 24), "table": random(99, 24)},
        [
            f"{kind} 24 channels: up rows, table columns, down columns"
            for kind in ("permute", "scale", "rotate", "sign")
        ],
    ),
    "an unknown operator fixes what it reads": (
        reads(lambda x: x.cumsum(-1)),
        {"up": random(24, 10), "down": random(7, 24)},
        [],
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    function, parameters, expected = RULES[rule]
    program, _ = canonical(function, {"x": random(2, 5, 10)}, **parameters)
    assert [str(site) for kind in Kind for site in find(program, kind)] == expected
    for kind in Kind:
        assert check_sites(program, kind)[1] <= 1e-12


def test_a_refusal_names_the_operator_and_the_place() -> None:
    program, _ = canonical(
        reads(lambda x: x.cumsum(-1)), {"x": random(2, 5, 10)}, up=random(24, 10), down=random(7, 24)
    )
    reasons = [no.reason for no in find_with_ends(program, Kind.PERMUTE)[1]]
    assert "aten.cumsum reads it" in reasons
    assert "the program returns it" in reasons


def test_rotary_tables_take_no_factor() -> None:
    """A stored table of cosines reads like an embedding, and is none."""

    def function(up: Tensor, down: Tensor, cos: Tensor, sin: Tensor, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        heads = F.linear(x, up).unflatten(-1, (2, 8)).transpose(1, 2)
        turned = torch.ops.qc.rope(heads, cos[places][None], sin[places][None])
        return F.linear(turned.transpose(1, 2).flatten(-2), down)

    tables = {"cos": random(99, 4, seed=1), "sin": random(99, 4, seed=2)}
    program, _ = canonical(function, {"x": random(2, 5, 10)}, up=random(16, 10), down=random(7, 16), **tables)
    assert any(node.target is qc.rope for node in program.calls())
    assert [str(site) for site in find(program, Kind.SCALE)] == ["scale 8 channels: up rows, down columns"]
    assert [str(s) for s in find(program, Kind.PERMUTE)] == [
        "permute 4 channels: up rows, cos columns, sin columns, down columns"
    ]
    for kind in Kind:
        assert check_sites(program, kind)[1] <= 1e-12


@pytest.mark.parametrize(
    ("scheme", "free"),
    [
        ("int8:token:asym:dynamic", ["permute 2 x 8"]),  # one scale for a head's channels: their order is free
        ("int4:g4:asym:dynamic", []),
    ],
)
def test_rounded_keys_and_values(scheme: str, free: list[str]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, out: Tensor, x: Tensor) -> Tensor:
        heads = [F.linear(x, w).unflatten(-1, (2, 8)).transpose(1, 2) for w in (q, k, v)]
        mixed = torch.ops.qc.attention(*heads, key=scheme, value=scheme)
        return F.linear(mixed.transpose(1, 2).flatten(-2), out)

    weights = {name: random(16, 10, seed=i) for i, name in enumerate("qkv")}
    program, _ = canonical(function, {"x": random(2, 5, 10)}, **weights, out=random(7, 16))
    sites = [str(site) for kind in Kind for site in find(program, kind)]
    assert [site.partition(" channels")[0] for site in sites] == free * 2  # of queries with keys, and of values
    assert ("attention rounds it" in [no.reason for no in find_with_ends(program, Kind.SCALE)[1]]) is True
    for kind in Kind:
        assert check_sites(program, kind)[1] <= 1e-12


# -- bad requests --------------------------------------------------------------------------------------------------


def two_layers(kind: Kind) -> tuple[Program, Site]:
    program, _ = canonical(mlp(lambda x: x), {"x": random(2, 5, 10)}, up=random(24, 10), down=random(7, 24))
    return program, find(program, kind)[0]


BAD: list[tuple[Kind, str, Any, str]] = [
    (Kind.SCALE, "permute", torch.arange(24)[None], "this is a site to scale, not to permute"),
    (Kind.PERMUTE, "permute", torch.arange(23)[None], r"\[1, 24\] is the shape to give, not \[1, 23\]"),
    (Kind.PERMUTE, "permute", torch.zeros(1, 24, dtype=torch.int64), "must hold each of 0 to 23 once"),
    (Kind.SCALE, "scale", torch.zeros(1, 24), "factors must be finite and positive"),
    (Kind.ROTATE, "rotate", torch.ones(1, 24, 24), "a rotation must be orthogonal"),
    (Kind.SIGN, "flip", torch.zeros(1, 24), "signs must be 1 or -1"),
]


@pytest.mark.parametrize(("kind", "method", "given", "said"), BAD)
def test_bad_requests(kind: Kind, method: str, given: Tensor, said: str) -> None:
    program, site = two_layers(kind)
    before = dict(program.tensors)
    with pytest.raises(QCompilerError, match=said):
        getattr(site, method)(program, given)
    assert all(program.tensors[name] is tensor for name, tensor in before.items())
