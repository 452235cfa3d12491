"""The README and the guides are run, not believed."""

import re
from pathlib import Path

import pytest
import torch

from qcompiler.pipeline import Context, Pass, Runner
from qcompiler.recipe import Recipe
from tests.programs import located, tiny_folder, tiny_llama

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str = "python") -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("README.md")
    code = code.replace('"path/to/model"', repr(str(model)))
    code = code.replace('calibration="self"', 'calibration="self", samples=2, length=16')
    with torch.random.fork_rng():
        exec(compile(code, "README.md", "exec"), {})
    assert "linear layers" in capsys.readouterr().out
    assert (tmp_path / "compiled" / "manifest.json").is_file()


def test_the_two_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "dev", "lint", "types", "bench", "architectures", "clean"):
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE)


def test_the_pass_of_the_guide_works() -> None:
    scope: dict[str, object] = {"__name__": "guide"}
    exec(compile(blocks("docs/writing-a-pass.md")[0], "writing-a-pass.md", "exec"), scope)
    step = scope["Round"]
    assert isinstance(step, type)
    assert issubclass(step, Pass)
    program = located(tiny_llama())
    Runner(Context(), [{"input_ids": torch.arange(6)[None]}]).run(program, [step()])
    assert len(program.quantized) == 15


def test_the_guide_to_fine_tuning_runs() -> None:
    pytest.importorskip("peft", reason="the extra [dev] is not installed")
    (code,) = blocks("docs/finetuning.md")
    with torch.random.fork_rng():
        exec(compile(code, "finetuning.md", "exec"), {})


def test_the_recipes_of_the_guide_parse() -> None:
    for code in blocks("docs/recipes.md"):
        exec(compile(code, "recipes.md", "exec"), {})
    text = blocks("docs/recipes.md", "")[0]
    recipe = Recipe.parse(text.strip())
    assert Recipe.parse(str(recipe)) == recipe
