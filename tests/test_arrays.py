"""Calibration arrays: what fits a model's inputs, and what is said where they do not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompiler import arrays, data
from qcompiler.data import Calibration
from qcompiler.errors import InputError
from qcompiler.program import Input, Program, Type


def program(**inputs: Type) -> Program:
    graph = torch.fx.Graph()
    for name, kind in inputs.items():
        graph.placeholder(name).meta["type"] = kind
    graph.output(())
    return Program(graph, {}, tuple(Input(name, kind) for name, kind in inputs.items()), ())


IMAGE = Type(("batch", 3, "height", "width"), torch.float32)
IDS = Type(("batch", "sequence"), torch.int64)
STATE = Type((2, 1, 4), torch.float32)


@given(st.integers(1, 40), st.integers(1, 40))
def test_rows_run_together_where_the_first_axis_is_free(count: int, most: int) -> None:
    given = {"ids": torch.arange(count * 3).view(count, 3)}
    found = arrays.samples(given, program(ids=IDS), most)
    assert torch.equal(torch.cat([sample["ids"] for sample in found]), given["ids"][:most])
    assert all(len(sample["ids"]) <= arrays.ROWS for sample in found)


def test_an_axis_more_is_one_input_each() -> None:
    given = {"x": torch.randn(5, 1, 8), "state": torch.randn(5, 2, 1, 4)}
    found = arrays.samples(given, program(x=Type((1, 8), torch.float32), state=STATE), 4)
    assert len(found) == 4
    assert torch.equal(found[3]["x"], given["x"][3])
    assert found[0]["state"].shape == (2, 1, 4)


def test_integers_take_the_inputs_dtype() -> None:
    (sample,) = arrays.samples({"ids": torch.ones(2, 3, dtype=torch.int32)}, program(ids=IDS), 4)
    assert sample["ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"arrays are \[\]; the model takes \['x'\]"),
        ({"y": torch.zeros(2, 3, 8, 8)}, r"\['y'\]; the model takes \['x'\]"),
        ({"x": torch.zeros(2, 1, 8, 8)}, r'"x" is \[2, 1, 8, 8\]; the model takes .*save it as \[samples, batch, 3'),
        ({"x": torch.zeros(2, 3)}, r'"x" is \[2, 3\]'),
        ({"x": torch.zeros(2, 3, 8, 8, dtype=torch.int64)}, r'"x" is torch.int64; the model takes float32'),
        ({"x": torch.zeros(())}, "at least one"),
    ],
)
def test_arrays_that_do_not_fit(given: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        arrays.samples(given, program(x=IMAGE), 4)


def test_as_many_samples_for_each_input() -> None:
    with pytest.raises(InputError, match=r"\{'x': 2, 'ids': 3\} samples; each must hold as many"):
        arrays.samples({"x": torch.zeros(2, 3, 8, 8), "ids": torch.zeros(3, 5).long()}, program(x=IMAGE, ids=IDS), 4)


def test_a_fixed_first_axis_is_no_axis_of_samples() -> None:
    with pytest.raises(InputError, match=r"save it as \[samples, 2, 1, 4\]"):
        arrays.samples({"state": torch.zeros(6, 1, 4)}, program(state=STATE), 4)


def test_files(tmp_path: Path) -> None:
    good, objects, text, empty = (tmp_path / f"{n}.npz" for n in ("good", "objects", "text", "empty"))
    np.savez(good, ids=np.ones((2, 3), np.int64))
    np.savez(objects, ids=np.array([{}], dtype=object))
    np.savez(empty)
    text.write_text("no arrays")
    found = data.load(Calibration(good), program(ids=IDS))
    assert torch.equal(found[0]["ids"], torch.ones(2, 3, dtype=torch.int64))
    assert data.examples(str(good)) == {"ids": pytest.approx(torch.ones(2, 3))}
    for path, message in ((objects, "no .npz file of numbers"), (text, "no .npz file"), (empty, "holds no arrays")):
        with pytest.raises(InputError, match=message):
            data.check_source(path)
    with pytest.raises(InputError, match="does not exist"):
        data.check_source(tmp_path / "none.npz")
