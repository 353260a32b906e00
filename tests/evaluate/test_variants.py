"""Recipes as text."""

import dataclasses

import pytest

from dsv4.config import RECIPES, ConfigError, find_recipe
from dsv4.evaluate.variants import parse_recipe, with_baseline


def test_a_name_and_changes():
    assert parse_recipe("fp8") == find_recipe("fp8")
    found = parse_recipe(" released+cache.index=fp4 + rotate=true+outlier_channels=8+activations=none ")
    base = find_recipe("released")
    assert found == dataclasses.replace(
        base,
        name="released+cache.index=fp4+rotate=true+outlier_channels=8+activations=none",
        cache=dataclasses.replace(base.cache, index="fp4"),
        rotate=True,
        outlier_channels=8,
        activations=None,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope", f"no recipe 'nope': {', '.join(RECIPES)}"),
        ("", "no recipe ''"),
        ("fp8+cash=fp8", "recipe 'fp8.cash=fp8': Recipe has no field 'cash'; did you mean 'cache'"),
        ("fp8+cache", "write it as field.name=value"),
        ("fp8+cache.index=int4", "cache.index is 'int4'"),
        ("bf16+rotate=true", "need quantised dense or expert weights"),
        ("bf16+cache=fp8+cache.index=bfloat16", "cache=fp8 would not hold"),
        ("fp8+rotate=true+rotate=false", "rotate=true would not hold"),
        ("fp8+name=x", "a name is not changed"),
    ],
)
def test_what_is_no_recipe(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_recipe(text)


def test_the_baseline_comes_first_and_nothing_twice():
    recipes = [find_recipe(name) for name in ("fp8", "bf16", "int8", "fp8")]
    assert [recipe.name for recipe in with_baseline(recipes)] == ["bf16", "fp8", "int8"]
