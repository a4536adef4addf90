"""The main job end to end on a small network: what is written, that it loads, resumes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.errors import BudgetError, RecipeError, RunFolderError, SourceError, WeightsError
from gossamer.flow import plan_only

FILES = {
    "recipe.yaml",
    "environment.json",
    "plan.json",
    "model.safetensors",
    "model.onnx",
    "report.json",
    "report.html",
    "README.md",
    "log.jsonl",
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)

    def block(i: int, o: int, s: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    return nn.Sequential(block(1, 16), block(16, 32, 2), block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).eval()


@pytest.fixture(scope="module")
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(96) % 4
    x = torch.randn(96, 1, 12, 12, generator=generator) * 0.3
    for i, label in enumerate(y):
        x[i, 0, 3 * int(label) : 3 * int(label) + 3] += 1.5
    return [(x[i : i + 32], y[i : i + 32]) for i in range(0, 96, 32)]


RECIPE = [gs.Prune(macs=0.6), gs.Distill(epochs=2, lr=1e-3), gs.Quantize()]


@pytest.fixture(scope="module")
def run(batches, tmp_path_factory):
    out = tmp_path_factory.mktemp("flow") / "run"
    return gs.compress(network(), batches, recipe=RECIPE, out=out, seed=3), out


def test_the_run_folder_holds_the_contract_s_files_and_true_sizes(run):
    result, out = run
    assert {p.name for p in out.iterdir()} == FILES | {"checkpoints"}
    report = json.loads((out / "report.json").read_text())
    assert report == result.report
    assert report["after"]["size_bytes"] == (out / "model.onnx").stat().st_size
    assert report["after"]["macs"] <= 0.61 * report["before"]["macs"]
    assert report["before"]["latency_ms"]["runtime"] == "onnxruntime"
    assert report["after"]["peak_activation_bytes"] < report["before"]["peak_activation_bytes"]
    assert [s["step"] for s in report["steps"]] == ["prune", "distill", "quantize"]
    assert "holds" in report["steps"][0]["proof"]
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == ["2-distill"] * 2


def test_reported_accuracy_is_the_artefact_s(run, batches):
    result, out = run
    session = ort.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    right = sum(int((session.run(None, {name: x.numpy()})[0].argmax(1) == y.numpy()).sum()) for x, y in batches)
    assert result.report["after"]["accuracy"]["value"] == pytest.approx(right / 96)


def test_the_source_network_is_untouched(batches):
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    gs.compress(net, batches, recipe=[gs.Prune(macs=0.6)])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_fresh_process_loads_the_same_outputs_bit_for_bit(run, batches, tmp_path):
    result, out = run
    x = batches[0][0]
    torch.save({"x": x, "want": result.model(x)}, tmp_path / "io.pt")
    code = (
        f"import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import gossamer as gs\nfrom test_flow import network\n"
        f"io = torch.load({str(tmp_path / 'io.pt')!r})\n"
        f"assert torch.equal(gs.load({str(out)!r}, network(5))(io['x']), io['want'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_same_seed_gives_the_same_artefact(run, batches, tmp_path):
    gs.compress(network(), batches, recipe=RECIPE, out=tmp_path / "again", seed=3)
    for name in ("plan.json", "model.safetensors", "model.onnx"):
        assert (tmp_path / "again" / name).read_bytes() == (run[1] / name).read_bytes(), name


class Stop(BaseException):
    """Stands for a kill: nothing in the flow may catch it."""


@pytest.mark.parametrize("stage", ["prune", "distill", "quantize", "evaluate"])
def test_a_run_killed_in_any_stage_resumes_to_the_same_artefact(stage, run, batches, tmp_path):
    def kill(name: str, done: int, total: int) -> None:
        if name == stage:
            raise Stop

    out = tmp_path / "run"
    with pytest.raises(Stop):
        gs.compress(network(), batches, recipe=RECIPE, out=out, seed=3, progress=kill)
    assert not (out / "report.json").exists()
    gs.compress(network(), batches, recipe=RECIPE, out=out, seed=3, resume=True)
    for name in ("plan.json", "model.safetensors", "model.onnx"):
        assert (out / name).read_bytes() == (run[1] / name).read_bytes(), name


def test_resuming_a_finished_run_returns_it_and_resuming_another_is_refused(run, batches):
    result, out = run
    again = gs.compress(network(), batches, recipe=RECIPE, out=out, seed=3, resume=True)
    assert again.report == result.report
    x = batches[0][0]
    assert torch.equal(again.model(x), result.model(x))
    with pytest.raises(RunFolderError, match="another seed"):
        gs.compress(network(), batches, recipe=RECIPE, out=out, seed=4, resume=True)
    with pytest.raises(RunFolderError, match="another weights"):
        gs.compress(network(1), batches, recipe=RECIPE, out=out, seed=3, resume=True)


def test_an_occupied_folder_is_never_overwritten(run, batches):
    with pytest.raises(RunFolderError, match="already holds files"):
        gs.compress(network(), batches, recipe=RECIPE, out=run[1])


def test_bad_input_leaves_no_folder(batches, tmp_path):
    out = tmp_path / "out"
    broken = network()
    with torch.no_grad():
        broken[0][0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"0\.0\.weight"):
        gs.compress(broken, batches, out=out)
    with pytest.raises(gs.errors.GossamerError):
        gs.compress(network(), [(torch.randn(4, 3, 12, 12), torch.zeros(4, dtype=torch.long))], out=out)
    with pytest.raises(gs.errors.GossamerError):
        gs.compress(network(), batches, recipe=[gs.Prune(macs=0.6, ignore=("nothing*",))], out=out)
    with pytest.raises(SourceError, match="empty"):
        gs.compress(network(), [], out=out)
    with pytest.raises(SourceError, match="iterator"):
        gs.compress(network(), iter(batches), out=out)
    with pytest.raises(RecipeError):
        gs.compress(network(), batches, budget="latency=quick", out=out)
    assert not out.exists()


def test_a_budget_that_can_be_met_is(batches, tmp_path):
    result = gs.compress(network(), batches, budget=gs.Budget(size=0.9), out=tmp_path / "run")
    assert result.report["budget"][0]["met"]
    assert result.report["after"]["size_bytes"] <= 0.9 * result.report["before"]["size_bytes"]


def test_a_budget_that_cannot_be_met_says_the_best_that_can_and_keeps_it(batches, tmp_path):
    with pytest.raises(BudgetError, match=r"best that can: size \d") as e:
        gs.compress(network(), batches, recipe=[gs.Quantize()], budget="size=100B", out=tmp_path / "run")
    assert e.value.exit_code == 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["budget"] == [{"name": "size", "limit": 100.0, "reached": report["after"]["size_bytes"], "unit": "bytes", "met": False}]


def test_the_dry_run_writes_nothing_and_its_plan_applies(batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_only(network(), batches, recipe=[gs.Prune(macs=0.6), gs.Distill(), gs.Quantize()])
    assert {"keep", "quantize_weight", "quantize_activation"} <= set(plan.counts())
    assert plan.apply(network())(batches[0][0]).shape == (32, 4)
    assert list(tmp_path.iterdir()) == []
