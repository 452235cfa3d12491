"""Which block size a coarse group is cut into: what was measured decides."""

import pytest
import torch

from qcompiler.backends.onnxruntime.weights import BLOCKS, WIDTHS, block_costs, block_size, measured
from qcompiler.scheme import QTensor, Scheme


def weight(scheme: str, columns: int) -> QTensor:
    return QTensor.quantize(torch.randn(8, columns, generator=torch.Generator().manual_seed(0)), Scheme.parse(scheme))


def test_every_width_and_block_is_measured() -> None:
    assert {int(bits) for bits in measured()} == set(WIDTHS)
    for costs in (costs for by_columns in measured().values() for costs in by_columns.values()):
        assert {int(block) for block in costs} == set(BLOCKS)
        assert all(cost > 0 for cost in costs.values())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [576, 1536, 5000])
def test_rows_with_one_scale_take_the_block_with_the_least_cost(bits: int, columns: int) -> None:
    chosen = block_size(weight(f"int{bits}:channel", columns))
    costs = block_costs(bits, columns)
    assert costs == {int(k): v for k, v in measured()[str(bits)][str(min(columns, 4096))].items()}
    assert costs[chosen] == min(costs.values())


def test_blocks_that_have_no_fast_kernel_are_avoided() -> None:
    """Two bits in blocks of 256 take fifty times as long as in blocks of 128."""
    assert block_size(weight("int2:channel", 4096)) == 128
    assert block_size(weight("int2:g256", 4096)) == 128


def test_groups_that_are_blocks_stay_as_they_are() -> None:
    assert block_size(weight("int4:g16", 64)) == 16
    assert block_size(weight("int4:g128", 576)) == 128
    assert block_size(weight("int4:g48", 96)) == 16
    assert block_size(weight("int4:g24", 96)) == 0
