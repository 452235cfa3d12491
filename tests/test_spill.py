"""Values between segments: the same from disk as from memory, and no more in memory than the limit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from qcompiler import calibration
from qcompiler.calibration import sweep
from qcompiler.passes.statistics import Hessian
from qcompiler.spill import Spill
from tests.programs import located, tiny_llama


def test_what_is_over_the_limit_lies_on_disk() -> None:
    x, y = fx.Graph().placeholder("x"), fx.Graph().placeholder("y")
    spill = Spill(limit=40)
    rows = [torch.full((4,), float(i)) for i in range(5)]  # 16 bytes each
    for row in rows:
        spill.append({x: row, y: 7})
    assert spill.bytes == 32
    folder = Path(spill._folder.name)  # type: ignore[union-attr]
    assert len(list(folder.iterdir())) == 3
    assert all(torch.equal(values[x], row) and values[y] == 7 for values, row in zip(spill, rows, strict=True))
    spill[0] = {x: torch.arange(2.0)}
    assert spill.bytes == 24
    assert torch.equal(spill[0][x], torch.arange(2.0))
    with pytest.raises(IndexError):
        spill[5]
    del spill
    assert not folder.exists()


def test_views_of_one_tensor() -> None:
    graph, whole = fx.Graph(), torch.arange(6.0).view(2, 3)
    x, y, z = (graph.placeholder(name) for name in "xyz")
    spill = Spill(limit=0)
    spill.append({x: whole, y: whole.T, z: whole[:1].expand(4, 3)})
    found = spill[0]
    assert torch.equal(found[y], whole.T)
    assert torch.equal(found[z], whole[:1].expand(4, 3))


@pytest.mark.parametrize("limit", [0, 6000])
def test_a_sweep_measures_the_same_and_holds_no_more(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program = located(tiny_llama())
    random = torch.Generator().manual_seed(0)
    samples: list[dict[str, Tensor]] = [
        {"input_ids": torch.randint(0, 80, (2, 9), generator=random)} for _ in range(12)
    ]
    kept: list[Spill] = []

    def small() -> Spill:
        kept.append(Spill(limit))
        return kept[-1]

    found: list[dict[str, Tensor]] = []
    for make in (Spill, small):
        monkeypatch.setattr(calibration, "Spill", make)
        seen: dict[str, Tensor] = {}
        for segment in sweep(program, samples, lambda nodes: {node.name: Hessian() for node in program.linears()}):
            seen |= segment.statistics
            assert all(spill.bytes <= limit for spill in kept)
        found.append(seen)
    assert kept[0]._folder is not None
    assert found[0].keys() == found[1].keys() == {node.name for node in program.linears()}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
