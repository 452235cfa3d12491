"""Rules for qc.linear, qc.embedding and qc.dequantize: the first kernel that accepts the weight writes it."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from qcompiler.backends.onnxruntime import standard, weights
from qcompiler.backends.onnxruntime.activations import integer_product, rounded
from qcompiler.backends.onnxruntime.graph import Stored, typed
from qcompiler.backends.onnxruntime.lowering import Lowering, Rule, schema_arguments
from qcompiler.backends.onnxruntime.weights import Blockwise, signed
from qcompiler.errors import No
from qcompiler.program import Type
from qcompiler.rounding import activation_scheme
from qcompiler.scheme import QTensor
from qcompiler.target import Kernel


def weight_of(low: Lowering) -> tuple[str, QTensor]:
    """Name and record of the weight that the node being lowered reads."""
    assert low.node is not None
    parts = next(a for a in low.node.args if isinstance(a, (list, tuple)))
    name = str(parts[0].target).partition("::")[0]  # type: ignore[union-attr]
    tensors = [low.program.tensors[str(part.target)] for part in parts]  # type: ignore[union-attr]
    return name, QTensor.from_parts(tensors, str(low.node.kwargs["spec"]))


def choose(low: Lowering, op: str, name: str, weight: QTensor) -> Kernel:
    """The first kernel that accepts the weight; the reasons of those before it are kept."""
    for kernel in weights.KERNELS:
        if kernel.op == op:
            minima = low.options.opset_only and kernel in (weights.MATMUL_MINIMA, weights.GATHER_MINIMA)
            answer = No("the standard has no minima") if minima else kernel.accepts(weight)
            if not isinstance(answer, No):
                low.kernels[low.label] = kernel.name
                return kernel
            low.refusals.append(No(f"{kernel.name}: {answer.reason}", name))
    raise AssertionError(f"no kernel takes everything for {op}")


def linear(low: Lowering, out: Type, x: ir.Value, parts: Any, bias: ir.Value | None, spec: str) -> ir.Value:
    """x times the transposed weight, plus bias."""
    name, weight = weight_of(low)
    kernel = choose(low, "qc.linear", name, weight)
    if kernel is weights.FLOAT_MATMUL:
        product = low.op("MatMul", x, whole(low, name, weight, transposed=True))
        return product if bias is None else low.op("Add", product, bias)
    if weight.permutation is not None:
        x = typed(low.op("Gather", x, weight.permutation.long(), axis=-1), out)
    cut = Blockwise.of(name, weight)
    product = matmul_nbits(low, cut, x, None if kernel is weights.MATMUL_MINIMA else bias)
    if kernel is weights.MATMUL:
        return product
    product = low.op("Add", product, low.op("MatMul", group_sums(low, cut, x), correction(low, cut)))
    return product if bias is None else low.op("Add", product, bias)


def integer_linear(
    low: Lowering,
    out: Type,
    x: ir.Value,
    parts: Any,
    grid: Sequence[ir.Value],
    bias: ir.Value | None,
    spec: str,
    scheme: str,
) -> ir.Value:
    """A linear layer over a rounded activation: in integers where there is a kernel, over rounded floats elsewhere."""
    assert low.node is not None
    name, weight = weight_of(low)
    product = integer_product(low, x, schema_arguments(low.node)[2], scheme, name, weight, bias)
    if isinstance(product, ir.Value):
        low.kernels[low.label] = "MatMulIntegerToFloat"
        return product
    low.refusals.append(product.at(name))
    kind = activation_scheme(scheme)
    # Its own scales, one for each token and block, are finer; to round before as well only costs time.
    blocks = f"{kind.code}{kind.bits}" == "int8" and kind.granularity in ("token", "group")
    if blocks and low.options.accuracy_level == 4:
        low.refusals.append(No(f"MatMulNBits rounds activations to 8 bits in its own way, not {kind}", name))
    else:
        key = ("rounded", x, *grid, scheme)  # shared by the layers that read x
        if key not in low.memo:
            low.memo[key] = rounded(low, x, grid, scheme)
        x = low.memo[key]
    return linear(low, out, x, parts, bias, spec)


def matmul_nbits(low: Lowering, cut: Blockwise, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    """MatMulNBits over the blocks of a weight."""
    if low.options.opset_only:
        product = low.op("MatMul", x, standard.decoded(low, cut, transposed=True))
        return product if bias is None else low.op("Add", product, bias)
    zeros = cut.zeros()
    fused: ir.Value = low.contrib(
        "MatMulNBits",
        x,
        low.graph.store(f"{cut.name}::blocks", cut.codes(cut.weight.rows, cut.count, cut.blob)),
        low.graph.store(f"{cut.name}::scales", cut.scales()),
        low.graph.store(f"{cut.name}::zeros", zeros) if zeros else None,
        None,
        bias,
        K=cut.weight.columns,
        N=cut.weight.rows,
        bits=cut.bits,
        block_size=cut.block,
        accuracy_level=low.options.accuracy_level,
    )
    return fused


def group_sums(low: Lowering, cut: Blockwise, x: ir.Value) -> ir.Value:
    """The sum of x over each group of columns, [..., groups]; shared by the layers that read x."""
    key = ("group sums", x, cut.weight.scheme.group_size)
    if key not in low.memo:
        groups = cut.weight.group_index()
        member = torch.nn.functional.one_hot(groups, cut.weight.scheme.groups(cut.weight.columns)).float()
        name = f"members_{member.shape[0]}_{member.shape[1]}"
        stored = Stored(tuple(member.shape), torch.float32, lambda: member, name)
        low.memo[key] = low.op("MatMul", x, low.graph.store(name, stored))
    value: ir.Value = low.memo[key]
    return value


def correction(low: Lowering, cut: Blockwise) -> ir.Value:
    """What each group's sum is multiplied by, [groups, rows]."""
    return low.graph.store(f"{cut.name}::corrections", cut.corrections(transposed=True))


