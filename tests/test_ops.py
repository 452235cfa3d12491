"""The eager meanings, which every kernel is tested against, against definitions written with plain loops."""

import cmath
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler import ops
from qcompiler.ops import qc
from qcompiler.scheme import QTensor, Scheme

WINDOWS = {"left": st.integers(-1, 4), "right": st.integers(-1, 3), "chunk": st.integers(0, 4)}


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sees(query: int, key: int, first: int, padding: list[int] | None, left: int, right: int, chunk: int) -> bool:
    """Whether the token at position `query` sees the one at `key`; `first` is the first real token."""
    if padding is not None and not padding[key]:
        return False
    if left >= 0 and key < query - left:
        return False
    if right >= 0 and key > query + right:
        return False
    return chunk == 0 or (query - first) // chunk == (key - first) // chunk


def left_padding(batch: int, keys: int, seed: int) -> Tensor:
    """1 at real tokens: the rows are padded on the left, by different amounts, never wholly."""
    start = torch.randint(0, keys, (batch, 1), generator=random(seed))
    return (torch.arange(keys)[None] >= start).long()


def seen_by_definition(batch: int, queries: int, keys: int, padding: Tensor | None, **window: int) -> Tensor:
    found = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    for b in range(batch):
        row = None if padding is None else padding[b].tolist()
        first = 0 if row is None else row.index(1)
        for q in range(queries):
            for k in range(keys):
                found[b, 0, q, k] = sees(q + keys - queries, k, first, row, **window)
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 99),
    st.fixed_dictionaries(WINDOWS),
)
def test_mask(batch: int, queries: int, past: int, padded: bool, seed: int, window: dict[str, int]) -> None:
    keys = queries + past
    padding = left_padding(batch, keys, seed) if padded else None
    found = qc.mask(torch.empty(0), padding, queries, keys, **window)
    assert found.shape == (batch if padded else 1, 1, queries, keys)
    assert torch.equal(found, seen_by_definition(batch if padded else 1, queries, keys, padding, **window))


# -- attention -----------------------------------------------------------------------------------------------


def attention_by_definition(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, added: Tensor, sinks: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """One query and head at a time, in float64; a query that sees nothing averages, or gives all to its sink."""
    batch, heads, queries, _ = q.shape
    found = torch.zeros(batch, heads, queries, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            for i in range(queries):
                scores = []
                for j in range(k.shape[2]):
                    s = float(q[b, h, i].double() @ k[b, g, j].double()) * scale
                    s = softcap * math.tanh(s / softcap) if softcap else s
                    scores.append(s + float(added[b, h, i, j]))
                visible = [j for j in range(len(scores)) if seen[b, 0, i, j]]
                if not visible and sinks is None:
                    found[b, h, i] = v[b, g].double().mean(0)
                    continue
                sink = [] if sinks is None else [float(sinks[h])]
                top = max([scores[j] for j in visible] + sink)
                total = sum(math.exp(x - top) for x in [scores[j] for j in visible] + sink)
                for j in visible:
                    found[b, h, i] += math.exp(scores[j] - top) / total * v[b, g, j].double()
    return found


@settings(max_examples=120, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(0, 3)),
    widths=st.tuples(st.sampled_from([1, 4, 8]), st.sampled_from([2, 4])),
    window=st.fixed_dictionaries(WINDOWS),
    extra=st.fixed_dictionaries({n: st.booleans() for n in ("padding", "bias", "sinks", "mask", "float mask")}),
    softcap=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 99),
)
def test_attention(
    sizes: tuple[int, ...],
    widths: tuple[int, int],
    window: dict[str, int],
    extra: dict[str, bool],
    softcap: float,
    seed: int,
) -> None:
    batch, kv_heads, group, queries, past = sizes
    heads, keys, rand = kv_heads * group, queries + past, random(seed)
    q = torch.randn(batch, heads, queries, widths[0], generator=rand)
    k = torch.randn(batch, kv_heads, keys, widths[0], generator=rand)
    v = torch.randn(batch, kv_heads, keys, widths[1], generator=rand)
    padding = left_padding(batch, keys, seed) if extra["padding"] else None
    bias = torch.randn(1, heads, queries, keys, generator=rand) if extra["bias"] else None
    sinks = torch.randn(heads, generator=rand) if extra["sinks"] else None
    seen = seen_by_definition(batch, queries, keys, padding, **window)
    added = torch.zeros(batch, heads, queries, keys) + (0 if bias is None else bias)
    mask = None
    if extra["mask"]:
        mask = torch.rand(batch, 1, queries, keys, generator=rand) > 0.3
        seen = seen & mask
    elif extra["float mask"]:
        mask = torch.randn(batch, 1, queries, keys, generator=rand)
        added = added + mask
    found = qc.attention(q, k, v, mask, padding, bias, sinks, scale=0.6, softcap=softcap, **window)
    expected = attention_by_definition(q, k, v, seen, added, sinks, 0.6, softcap)
    assert found.dtype == v.dtype
    assert torch.allclose(found.double(), expected, atol=2e-5)


