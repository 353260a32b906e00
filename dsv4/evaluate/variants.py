"""Recipes as command lines spell them: a name, and changes to it. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dsv4.config import ConfigError, Recipe, apply_overrides, find_recipe

BASELINE = "bf16"


def parse_recipe(text: str) -> Recipe:
    """`released`, or with changes `released+cache.index=fp4+rotate=true`; the recipe is called what `text` says.

    Raises ConfigError naming an unknown recipe (and all there are), field or value, or changes that contradict each
    other: a recipe must be what it is called.
    """
    name, *changes = (part.strip() for part in text.split("+"))
    recipe = find_recipe(name)
    if any(change.partition("=")[0].strip() == "name" for change in changes):
        raise ConfigError(f"recipe {text!r}: a name is not changed, it is the text itself")
    try:
        changed = apply_overrides(recipe, changes)
        lost = [change for change in changes if apply_overrides(changed, [change]) != changed]
    except ConfigError as error:
        raise ConfigError(f"recipe {text!r}: {error}") from None
    if lost:
        raise ConfigError(
            f"recipe {text!r}: {', '.join(lost)} would not hold beside the other changes: keep one of them"
        )
    return dataclasses.replace(changed, name="+".join((name, *changes)))


def with_baseline(recipes: Sequence[Recipe]) -> list[Recipe]:
    """`recipes` without repetitions, after the one that all are compared with."""
    named = {BASELINE: find_recipe(BASELINE)} | {recipe.name: recipe for recipe in recipes}
    return list(named.values())
