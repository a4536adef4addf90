"""Low rank through the main job: factorised, trained, quantised, exported, reloaded, resumed."""

from __future__ import annotations

import pytest
import torch
from test_flow import batches, network  # noqa: F401

import gossamer as gs
from gossamer.errors import RecipeError
from gossamer.recipe import Recipe

RECIPE = [gs.Factorize(method=("svd", "tucker2"), rank=0.25), gs.Distill(epochs=1, lr=1e-3), gs.Quantize()]


def test_factorised_trained_and_quantised_in_one_job(batches, tmp_path):  # noqa: F811
    seen = []
    out = tmp_path / "run"
    result = gs.compress(network(), batches, recipe=RECIPE, out=out, seed=3, progress=lambda stage, done, total: seen.append(stage))
    assert result.plan.counts()["factorize"] >= 1
    assert "factorize" in seen
    report = result.report
    assert report["after"]["macs"] < report["before"]["macs"]
    assert report["steps"][0]["step"] == "factorize"
    assert any("factorised" in note for note in report["steps"][0]["notes"])
    back = gs.load(out, network())
    x = batches[0][0]
    with torch.no_grad():
        assert torch.equal(back(x), result.model(x))
    resumed = gs.compress(network(), batches, recipe=RECIPE, out=out, seed=3, resume=True)
    assert resumed.plan == result.plan


def test_decoupled_and_trained_in_one_job(batches, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    recipe = [gs.Decouple(form="grouped", groups=2), gs.Distill(epochs=1, lr=1e-3)]
    result = gs.compress(network(), batches, recipe=recipe, out=out, seed=3)
    assert result.plan.counts()["decouple"] >= 1
    assert result.report["after"]["macs"] < result.report["before"]["macs"]
    assert any("decoupled: grouped" in note for note in result.report["steps"][0]["notes"])
    with torch.no_grad():
        assert torch.equal(gs.load(out, network())(batches[0][0]), result.model(batches[0][0]))


def test_the_step_in_yaml_and_its_mistakes():
    recipe = Recipe.parse(
        "steps: [{prune: {ratio: 0.2}}, {factorize: {macs: 0.5, method: [svd, cp]}}, {sparsify: {sparsity: 0.5}}, quantize]"
    )
    assert recipe.steps[1].method == ("svd", "cp")
    assert Recipe.parse(recipe.dump()) == recipe
    assert Recipe.parse("steps: [{factorize: {rank: [8, 0.5], method: tucker2}}]").steps[0].rank == (8, 0.5)
    for text, words in [
        ("steps: [factorize]", "exactly one of rank, energy"),
        ("steps: [{factorize: {rank: 4, macs: 0.5}}]", "exactly one of rank, energy"),
        ("steps: [{factorize: {rank: 4, method: svdd}}]", "factorize"),
        ("steps: [{factorize: {rank: 4}}, {prune: {ratio: 0.5}}]", "prune comes before factorize"),
        ("steps: [{sparsify: {sparsity: 0.5}}, {factorize: {rank: 4}}]", "factorize comes before sparsify"),
        ("steps: [cluster, {factorize: {rank: 4}}]", "factorize comes before cluster"),
    ]:
        with pytest.raises(RecipeError, match=words) as e:
            Recipe.parse(text)
        assert "\n" not in str(e.value)
