"""Which block size of MatMulNBits decodes fastest, by width of the codes and length of the rows.

    python benchmarks/blocks.py [--rounds 15]

Each candidate is a graph of several products of one token with matrices that exceed the caches, all alternating in one
run, two threads. Writes the medians, in nanoseconds a thousand weights, to results/blocks.json, and to the package
(backends/onnxruntime/blocks.json) what the backend chooses by where a group covers several blocks.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from common import write

BITS, COLUMNS, BLOCKS = (2, 4, 8), (576, 1536, 4096), (16, 32, 64, 128, 256)
BYTES = 24e6  # of codes in a graph: more than the caches of a core hold
PACKAGED = Path(__file__).parent.parent / "backends" / "onnxruntime" / "blocks.json"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for bits in BITS:
        for columns in COLUMNS:
            costs = measured(bits, columns, options.rounds)
            print(bits, columns, costs)
            found.setdefault(str(bits), {})[str(columns)] = costs
    write("blocks", {"threads": 2, "rounds": options.rounds, "ns_per_thousand_weights": found})
    PACKAGED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measured(bits: int, columns: int, rounds: int) -> dict[str, float]:
    """Nanoseconds a thousand weights, by block size."""
    rows = 1 << 21  # weights of a matrix
    count = round(BYTES * 8 / bits / rows)
    sessions = {block: products(bits, columns, block, rows // columns, count) for block in BLOCKS}
    x = {"x": np.random.default_rng(0).standard_normal((1, columns), dtype=np.float32)}
    samples: dict[int, list[float]] = {block: [] for block in BLOCKS}
    for i in range(rounds + 1):
        for block in BLOCKS[:: 1 if i % 2 else -1]:
            sessions[block].run(None, x)
            start = time.perf_counter()
            sessions[block].run(None, x)
            samples[block].append(time.perf_counter() - start)
    weights = rows // columns * columns * count
    return {str(block): round(statistics.median(samples[block][1:]) / weights * 1e12, 1) for block in BLOCKS}


def products(bits: int, columns: int, block: int, rows: int, count: int) -> ort.InferenceSession:
    """`count` products of x [1, columns] with matrices of so many rows."""
    random, blobs = np.random.default_rng(0), -(-columns // block)
    nodes, tensors = [], []
    for i in range(count):
        codes = random.integers(0, 256, (rows, blobs, block * bits // 8), dtype=np.uint8)
        scales = random.random(rows * blobs, dtype=np.float32)
        tensors += [onnx.numpy_helper.from_array(codes, f"b{i}"), onnx.numpy_helper.from_array(scales, f"s{i}")]
        sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 4}
        nodes.append(
            onnx.helper.make_node("MatMulNBits", ["x", f"b{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", **sizes)
        )
    ends = [onnx.helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, None) for i in range(count)]
    start = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, columns])
    graph = onnx.helper.make_graph(nodes, "products", [start], ends, tensors)
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or they would spin beside one another
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options)


if __name__ == "__main__":
    main()
