"""Recipes: one text in Python, YAML and on the command line; every mistake is named."""

from pathlib import Path

import pytest

from qcompiler.errors import RecipeError
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.rtn import Rtn
from qcompiler.plugins import registry
from qcompiler.recipe import Recipe, described
from qcompiler.scheme import Scheme

TEXT = "canonicalize, gptq{scheme=int4:g64:asym damp=0.05 act_order=False}, rtn{scheme=int8:g64:sym}, pack"


def test_text_round_trips() -> None:
    recipe = Recipe.parse(TEXT)
    assert str(recipe) == TEXT
    assert Recipe.parse(str(recipe)) == recipe
    assert recipe.passes[1] == Gptq(Scheme.parse("int4:g64:asym"), damp=0.05, act_order=False)


def test_yaml_python_and_text_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("passes:\n  - canonicalize\n  - rtn: {scheme: 'int4:g32', exclude: ['*.o_proj', '*.down_proj']}\n")
    rtn = Rtn(Scheme.parse("int4:g32"), exclude=("*.o_proj", "*.down_proj"))
    text = Recipe.parse("canonicalize, rtn{scheme=int4:g32 exclude=*.o_proj|*.down_proj}")
    assert Recipe.parse(file) == Recipe.parse(str(file)) == Recipe.parse(["canonicalize", rtn]) == text


def test_every_named_recipe_parses_and_says_what_it_is_for() -> None:
    for name in registry().recipes:
        recipe = Recipe.parse(name)
        assert recipe.name == name
        assert Recipe.parse(str(recipe)) == recipe
        assert described(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gtpq", 'no recipe or pass "gtpq"; did you mean "gptq"'),
        ("canonicalize, rnt", 'no pass "rnt"; did you mean "rtn"'),
        ("rtn{shceme=int4:g32}", 'has no option "shceme"; did you mean "scheme"'),
        ("rtn{scheme}", 'option "scheme" must be written name=value'),
        ("rtn{scheme=int4:g0}", "a group size of 0 makes no sense"),
        ("rtn{scheme=int4:g-8}", "a group size of -8 makes no sense"),
        ("rtn{scheme=int9}", "2 to 8 bits, not 9"),
        ("gptq{damp=much}", 'option "damp" must be of type float, not "much"'),
        ("gptq{act_order=perhaps}", 'option "act_order" must be of type bool'),
        ("rtn{scheme=int4:g32", "is not understood at"),
        ("missing.yaml", 'recipe file "missing.yaml" cannot be read'),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(text)


def test_yaml_that_is_no_recipe(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("- just\n- a list\n")
    with pytest.raises(RecipeError, match='must be a mapping with a list "passes"'):
        Recipe.parse(file)
