"""Sparse and shared weights through the main job: what the report says of them, the file, reloading, resuming."""

from __future__ import annotations

import json

import pytest
import torch
from test_flow import batches, network  # noqa: F401

import gossamer as gs
from gossamer.errors import RecipeError
from gossamer.flow import plan_only
from gossamer.recipe import Recipe
from gossamer.sources.layer_weights import layer_weights

RECIPE = [
    gs.Sparsify(sparsity=0.8, scope="global", schedule="cubic", epochs=3, lr=5e-3),
    gs.Distill(epochs=1, lr=1e-3),
    gs.Cluster(bits=3),
    gs.Distill(epochs=1, lr=1e-3),
]


@pytest.fixture(scope="module")
def run(batches, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("sparse") / "run"
    return gs.compress(network(), batches, recipe=RECIPE, out=out, seed=3), out


def test_zeros_and_shared_values_outlive_the_training_that_follows(run):
    result, _ = run
    weights = layer_weights(result.model)
    total = sum(p.numel() for p in weights.values())
    assert sum(int((p == 0).sum()) for p in weights.values()) == round(0.8 * total)
    assert all(len(p.unique()) <= 8 for p in weights.values())
    assert result.plan.counts()["mask"] == 4
    assert result.plan.counts()["share"] == 8  # chosen, then trained


def test_the_report_gives_the_file_s_size_its_bound_and_an_honest_sentence(run):
    result, out = run
    report = json.loads((out / "report.json").read_text())
    assert report["storage"]["size_bytes"] == (out / "model.safetensors").stat().st_size
    assert report["storage"]["entropy_bytes"] < report["storage"]["size_bytes"] < report["storage"]["dense_bytes"] / 8
    assert any("neither ONNX Runtime faster" in w for w in report["warnings"])
    assert report == result.report
    assert "entropy bound" in (out / "report.html").read_text()
    assert "entropy bound" in (out / "README.md").read_text()


def test_it_loads_bit_for_bit_and_runs_the_same(run, batches):  # noqa: F811
    result, out = run
    back = gs.load(out, network(seed=5))
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), result.model.state_dict().values(), strict=True))
    with torch.no_grad():
        assert torch.equal(back(batches[0][0]), result.model(batches[0][0]))


def test_an_interrupted_run_ends_in_the_same_bytes(run, batches, tmp_path):  # noqa: F811
    def stop(stage, done, total):
        if stage == "sparsify" and done == 5:
            raise KeyboardInterrupt

    out = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt):
        gs.compress(network(), batches, recipe=RECIPE, out=out, seed=3, progress=stop)
    gs.compress(network(), batches, recipe=RECIPE, out=out, seed=3, resume=True)
    for name in ("model.safetensors", "plan.json", "model.onnx"):
        assert (out / name).read_bytes() == (run[1] / name).read_bytes(), name


def test_prune_sparsify_cluster_and_quantise_in_one_plan(batches, tmp_path):  # noqa: F811
    recipe = [gs.Prune(macs=0.6), gs.Sparsify(sparsity=0.5, criterion="second_order"), gs.Cluster(bits=4), gs.Quantize()]
    result = gs.compress(network(), batches, recipe=recipe, out=tmp_path / "r")
    assert {"keep", "mask", "share", "quantize_weight"} <= set(result.plan.counts())
    back = gs.load(tmp_path / "r", network())
    with torch.no_grad():
        assert torch.equal(back(batches[0][0]), result.model(batches[0][0]))


def test_a_dry_run_needs_no_training(batches):  # noqa: F811
    plan = plan_only(network(), batches, recipe=RECIPE)
    assert plan.counts() == {"mask": 4, "share": 4}


def test_steps_in_an_order_that_undoes_them_are_refused():
    for text in ("[sparsify: {sparsity: 0.5}, prune: {macs: 0.5}]", "[cluster, sparsify: {sparsity: 0.5}]"):
        steps = text.replace(", ", "}, {").replace("[", "[{").replace("]", "}]").replace("{cluster}", "cluster")
        with pytest.raises(RecipeError, match=r"comes before \w+, which it would undo"):
            Recipe.parse(f"steps: {steps}")
    with pytest.raises(RecipeError, match="exactly one of sparsity"):
        Recipe.parse("steps: [{sparsify: {}}]")
    with pytest.raises(RecipeError, match="need epochs"):
        Recipe.parse("steps: [{sparsify: {sparsity: 0.5, schedule: cubic}}]")
