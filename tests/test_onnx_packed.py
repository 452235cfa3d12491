"""Quantized matrices in ONNX graphs become records with their own codes, and are written back as they were."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.bits import pack_bits
from qcompiler.errors import No
from qcompiler.formats.onnx_blocks import Packed, in_floats, packed_of
from qcompiler.frontends import onnx as frontend
from qcompiler.frontends.onnx_write import export
from qcompiler.ops import qc
from qcompiler.passes.carry import Carry
from qcompiler.pipeline import Context
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme
from tests.test_onnx_frontend import INT64, model, runtime, targets

onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
helper = onnx.helper
N, K = 24, 80


def chance(seed: int = 0) -> Any:
    return np.random.default_rng(seed)


def with_contrib(proto: Any) -> Any:
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


def nbits(bits: int, block: int, zeros: bool, bias: bool = True, seed: int = 0) -> Any:
    """x [n, K] times a matrix of random codes, as MatMulNBits; the last block of a row is not full."""
    random, blocks = chance(seed), -(-K // block)
    tensors: dict[str, Any] = {
        "codes": random.integers(0, 256, (N, blocks, block * bits // 8), dtype=np.uint8),
        "scales": random.uniform(0.01, 0.1, (N, blocks)).astype(np.float32),
    }
    if zeros:
        tensors["zeros"] = random.integers(0, 256, (N, -(-blocks * bits // 8)), dtype=np.uint8)
    if bias:
        tensors["bias"] = random.normal(size=N).astype(np.float32)
    inputs = ["x", "codes", "scales", "zeros" if zeros else "", "", "bias" if bias else ""]
    while not inputs[-1]:
        inputs.pop()
    how = {"K": K, "N": N, "bits": bits, "block_size": block, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", inputs, ["y"], name="m", domain="com.microsoft", **how)
    return with_contrib(model([node], {"x": ["n", K]}, ["y"], **tensors))


def decoding(kind: int, turned: bool, block: int, zeros: bool) -> Any:
    """x times a matrix that DequantizeLinear decodes: of `kind`, as MatMul or (not turned) as Gemm wants it."""
    random, axis = chance(1), 0 if turned else 1
    shape = (K, N) if turned else (N, K)
    steps = list(shape)
    steps[axis] = K // block
    low, high = {2: (0, 256), 3: (-128, 128), 21: (0, 16), 22: (-8, 8)}[kind]

    def codes(name: str, shape: Any) -> Any:
        values = random.integers(low, high, shape)
        if kind in (2, 3):
            return helper.make_tensor(name, kind, shape, values.astype(np.uint8).tobytes(), raw=True)
        return helper.make_tensor(name, kind, shape, values.flatten().tolist())

    tensors = [
        codes("w", shape),
        helper.make_tensor("s", 1, steps, random.uniform(0.01, 0.1, steps).flatten().tolist()),
    ]
    if zeros:
        tensors.append(codes("z", steps))
    names = [t.name for t in tensors]
    nodes = [
        helper.make_node("DequantizeLinear", names, ["d"], name="decode", axis=axis, block_size=block),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="m")
        if turned
        else helper.make_node("Gemm", ["x", "d"], ["y"], name="m", transB=1),
    ]
    proto = model(nodes, {"x": ["n", K]}, ["y"], opset=21)
    proto.ir_version = 10
    proto.graph.initializer.extend(tensors)
    return proto


def table(bits: int, zeros: bool) -> Any:
    """Rows of a table, as GatherBlockQuantized."""
    random = chance(2)
    tensors: dict[str, Any] = {
        "codes": random.integers(0, 256, (30, 64 * bits // 8), dtype=np.uint8),
        "scales": random.uniform(0.01, 0.1, (30, 4)).astype(np.float32),
    }
    if zeros:
        tensors["zeros"] = random.integers(0, 256, (30, 4 * bits // 8), dtype=np.uint8)
    inputs = ["codes", "ids", "scales", *(["zeros"] if zeros else [])]
    how = {"bits": bits, "block_size": 16, "quantize_axis": 1, "gather_axis": 0}
    node = helper.make_node("GatherBlockQuantized", inputs, ["y"], name="g", domain="com.microsoft", **how)
    return with_contrib(model([node], {"ids": (INT64, ["n", 3])}, ["y"], **tensors))


BITS = {"2": 2, "3": 8, "4": 4, "8": 8, "one": 4, "21": 4, "22": 4}
MODELS = {
    **{f"nbits-{b}-{z}": (nbits(b, 32, z), {"x": torch.randn(3, K)}) for b in (2, 4, 8) for z in (False, True)},
    "nbits-one-block": (nbits(4, 128, True, bias=False), {"x": torch.randn(3, K)}),
    **{
        f"decode-{kind}-{turned}-{zeros}": (decoding(kind, turned, 16, zeros), {"x": torch.randn(3, K)})
        for kind in (2, 3, 21, 22)
        for turned in (False, True)
        for zeros in (False, True)
    },
    **{f"table-{b}-{z}": (table(b, z), {"ids": torch.randint(0, 30, (2, 3))}) for b in (4, 8) for z in (False, True)},
}


def in_floats_by_onnxruntime(proto: Any, feed: dict[str, torch.Tensor]) -> torch.Tensor:
    """What ONNX Runtime gives without rounding activations: no accuracy_level, and no fusion that sets one."""
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    in_floats(copy)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in feed.items()})[0])


def carried(program: Program) -> Program:
    copy = program.copy()
    Carry().run(copy, Context())
    return copy


@pytest.mark.parametrize("name", MODELS)
def test_codes_are_read_and_written_as_they_were(name: str) -> None:
    proto, feed = MODELS[name]
    program = frontend.capture(proto)
    assert not program.info["onnx"]["opaque"]
    (record,) = program.codes.values()
    assert record.scheme.bits == (8 if name.startswith("decode-2-") else BITS[name.split("-")[1]])
    expected = in_floats_by_onnxruntime(proto, feed)
    torch.testing.assert_close(program(**feed)["y"], expected, rtol=1e-4, atol=1e-4)
    quantized = carried(program)
    assert targets(quantized) & {qc.linear, qc.embedding}
    torch.testing.assert_close(quantized(**feed)["y"], expected, rtol=1e-4, atol=1e-4)
    for back in (program, quantized):
        made = export(back)
        assert [node.op_type for node in made.graph.node] == [node.op_type for node in proto.graph.node]
        assert torch.equal(runtime(made, feed)[0], runtime(proto, feed)[0])
        if not name.startswith("nbits"):  # there the codes beyond the end of a row are others
            assert made == proto


@pytest.mark.parametrize("name", ["nbits-4-True", "nbits-one-block", "decode-22-True-False", "table-4-True"])
def test_a_matrix_that_changed_is_written_in_floats(name: str) -> None:
    proto, feed = MODELS[name]
    program = frontend.capture(proto)
    (key,) = program.codes
    program.tensors[key] = program.tensors[key] * 2
    made = export(program)
    assert {n.op_type for n in made.graph.node} <= {"MatMul", "Add", "Gemm", "Gather"}
    assert not any(t.name in ("codes", "scales", "zeros", "w", "s", "z") for t in made.graph.initializer)
    torch.testing.assert_close(runtime(made, feed)[0], program(**feed)["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["nbits-4-True", "nbits-8-False", "decode-22-True-False"])
def test_a_matrix_that_was_quantized_again_is_written_so(name: str) -> None:
    proto, feed = MODELS[name]
    program = frontend.capture(proto)
    (key,) = program.codes
    program.quantize_tensor(key, QTensor.quantize(program.tensors[key], Scheme.parse("int2:g16:asym")))
    made = export(program)
    assert [node.op_type for node in made.graph.node] == ["MatMulNBits"]
    torch.testing.assert_close(runtime(made, feed)[0], program(**feed)["y"], rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from((2, 4, 8)), block=st.sampled_from((16, 32, 64)), k=st.integers(1, 200), seed=st.integers(0, 9)
)
def test_blocks_mean_what_the_specification_says(bits: int, block: int, k: int, seed: int) -> None:
    """Code by code: column j of row i is in block j // block, at bit j % block * bits of its bytes."""
    random, blocks, n = chance(seed), -(-k // block), 3
    codes = random.integers(0, 256, (n, blocks, block * bits // 8), dtype=np.uint8)
    scales = random.uniform(0.1, 1, (n, blocks)).astype(np.float32)
    zeros = random.integers(0, 1 << bits, (n, blocks), dtype=np.uint8)
    given = {"c": codes, "s": scales, "z": pack_bits(torch.from_numpy(zeros), bits).numpy()}
    packed = Packed("MatMulNBits", "c", "s", "z", (n, k), bits, block)
    values = packed.record(lambda name: torch.from_numpy(given[name])).dequantize()
    for i in range(n):
        for j in range(0, k, 7):
            at = j % block * bits
            code = int(codes[i, j // block, at // 8]) >> at % 8 & (1 << bits) - 1
            wanted = (code - int(zeros[i, j // block])) * scales[i, j // block]
            assert float(values[i, j]) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"N": 99}, "has type 2 and 1152 values, not"),
        ({"bits": 5}, "its attributes are"),
        ({"block_size": 7}, "its attributes are"),
    ],
)
def test_what_does_not_fit_is_no_record(change: dict[str, int], reason: str) -> None:
    proto = nbits(4, 32, True)
    for attribute in proto.graph.node[0].attribute:
        attribute.i = change.get(attribute.name, attribute.i)
    answer = packed_of(proto.graph.node[0], {t.name: t for t in proto.graph.initializer})
    assert isinstance(answer, No)
    assert reason in answer.reason