def test_plain_attention_is_torchs() -> None:
    q, k, v = (torch.randn(2, 4, 5, 8, generator=random(i)) for i in range(3))
    for right, causal in ((-1, False), (0, True)):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        assert torch.allclose(qc.attention(q, k, v, scale=ops.default_scale(8), right=right), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_attention_in_half_precision_is_finite(dtype: torch.dtype, softcap: float) -> None:
    """Wholly padded queries, and scores near the end of the range."""
    q, k, v = (10 * torch.randn(2, 2, 4, 8, generator=random(i)).to(dtype) for i in range(3))
    padding = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    found = qc.attention(q, k, v, None, padding, scale=1.0, right=0, softcap=softcap)
    wide = qc.attention(q.float(), k.float(), v.float(), None, padding, scale=1.0, right=0, softcap=softcap)
    assert found.dtype == dtype
    assert bool(found.isfinite().all())
    assert torch.allclose(found.float()[1], wide[1], atol=0.3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.integers(1, 4), st.fixed_dictionaries(WINDOWS), st.booleans(), st.integers(0, 99))
def test_cached_attention_is_attention_over_all(
    past: int, new: int, window: dict[str, int], padded: bool, seed: int
) -> None:
    rand, keys = random(seed), past + new
    q, k = torch.randn(2, 4, new, 8, generator=rand), torch.randn(2, 2, keys, 8, generator=rand)
    v = torch.randn(2, 2, keys, 6, generator=rand)
    padding = left_padding(2, keys, seed) if padded else None
    old = (k[:, :, :past], v[:, :, :past])
    y, grown_k, grown_v = qc.cached_attention(
        q, k[:, :, past:], v[:, :, past:], *old, None, padding, scale=0.5, **window
    )
    assert torch.equal(grown_k, k)
    assert torch.equal(grown_v, v)
    assert torch.equal(y, qc.attention(q, k, v, None, padding, scale=0.5, **window))


# -- rope ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 2), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3), st.booleans(), st.integers(0, 99))
def test_rope_turns_pairs(batch: int, length: int, half: int, rest: int, interleaved: bool, seed: int) -> None:
    """Each pair of channels is a complex number that is multiplied by e^(i angle)."""
    rand = random(seed)
    x = torch.randn(batch, 2, length, 2 * half + rest, generator=rand)
    angles = 6 * torch.rand(batch, length, half, generator=rand)
    found = qc.rope(x, angles.cos(), angles.sin(), interleaved=interleaved)
    expected = x.clone()
    for b in range(batch):
        for h in range(2):
            for s in range(length):
                for i in range(half):
                    one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
                    turned = complex(x[b, h, s, one], x[b, h, s, two]) * cmath.exp(1j * float(angles[b, s, i]))
                    expected[b, h, s, one], expected[b, h, s, two] = turned.real, turned.imag
    assert torch.allclose(found, expected, atol=1e-5)


# -- quantized -----------------------------------------------------------------------------------------------


WEIGHTS = {
    "symmetric": QTensor.quantize(torch.randn(16, 12, generator=random(0)), Scheme.parse("int4:g5")),
    "asymmetric": QTensor.quantize(torch.randn(16, 12, generator=random(1)), Scheme.parse("int3:g5:asym")),
    "tensor": QTensor.quantize(torch.randn(16, 12, generator=random(2)), Scheme.parse("int8:tensor")),
    "other axis": QTensor.quantize(torch.randn(16, 12, generator=random(3)), Scheme.parse("int4:g5"), axis=0),
    "square, other axis": QTensor.quantize(torch.randn(12, 12, generator=random(3)), Scheme.parse("int4"), axis=0),
    "one row": QTensor.quantize(torch.randn(1, 12, generator=random(4)), Scheme.parse("int4:g5:asym")),
    "one column": QTensor.quantize(torch.randn(16, 1, generator=random(4)), Scheme.parse("int4")),
    "half": QTensor.quantize(torch.randn(16, 12, generator=random(5)).half(), Scheme.parse("int4")),
}
_PLAIN = WEIGHTS["symmetric"]
WEIGHTS["codebook"] = _PLAIN.with_parts(codebook=torch.randn(16, generator=random(6)))
WEIGHTS["permutation"] = _PLAIN.with_parts(permutation=torch.randperm(12, generator=random(7)).int())
WEIGHTS["two levels"] = _PLAIN.with_parts(scale=QTensor.quantize(_PLAIN.parts()["scale"], Scheme.parse("int6")))


@pytest.mark.parametrize("name", WEIGHTS)
def test_quantized_ops_are_those_of_the_float_tensor(name: str) -> None:
    weight = WEIGHTS[name]
    parts, spec, whole = list(weight.parts().values()), weight.spec(), weight.dequantize()
    rows, columns = weight.shape
    assert torch.equal(qc.dequantize(parts, spec=spec), whole)
    for shape in ((3,), (2, 3), (2, 0), ()):
        ids = torch.randint(0, rows, shape, generator=random(8))
        assert torch.equal(qc.embedding(ids, parts, spec=spec), torch.nn.functional.embedding(ids, whole))
        x = torch.randn(*shape, columns, generator=random(9))
        bias = torch.randn(rows, generator=random(10))
        for given_bias in (None, bias):
            expected = torch.nn.functional.linear(x, whole.to(x.dtype), given_bias)
            assert torch.equal(qc.linear(x, parts, given_bias, spec=spec), expected)


# -- what PyTorch expects of an operator ---------------------------------------------------------------------


def cases() -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """One call of each operator."""
    x = torch.randn(2, 4, 3, 8)
    k, v, past = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6), torch.randn(2, 2, 2, 8)
    turned = torch.randn(2, 3, 4, 8).transpose(1, 2)
    parts, spec = list(WEIGHTS["asymmetric"].parts().values()), WEIGHTS["asymmetric"].spec()
    half, half_spec = list(WEIGHTS["half"].parts().values()), WEIGHTS["half"].spec()
    ids = torch.tensor([[1, 2], [3, 4]])
    return [
        ("mask", (x, left_padding(2, 5, 0), 3, 5), {"right": 0}),
        ("mask", (x, None, 3, 5), {"left": 1, "chunk": 2}),
        ("attention", (x, k, v), {"scale": 0.3}),
        ("attention", (x, k, v, None, left_padding(2, 5, 0), None, torch.randn(4)), {"right": 0, "softcap": 2.0}),
        ("cached_attention", (x, k[:, :, :3], v[:, :, :3], past, past[..., :6]), {"right": 0}),
        ("rope", (turned, torch.randn(1, 3, 2), torch.randn(1, 3, 2)), {}),
        ("rope", (turned, torch.randn(2, 3, 4), torch.randn(2, 3, 4)), {"interleaved": True}),
        ("hadamard", (turned,), {"size": 4}),
        ("hadamard", (torch.randn(2, 24).half(),), {"size": 12}),
        ("dequantize", (half,), {"spec": half_spec}),
        ("linear", (torch.randn(2, 3, 12), parts, torch.randn(16)), {"spec": spec}),
        ("embedding", (ids, half), {"spec": half_spec}),
    ]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case[0])
def test_operators_are_well_formed(case: tuple[str, tuple[Any, ...], dict[str, Any]]) -> None:
    """Nothing is written to or aliased, and the shape functions give the shapes and dtypes of the meanings."""
    name, args, kwargs = case
    torch.library.opcheck(getattr(qc, name), args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_every_operator_is_complete() -> None:
    assert set(ops.SCHEMAS) == set(ops.MEANINGS)
    for name in ops.SCHEMAS:
        assert callable(getattr(ops, f"_fake_{name}"))
        assert f"| `qc.{name}` |" in str(ops.__doc__)
    with pytest.raises(AttributeError):
        _ = qc.no_such_operator


def test_importing_registers_nothing() -> None:
    script = """
import torch, qcompiler.ops
print(hasattr(torch.ops.qc, "linear"))
qcompiler.ops.load()
qcompiler.ops.load()
print(qcompiler.ops.qc.linear)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "qc.linear.default"]
