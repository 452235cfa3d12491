"""GGUF's weights on the kernels: Q4_K and Q6_K on linear_gguf, Q4_0, Q4_1 and Q8_0 on linear_wq; packing, inverted."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from qcompiler.errors import No
from qcompiler.formats import gguf_types
from qcompiler.formats.gguf import GgufFile
from qcompiler.kernels import linear_wq as wq
from qcompiler.kernels.cost import H200
from qcompiler.kernels.linear_gguf import ACCEPTS, cost, linear_gguf
from qcompiler.kernels.packed_blocks import PackedBlocks
from qcompiler.kernels.packed_weight import PackedWeight
from qcompiler.kernels.planes import pack_planes, unpack_planes
from qcompiler.kernels.split import Config
from qcompiler.scheme import QTensor, Scheme
from tests import interpreter
from tests.test_k_quants import blocks_of

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
KINDS = st.sampled_from(["Q4_K", "Q6_K"])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True, scope="module")
def patched() -> None:
    interpreter.install()


def weight_of(kind: str, n: int, k: int) -> QTensor:
    return gguf_types.decode(kind, torch.from_numpy(blocks_of(kind, n, k, seed=n)), (n, k))


def assert_close(out: Tensor, x: Tensor, weight: QTensor, bias: Tensor | None = None) -> None:
    """As near to exact arithmetic as scales and values rounded to the dtype of x allow, element by element."""
    shift = None if bias is None else bias.double()
    exact = torch.nn.functional.linear(x.double(), weight.dequantize().double(), shift)
    scale = weight.scale.dequantize() if isinstance(weight.scale, QTensor) else weight.scale
    largest = scale.double().abs().amax(1) * weight.scheme.levels
    bound = torch.finfo(x.dtype).eps * (x.double().abs().sum(-1, keepdim=True) * largest + exact.abs()) + 1e-7
    assert bool(((out - exact).abs() <= bound).all())


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 200), st.integers(1, 300))
def test_planes_of_six_bits(n: int, k: int) -> None:
    codes = torch.randint(64, (n, k), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    words = pack_planes(codes, 6, rows=128, columns=128)
    assert words.shape == (-(-n // 128), -(-k // 128), 3, 128, 16)
    assert torch.equal(unpack_planes(words, 6, n, k), codes)


@settings(max_examples=10, deadline=None)
@given(KINDS, st.integers(1, 200), st.integers(1, 4), DTYPES)
def test_packing_is_inverted(kind: str, n: int, superblocks: int, dtype: torch.dtype) -> None:
    weight = weight_of(kind, n, 256 * superblocks)
    again = PackedBlocks.pack(weight, dtype).unpack()
    assert torch.equal(again.codes, weight.codes)
    for found, was in ((again.scale, weight.scale), (again.minimum, weight.minimum)):
        assert (found is None) == (was is None)
        if isinstance(was, QTensor):
            assert isinstance(found, QTensor)
            assert torch.equal(found.codes, was.codes)
            assert isinstance(was.scale, Tensor)
            exact = dtype == torch.float16
            torch.testing.assert_close(found.scale, was.scale.float(), rtol=0 if exact else 2**-8, atol=0)
    if dtype == torch.float16:
        assert torch.equal(again.dequantize(), weight.dequantize())


@settings(max_examples=15, deadline=None)
@given(KINDS, st.integers(1, 20), st.integers(1, 140), st.integers(1, 2), DTYPES, st.booleans())
def test_against_the_meaning(
    kind: str, tokens: int, n: int, superblocks: int, dtype: torch.dtype, biased: bool
) -> None:
    weight = weight_of(kind, n, 256 * superblocks)
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, weight.columns, generator=random).to(dtype)
    bias = torch.randn(n, generator=random).to(dtype) if biased else None
    assert_close(linear_gguf(x, PackedBlocks.pack(weight, dtype), bias), x, weight, bias)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("tokens", [33, 130])
def test_any_number_of_tokens(kind: str, tokens: int) -> None:
    weight = weight_of(kind, 128, 256)
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(0)).half()
    assert_close(linear_gguf(x, PackedBlocks.pack(weight)), x, weight)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_a_split_sum_is_the_same_every_time(kind: str) -> None:
    weight = weight_of(kind, 200, 1280)
    x = torch.randn(5, 1280, generator=torch.Generator().manual_seed(0)).half()
    packed = PackedBlocks.pack(weight)
    first, second = (linear_gguf(x, packed, config=Config(8, 3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not packed.arrived.any()
    assert_close(first, x, weight)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_level_is_for_linear_wq(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Blocks that gguf-py quantized, in a file, as the front end reads them."""
    values = np.random.default_rng(0).normal(0, 0.05, (130, 320)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("w", gguf.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weight = GgufFile.read(tmp_path / "one.gguf").qtensor("w")
    assert isinstance(weight, QTensor)
    assert wq.ACCEPTS(weight)
    x = torch.randn(5, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = PackedWeight.pack(weight, dtype)
    assert_close(wq.linear_wq(x, packed), x, weight)
    if dtype == torch.float16:
        assert torch.equal(packed.unpack().dequantize(), weight.dequantize())


def test_what_is_accepted() -> None:
    assert str(ACCEPTS).endswith("k_quant()")
    assert ACCEPTS(weight_of("Q4_K", 8, 256))
    assert ACCEPTS(weight_of("Q6_K", 8, 512))
    wanted = No("scales of two levels as Q4_K or Q6_K have them are wanted")
    assert ACCEPTS(QTensor.quantize(torch.randn(8, 256), Scheme.parse("int4:g32"))) == wanted
    weight = weight_of("Q4_K", 8, 256)
    assert ACCEPTS(weight.with_parts(minimum=None)) == wanted
    assert isinstance(weight.scale, QTensor)
    shifted = weight.scale.with_parts(zero=torch.ones(8, 1, dtype=torch.uint8))
    assert ACCEPTS(weight.with_parts(scale=shifted)) == wanted
    assert wq.ACCEPTS(weight) == No("the scales are quantized themselves")
    short = QTensor.from_parts(weight.parts(), weight.spec().replace('"shape":[8,256]', '"shape":[8,224]', 1))
    assert ACCEPTS(short) == No("k=224 is not a multiple of 256")


def test_cost_is_that_of_reading_the_weight() -> None:
    for kind, bits in (("Q4_K", 4.625), ("Q6_K", 6.625)):
        packed = PackedBlocks.pack(weight_of(kind, 512, 1024))
        assert packed.nbytes == 512 * 1024 * bits / 8 + 512 * 4
        assert cost(packed, 1).seconds(H200) > H200.launch
