"""Every kernel gives what its meaning gives, on the GPU at hand: what kernels.py makes sure of before it measures."""

import itertools

import torch

from qcompiler.kernels.dequantize_wq import linear_decoded
from qcompiler.kernels.linear_a8 import linear_a8
from qcompiler.kernels.linear_float8 import linear_float8
from qcompiler.kernels.linear_wq import linear_wq
from qcompiler.kernels.packed_float8 import PackedFloat8
from qcompiler.kernels.packed_integers import PackedIntegers
from qcompiler.kernels.packed_weight import PackedWeight
from qcompiler.kernels.quantize import quantize
from qcompiler.ops import qc
from qcompiler.rounding import activation_scheme, codes_of, float8_weight
from qcompiler.scheme import QTensor, Scheme

FP8 = "fp8:token:dynamic"


def random_weight(scheme: str, n: int, k: int) -> QTensor:
    """Random codes, scales and zero points, made on the GPU."""
    kind = Scheme.parse(scheme)
    codes = torch.randint(256, (n, -(-k * kind.bits // 8)), dtype=torch.uint8, device="cuda")
    scale = torch.rand(n, kind.groups(k), device="cuda").mul(0.01).add(0.001).half()
    zero = None
    if not kind.symmetric:
        zero = torch.randint(kind.levels, scale.shape, dtype=torch.uint8, device="cuda")
    return QTensor(kind, (n, k), codes, scale, zero)


def check() -> None:
    """Every kernel gives what its meaning gives, on this GPU: fp16 and bf16, every width, split sums."""
    for width, dtype in itertools.product((2, 3, 4, 8), (torch.float16, torch.bfloat16)):
        weight = random_weight(f"int{width}:g128:asym", 1000, 4096)
        packed = PackedWeight.pack(weight, dtype)
        for tokens in (1, 16, 17, 64, 100):
            x = torch.randn(tokens, 4096, device="cuda", dtype=dtype)
            exact = x.double() @ weight.dequantize().double().T
            for name, found in (("fused", linear_wq(x, packed)), ("decoded", linear_decoded(x, packed))):
                error = ((found - exact).norm() / exact.norm()).item()
                assert error < 4 * torch.finfo(dtype).eps, f"W{width} {dtype} M={tokens} {name}: error {error:.2e}"
        again = [linear_wq(x, packed) for _ in range(3)]
        assert all(torch.equal(again[0], other) for other in again), "not the same bits every time"
    dynamic, shifted = "int8:token:dynamic", "int8:token:asym:dynamic"
    pairs = (("int4:g128", shifted), ("int4:g128:asym", shifted), ("int8:channel", dynamic))
    for scheme, activation in pairs:
        weight = random_weight(scheme, 1000, 4096)
        x = torch.randn(33, 4096, device="cuda")
        codes = codes_of(x, [], activation_scheme(activation))[0]
        packed_a8 = PackedIntegers.pack(weight, activation)
        made = quantize(x, [], activation, packed_a8.counted)
        assert torch.equal(made.codes, (codes - 128).flatten(-2).to(torch.int8)), f"{activation}: not rounded alike"
        token = [part for part in (made.scale, made.zero) if part is not None]
        found = linear_a8(made.codes, packed_a8, token, sums=made.sums)
        parts = list(weight.parts().values())
        meaning = qc.integer_linear(x, parts, [], spec=weight.spec(), scheme=activation).half()
        assert torch.equal(found, meaning), f"{scheme} {activation}: not to the last bit"
    if torch.cuda.get_device_capability() >= (8, 9):
        check_float8()
    print("every kernel gives what its meaning gives")


def check_float8() -> None:
    """Products of floats of 8 bits are as near to their meaning as the sums of tensor cores, of 14 bits or more."""
    floats = float8_weight(torch.randn(1000, 4096, device="cuda"), Scheme.parse("fp8:channel"))
    x = torch.randn(33, 4096, device="cuda")
    for weight in (floats, random_weight("int4:g128:asym", 1000, 4096)):
        packed = PackedFloat8.pack(weight, FP8)
        made = quantize(x, [], FP8, packed.counted)
        assert made.scale is not None
        found = linear_float8(made.codes, packed, [made.scale], dtype=torch.float32, sums=made.sums)
        meaning = qc.integer_linear(x, list(weight.parts().values()), [], spec=weight.spec(), scheme=FP8)
        error = ((found - meaning).norm() / meaning.norm()).item()
        assert error < 1e-3, f"{weight.scheme} {FP8}: error {error:.2e}"
