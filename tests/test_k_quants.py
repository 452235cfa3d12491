"""k-quants: the records of Q4_K and Q6_K blocks decode to the bits of gguf-py."""

import numpy as np
import pytest
import torch

from qcompiler.formats import gguf_types, k_quants

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")


def blocks_of(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random blocks, uint8 [rows, bytes], whose steps are those of ordinary weights: gguf-py has no quantizer."""
    chance = np.random.default_rng(seed)
    count = columns // k_quants.SUPERBLOCK
    blocks = chance.integers(0, 256, (rows, count, k_quants.BYTES[kind]), dtype=np.uint8)
    steps = chance.uniform(1e-4, 2e-3, (rows, count, 2)).astype(np.float16).view(np.uint8)
    if kind == "Q4_K":
        blocks[..., :4] = steps
    else:
        blocks[..., 208:] = steps[..., :2]
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_they_decode_to_the_bits_of_gguf_py(kind: str) -> None:
    blocks = blocks_of(kind, 5, 768)
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    record = gguf_types.decode(kind, torch.from_numpy(blocks), (5, 768))
    assert np.array_equal(record.dequantize().numpy().view(np.int32), expected.view(np.int32))
    assert record.nbytes < 5 * 768 * 7 / 8
