"""Recipes and budgets: round trips, and one clear line for each kind of mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer.errors import RecipeError
from gossamer.recipe import SIZE_UNITS, Budget, Distill, Prune, Quantize, Recipe, quantity

ROOT = Path(__file__).resolve().parents[1]


def test_a_dumped_recipe_parses_to_itself():
    recipe = Recipe.of([Prune(macs=0.5, ignore=("head*",)), Distill(epochs=3), Quantize(target="avx2")])
    assert Recipe.parse(recipe.dump()) == recipe


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_load(path):
    assert Recipe.load(path).steps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [quantise]", "did you mean 'quantize'"),
        ("steps: [{prune: {mac: 0.5}}]", "did you mean 'macs'"),
        ("steps: [{prune: {macs: 1.5}}]", "less than 1"),
        ("steps: [{prune: {}}]", "exactly one of ratio, macs"),
        ("steps: [{prune: {macs: 0.5, ratio: 0.5}}]", "exactly one of ratio, macs"),
        ("steps: []", "no steps"),
        ("stepz: [quantize]", "a list 'steps'"),
        ("steps: [quantize]\nbudgte: {size: 0.5}", "did you mean 'budget'"),
        ("steps: [quantize, {prune: {macs: 0.5}}]", "quantize must be the last"),
        ("steps: [quantize\n", "not YAML"),
        ("steps: [{quantize: 3}]", "NAME: VALUE"),
        ("steps: [quantize]\nbudget: {size: 5}", "fraction"),
        ("steps: [{fit: {patience: 0}}]", "patience: Input should be greater than or equal to 1"),
        ("steps: [{qat: {patiense: 2}}]", "did you mean 'patience'"),
        ("steps: [{distill: {patience: 2, monitor: val_f1}}]", "'val_loss' or 'val_accuracy'"),
        ("steps: [{prune: {macs: 0.5, patience: 2}}]", "patience needs epochs"),
        ("steps: [{sparsify: {sparsity: 0.5, patience: 2}}]", "patience needs epochs"),
        ("steps: [{sparsify: {sparsity: 0.5, epochs: 9, patience: 2, schedule: cubic}}]", "not with a schedule or regrowth"),
        ("steps: [{sparsify: {sparsity: 0.5, epochs: 9, patience: 2, regrow: random}}]", "not with a schedule or regrowth"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(text, words):
    with pytest.raises(RecipeError) as e:
        Recipe.parse(text)
    assert words in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["latency=fast", "speed=0.5", "latency", "", "size=2", "drop=150%", "latency=5MB"])
def test_mistakes_in_a_budget_are_one_line(text):
    with pytest.raises(RecipeError) as e:
        Budget.parse(text)
    assert "\n" not in str(e.value)


def test_budget_units():
    assert Budget.parse("latency=5ms,size=0.25,drop=1%") == Budget(latency="5ms", size=0.25, max_drop=0.01)
    assert quantity("1MiB", SIZE_UNITS, "size") == 2**20


def test_the_published_schema_is_the_code_s():
    assert json.loads((ROOT / "docs" / "recipe.schema.json").read_text()) == Recipe.json_schema()


def test_steps_that_are_not_steps_are_refused():
    with pytest.raises(RecipeError, match="list of steps"):
        Recipe.of(["quantize"])
