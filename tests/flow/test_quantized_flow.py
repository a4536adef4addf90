"""Quantisation-aware training and quantisation without calibration through the main job: resumed, reported, loaded, refused."""

from __future__ import annotations

import json

import pytest
import torch
from test_flow import batches, network  # noqa: F401

import gossamer as gs
from gossamer.errors import RecipeError, SourceError
from gossamer.flow import plan_only
from gossamer.profiling import profile
from gossamer.recipe import Recipe

RECIPE = [gs.Prune(macs=0.6), gs.Qat(weight_bits=4, epochs=3, lr=5e-3)]


@pytest.fixture(scope="module")
def run(batches, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("qat") / "run"
    return gs.compress(network(), batches, recipe=RECIPE, out=out, seed=3), out


def test_the_report_and_the_log_tell_of_the_training(run):
    result, out = run
    report = json.loads((out / "report.json").read_text())
    assert [s["step"] for s in report["steps"]] == ["prune", "qat"]
    assert report["steps"][1]["options"]["weight_bits"] == 4
    assert report["after"]["macs"] <= 0.61 * report["before"]["macs"]
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == ["2-qat"] * 3
    assert result.plan.counts()["quantize_weight"] == 4


def test_it_loads_bit_for_bit(run, batches):  # noqa: F811
    result, out = run
    x = batches[0][0]
    assert torch.equal(gs.load(out, network(5))(x), result.model(x))


@pytest.mark.slow
def test_killed_while_training_it_resumes_to_the_same_artefact(run, batches, tmp_path):  # noqa: F811
    class Stop(BaseException):
        pass

    def kill(name: str, done: int, total: int) -> None:
        if name == "qat" and done == 7:
            raise Stop

    out = tmp_path / "run"
    with pytest.raises(Stop):
        gs.compress(network(), batches, recipe=RECIPE, out=out, seed=3, progress=kill)
    assert (out / "checkpoints" / "candidate-1" / "2-qat" / "training").is_dir()
    gs.compress(network(), batches, recipe=RECIPE, out=out, seed=3, resume=True)
    for name in ("plan.json", "model.safetensors", "model.onnx"):
        assert (out / name).read_bytes() == (run[1] / name).read_bytes(), name


def test_a_dry_run_shows_what_training_starts_from(run, batches):  # noqa: F811
    plan = plan_only(network(), batches, recipe=RECIPE, seed=3)
    assert plan.counts() == run[0].plan.counts()


@pytest.mark.parametrize(
    "step", [gs.Quantize(dynamic=True), pytest.param(gs.Quantize(weight_only=True, weight_bits=4, group_size=64), marks=pytest.mark.slow)]
)
def test_quantisation_without_calibration_is_a_step(step, batches, tmp_path):  # noqa: F811
    result = gs.compress(network(), batches, recipe=[step], out=tmp_path / "run")
    assert result.report["after"]["size_bytes"] < result.report["before"]["size_bytes"]
    assert result.report["after"]["macs"] == result.report["before"]["macs"]
    assert any("stay float" in n for s in result.report["steps"] for n in s["notes"])
    again = gs.compress(network(), batches, recipe=[step], out=tmp_path / "run", resume=True)
    assert again.after.macs == profile(network(), (batches[0][0][:1],)).macs


def test_recipes_that_cannot_be_carried_out_are_refused(batches):  # noqa: F811
    with pytest.raises(RecipeError, match="qat quantises first, by itself"):
        Recipe.of([gs.Quantize(), gs.Qat()])
    with pytest.raises(RecipeError, match="qat must be the last"):
        Recipe.parse("steps: [qat, distill]")
    with pytest.raises(RecipeError, match="dynamic or weight_only"):
        Recipe.parse("steps: [{quantize: {dynamic: true, weight_only: true}}]")
    with pytest.raises(RecipeError, match="4 or 8"):
        Recipe.parse("steps: [{quantize: {weight_only: true, weight_bits: 3}}]")
    assert Recipe.parse(Recipe.of([gs.Qat(activation_bits=4)]).dump()).steps[0] == gs.Qat(activation_bits=4)
    with pytest.raises(SourceError, match="labels"):
        gs.compress(network(), [x for x, _ in batches], recipe=[gs.Qat()])
