"""The decoder that `make decoder` trains: a folder that is complete or not there, left alone once it is."""

import json
import sys
from pathlib import Path

import pytest
import torch

from qcompiler.compiler import capture
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.pipeline import Context, Runner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


def test_it_is_trained_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train_decoder import main

    out, text = tmp_path / "decoder", tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(1000)))
    arguments = [
        "--text",
        str(text),
        "--out",
        str(out),
        "--epochs",
        "0.3",
        "--layers",
        "1",
        "--hidden",
        "64",
        "--loud",
        "40",
    ]
    with torch.random.fork_rng():
        main(arguments)
        assert "loudest channel" in capsys.readouterr().out
        main(arguments)
        assert "is there already" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder", "text.txt"]

    figures = json.loads((out / "figures.json").read_text())
    assert figures["float"] < figures["vocabulary"]
    assert all(ratio > 20 for ratio in figures["loudest channel / median channel"].values())
    held_out, trained_on = ((out / f"{name}.txt").read_text() for name in ("held_out", "train"))
    assert trained_on + held_out == text.read_text()
    assert len(held_out) * 8 < len(trained_on) < len(held_out) * 10

    program = capture(str(out))
    Runner(Context(), []).run(program, [Canonicalize()])
    assert len(list(program.calls(torch.ops.aten.layer_norm.default))) == 2 * 1 + 1
