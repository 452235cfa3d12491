"""Decoding over long low-bit caches, beside PyTorch's own attention in bf16: rows for kernels.py."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qcompiler.kernels.attention_kvq import attention_kvq, cost
from qcompiler.kernels.cost import Cost
from qcompiler.kernels.kv_append import kv_append
from qcompiler.kernels.kv_cache import QuantizedCache
from qcompiler.kernels.timing import copies_of, seconds
from qcompiler.ops import qc

BATCH, KV_HEADS, GROUP, D = 8, 8, 4, 128  # a model of 8 billion parameters
LENGTHS = (1024, 8192, 32768)
SCHEMES = {
    "KV int8": "int8:token:asym:dynamic",
    "KV int4": "int4:token:asym:dynamic",
    "KV int3": "int3:token:asym:dynamic",
    "KV NF4": "nf4:token:dynamic",
}
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def check() -> None:
    """The kernels give what qc.attention means, over 300 tokens."""
    random = partial(torch.randn, device="cuda", dtype=torch.float16)
    q, k, v = random(2, KV_HEADS * GROUP, 1, D), random(2, KV_HEADS, 300, D), random(2, KV_HEADS, 300, D)
    places, ends = (torch.full((2,), number, dtype=torch.int32, device="cuda") for number in (0, 300))
    for name, scheme in SCHEMES.items():
        caches = QuantizedCache.pair(scheme, scheme, 2, KV_HEADS, 512, D, device="cuda")
        for new, cache in zip((k, v), caches, strict=True):
            kv_append(new, cache, places)
        found = attention_kvq(q[:, :, 0], *caches, places, ends, D**-0.5)
        meant = qc.attention(q.float(), k.float(), v.float(), scale=D**-0.5, key=scheme, value=scheme)[:, :, 0]
        error = float((found - meant).norm() / meant.norm())
        assert error < 1e-2, f"{name}: error {error:.2e}"


def caches_of(scheme: str, length: int) -> tuple[QuantizedCache, QuantizedCache]:
    """Caches with random codes, and grids that make numbers of ordinary size."""
    pair = QuantizedCache.pair(scheme, scheme, BATCH, KV_HEADS, length, D, device="cuda")
    grid = torch.tensor([0.01, 4.0], dtype=torch.float16, device="cuda").view(torch.int32)
    for cache in pair:
        cache.words.random_(-32768, 32767)
        cache.grids.copy_(grid.expand_as(cache.grids))
    return pair


def dense(q: Tensor, length: int) -> float:
    """The seconds of PyTorch's fastest attention in bf16."""
    shape = (BATCH, KV_HEADS, length, D)
    count = copies_of(2 * 2 * BATCH * KV_HEADS * length * D)
    stock = [torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    found = []
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                attend = partial(F.scaled_dot_product_attention, enable_gqa=True)
                found.append(seconds([partial(attend, q[:, :, None], kv[0], kv[1]) for kv in stock]))
        except RuntimeError:  # not for these shapes, or not on this GPU
            continue
    return min(found)


def rows() -> Iterator[tuple[str, tuple[int, int], int, float, Cost, float]]:
    """Name, (tokens, channels), queries, seconds, cost, PyTorch's seconds."""
    q = torch.randn(BATCH, KV_HEADS * GROUP, D, device="cuda", dtype=torch.bfloat16)
    for length in LENGTHS:
        begins, ends = (torch.full((BATCH,), n, dtype=torch.int32, device="cuda") for n in (0, length))
        beside = dense(q, length)
        for name, scheme in SCHEMES.items():
            first = caches_of(scheme, length)
            stock = [first, *(caches_of(scheme, length) for _ in range(copies_of(2 * first[0].words.nbytes) - 1))]
            took = seconds([partial(attention_kvq, q, *pair, begins, ends, D**-0.5) for pair in stock])
            yield name, (length, D), BATCH, took, cost(first[0], length, KV_HEADS * GROUP), beside
