"""A sample of `make fuzz`: broken checkpoints of every format cost one sentence, no crash and little memory."""

import tempfile
from pathlib import Path

from tests import fuzz_formats


def test_broken_files_cost_one_sentence() -> None:
    outcomes, wrong = fuzz_formats.run(600, seed=7)
    assert not wrong
    assert outcomes["refused"] > 200
    assert outcomes["read"] > 50


def test_the_seeds_are_sound() -> None:
    """Without mutations every file is read: refusals are about the mutations."""
    with tempfile.TemporaryDirectory() as base:
        for name, (files, read) in fuzz_formats.seeds(Path(base, "seeds")).items():
            if name == "gguf":  # cut off on purpose: its header alone is under test
                continue
            folder = Path(base, "whole", name)
            folder.mkdir(parents=True)
            for file, data in files.items():
                (folder / file).write_bytes(data)
            read(folder)