def embedding(low: Lowering, out: Type, ids: ir.Value, parts: Any, spec: str) -> ir.Value:
    """Rows of the weight."""
    name, weight = weight_of(low)
    kernel = choose(low, "qc.embedding", name, weight)
    if kernel is weights.FLOAT_GATHER:
        return low.op("Gather", whole(low, name, weight), ids, axis=0)
    if kernel is weights.GATHER_CODES:
        return standard.codes_looked_up(low, name, weight, ids)
    cut = Blockwise.of(name, weight)
    if low.options.opset_only and kernel is weights.GATHER:
        low.kernels[low.label] = "Gather and DequantizeLinear"
        return standard.looked_up(low, name, weight, ids, cut)
    zeros = cut.zeros()
    rows: ir.Value = low.contrib(
        "GatherBlockQuantized",
        low.graph.store(f"{name}::table", cut.codes(weight.rows, cut.count * cut.blob)),
        ids,
        low.graph.store(f"{name}::scales", cut.scales()),
        low.graph.store(f"{name}::zeros", zeros) if zeros else None,
        bits=cut.bits,
        block_size=cut.block,
        quantize_axis=1,
        gather_axis=0,
    )
    if kernel is weights.GATHER_MINIMA:
        table = low.graph.store(f"{name}::table corrections", cut.corrections(transposed=False))
        lift = low.op("Unsqueeze", low.op("Gather", table, ids, axis=0), [-1])
        cells = low.op("Reshape", rows, [0] * (out.rank - 1) + [cut.count, cut.block])
        rows = low.op("Reshape", low.op("Add", cells, lift), [0] * (out.rank - 1) + [cut.count * cut.block])
    if cut.count * cut.block == weight.columns:
        return rows
    return low.op("Slice", rows, [0], [weight.columns], [-1])


def dequantize(low: Lowering, out: Type, parts: Any, spec: str) -> ir.Value:
    """The whole float tensor: decoded when the model is loaded, or written as such."""
    name, weight = weight_of(low)
    matrix = len(weight.shape) == 2 and weight.dtype == torch.float32
    return standard.loaded(low, name, weight) if matrix and signed(weight) else whole(low, name, weight)


def whole(low: Lowering, name: str, weight: QTensor, transposed: bool = False) -> ir.Value:
    """The float tensor of a weight, computed when it is written."""
    shape = weight.shape[::-1] if transposed else weight.shape
    label = f"{name}::float{'.T' if transposed else ''}"
    make = (lambda: weight.dequantize().t()) if transposed else weight.dequantize
    return low.graph.store(label, Stored(tuple(shape), weight.dtype, make, label))


RULES: dict[str, Rule] = {
    "qc.linear": linear,
    "qc.integer_linear": integer_linear,
    "qc.embedding": embedding,
    "qc.dequantize": dequantize,
}
