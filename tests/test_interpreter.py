"""The interpreter, as tests/interpreter.py puts it right, computes what PyTorch computes."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

import triton
import triton.language as tl

from tests import interpreter


@pytest.fixture(autouse=True, scope="module")
def patched() -> None:
    interpreter.install()


@triton.jit
def arithmetic(a, b, out, KIND: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    x, y = tl.load(a + i), tl.load(b + i)
    if KIND == "add":
        z = x + y
    elif KIND == "fma":
        z = tl.fma(x, y, x)
    elif KIND == "cast":
        z = (x.to(tl.float32) * 1.001).to(out.dtype.element_ty)
    else:
        z = tl.where(x < y, x, -y)
    tl.store(out + i, z)


@triton.jit
def product(a, b, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    z = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(out + tl.arange(0, SIZE), tl.sum(z.to(out.dtype.element_ty), axis=1))


MEANINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "fma": lambda x, y: (x.double() * y.double() + x.double()).to(x.dtype),
    "cast": lambda x, y: (x.float() * 1.001).to(x.dtype),
    "choice": lambda x, y: torch.where(x < y, x, -y),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", MEANINGS)
def test_arithmetic_is_pytorchs(kind: str, dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty_like(a)
    arithmetic[1,](a, b, out, kind, 256)
    torch.testing.assert_close(out, MEANINGS[kind](a, b), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    a = torch.randn(256, generator=torch.Generator().manual_seed(0))
    out = torch.empty(256, dtype=dtype)
    arithmetic[1,](a, a, out, "cast", 256)
    assert torch.equal(out.float(), (a * 1.001).to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_and_sums(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(16, dtype=dtype)
    product[1,](a, b, out, 16)
    expected = (a.float() @ b.float()).to(dtype).float().sum(1)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


def test_triton_is_imported_with_a_kernel_and_not_before() -> None:
    code = "import sys, qcompiler, qcompiler.kernels, qcompiler.backends; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
