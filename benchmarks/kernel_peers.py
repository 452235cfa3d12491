"""Other people's kernels for a 4-bit product: those that are installed here, timed beside ours by kernels.py."""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import No

Launch = Callable[[], object]
Make = Callable[[int, int, int], Callable[[Tensor], list[Launch]]]
GROUP = 128


def tinygemm(n: int, k: int, copies: int) -> Callable[[Tensor], list[Launch]]:
    """PyTorch's own kernel, which torchao calls: groups of 128, asymmetric, bfloat16."""
    codes = [torch.randint(256, (n, k // 2), dtype=torch.uint8, device="cuda") for _ in range(copies)]
    packed = [torch.ops.aten._convert_weight_to_int4pack(part, 8) for part in codes]
    grid = torch.randn(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
    return lambda x: [partial(torch.ops.aten._weight_int4pack_mm, x.bfloat16(), w, GROUP, grid) for w in packed]


def gemlite(n: int, k: int, copies: int) -> Callable[[Tensor], list[Launch]]:
    """gemlite: groups of 128, asymmetric, float16."""
    core: Any = importlib.import_module("gemlite.core")
    layers = []
    for _ in range(copies):
        layer = core.GemLiteLinear(
            4,
            group_size=GROUP,
            in_features=k,
            out_features=n,
            input_dtype=core.DType.FP16,
            output_dtype=core.DType.FP16,
        )
        codes = torch.randint(16, (n, k), dtype=torch.uint8, device="cuda")
        scale, zero = (torch.rand(n * k // GROUP, 1, dtype=torch.float16, device="cuda") for _ in range(2))
        layer.pack(codes, scale, zero, None)
        layers.append(layer)
    return lambda x: [partial(layer, x.half()) for layer in layers]


def bitsandbytes(n: int, k: int, copies: int) -> Callable[[Tensor], list[Launch]]:
    """bitsandbytes NF4: groups of 64, bfloat16."""
    library: Any = importlib.import_module("bitsandbytes")
    weights = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    packed = [library.functional.quantize_4bit(w, quant_type="nf4", blocksize=64) for w in weights]
    multiply = library.matmul_4bit
    return lambda x: [partial(multiply, x.bfloat16(), codes.t(), quant_state=state) for codes, state in packed]


def marlin(modules: tuple[str, str, str], n: int, k: int, copies: int) -> Callable[[Tensor], list[Launch]]:
    """Marlin: groups of 128, symmetric, float16.

    vLLM carries it, and GPTQModel, which builds it with nvcc at first use; `modules` hold the repacking, the product,
    and the names of code types.
    """
    ops, product, types = (importlib.import_module(name) for name in modules)
    none = torch.empty(0, dtype=torch.int32, device="cuda")
    scales = torch.rand(k // GROUP, n, dtype=torch.float16, device="cuda")
    space = product.marlin_make_workspace_new(torch.device("cuda"))
    codes = [torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32, device="cuda") for _ in range(copies)]
    weights = [ops.gptq_marlin_repack(part, none, k, n, 4) for part in codes]
    rest = (scales, none, none, none, space, types.scalar_types.uint4b8, n, k, True)
    return lambda x: [partial(product.apply_gptq_marlin_linear, x.half(), weight, *rest) for weight in weights]


VLLM = ("vllm._custom_ops", "vllm.model_executor.layers.quantization.utils.marlin_utils", "vllm.scalar_type")
GPTQMODEL = ("gptqmodel.utils.marlin", "gptqmodel.utils.marlin", "gptqmodel.utils.marlin_scalar_type")
PEERS: dict[str, tuple[str, Make]] = {
    "torch int4 (torchao)": ("torch", tinygemm),
    "gemlite W4A16": ("gemlite", gemlite),
    "bitsandbytes NF4": ("bitsandbytes", bitsandbytes),
    "Marlin (vLLM)": ("vllm", partial(marlin, VLLM)),  # its wheel brings a PyTorch of its own
    "Marlin (GPTQModel)": ("gptqmodel", partial(marlin, GPTQMODEL)),
}


def peers(n: int, k: int, copies: int) -> Iterator[tuple[str, Callable[[Tensor], list[Launch]] | No]]:
    """Each peer's launches for an x, or why it is not measured. One that fails is no reason for us to."""
    for name, (package, make) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            yield name, No(f"{package} is not installed", name)
            continue
        try:
            yield name, make(n, k, copies)
        except Exception as error:  # noqa: BLE001  whatever a peer raises on a GPU or in a version that it does not know
            yield name, No(f"{type(error).__name__}: {error}".splitlines()[0], name)
