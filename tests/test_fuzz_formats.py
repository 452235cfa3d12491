"""A sample of `make fuzz`: broken files of every kind cost one sentence, no crash and little memory."""

from pathlib import Path

from tests import fuzz_formats
from tests.fuzz_seeds import seeds


def test_broken_files_cost_one_sentence() -> None:
    outcomes, wrong = fuzz_formats.run(600, seed=7)
    assert not wrong
    assert outcomes["refused"] > 200
    assert outcomes["read"] > 50


def test_the_seeds_are_sound(tmp_path: Path) -> None:
    """Without mutations every file is read: refusals are about the mutations."""
    for name, seed in seeds(tmp_path / "seeds").items():
        folder = tmp_path / "whole" / name
        folder.mkdir(parents=True)
        for file, data in seed.files.items():
            (folder / file).write_bytes(data)
        seed.read(folder)
