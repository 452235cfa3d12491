"""Every named recipe, from end to end on a small language model: it runs, and some backend takes the result."""

import pytest
import torch
from torch import Tensor

from qcompiler import data
from qcompiler.compiler import DEFAULT_BACKENDS
from qcompiler.pipeline import Context, Runner
from qcompiler.plugins import registry
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.target import place
from tests.programs import located, tiny_llama


@pytest.fixture(scope="module")
def model() -> Program:
    return located(tiny_llama(tied=False))


def samples() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(0, 80, (2, 24), generator=random)} for _ in range(2)]


@pytest.mark.parametrize("name", [name for name in registry().recipes if name != "stored"])
def test_a_named_recipe_runs_from_end_to_end(name: str, model: Program) -> None:
    program = model.copy()
    runner = Runner(Context(samples=samples()), data.check_samples(program))
    runner.run(program, Recipe.parse(name).passes)
    backends = [registry().backends[backend]() for backend in DEFAULT_BACKENDS]
    placed = place(program, backends)
    assert placed.backend.name == "onnxruntime", placed.refusals
    ids = samples()[0]["input_ids"]
    expected = model(input_ids=ids)["logits"]
    found = placed.backend.lower(program)({"input_ids": ids})["logits"]
    error = float((found - expected).norm() / expected.norm())
    assert error < (1.0 if any(bits in name for bits in ("w2", "w3", "a3")) else 0.5), error
