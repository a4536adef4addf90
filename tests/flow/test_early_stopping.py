"""Steps that stop early: when, with which weights, judged on what, and resumed to the same."""

from __future__ import annotations

import json

import pytest
import torch
from test_flow import batches, network  # noqa: F401
from torch.utils.data import TensorDataset

import gossamer as gs
from gossamer.errors import RecipeError, SourceError
from gossamer.flow.job import resolve
from gossamer.flow.steps import run_step
from gossamer.plan import Plan, input_specs
from gossamer.sources import Data

EPOCHS = 40


@pytest.fixture(scope="module")
def noise():
    """Labels by chance: there is nothing to learn, and validation gets worse."""
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(32, 1, 12, 12, generator=generator), torch.randint(4, (32,), generator=generator)) for _ in range(2)]


def carried_out(step, data, validation, folder, progress=None):
    """One step as the main job does it, without the file and its measurements."""
    job = resolve(network(), data, recipe=[step], validation=validation, seed=3)
    plan, before = Plan(inputs=input_specs(job.example_inputs)), gs.profile(job.model, job.example_inputs)
    return run_step(step, job.model, plan, before, job, folder=folder, progress=progress)


def epochs_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_step_stops_where_fit_stops_and_returns_the_weights_of_its_best_epoch(batches, noise, tmp_path):  # noqa: F811
    options = {"epochs": EPOCHS, "lr": 0.02, "patience": 3, "monitor": "val_accuracy"}
    result = gs.compress(network(), noise, recipe=[gs.Fit(**options)], validation=batches, out=tmp_path / "r", seed=3)
    alone = gs.fit(network(), noise, val=batches, seed=3, **options)
    assert alone.best_epoch is not None
    assert len(alone.history) == alone.best_epoch + 3 < EPOCHS
    assert all(torch.equal(a, b) for a, b in zip(alone.model.state_dict().values(), result.model.state_dict().values(), strict=True))
    assert [r["val_accuracy"] for r in epochs_of(tmp_path / "r")] == [r["val_accuracy"] for r in alone.history]
    (note,) = result.report["steps"][0]["notes"]
    assert note == f"fit stopped after {len(alone.history)} of {EPOCHS} epochs, the weights are those of epoch {alone.best_epoch}"
    shown = alone.history[alone.best_epoch - 1]["val_loss"]
    assert f"the weights of epoch {alone.best_epoch}, " in str(alone)
    assert f"val_loss {shown:.4g}" in str(alone)


@pytest.mark.parametrize(
    "step",
    [
        gs.Distill(epochs=EPOCHS, lr=0.02, alpha=0.0, patience=2),
        gs.Qat(epochs=EPOCHS, lr=0.02, alpha=0.0, patience=2),
        gs.Prune(macs=0.6, epochs=EPOCHS, lr=0.3, patience=2),
        gs.Sparsify(sparsity=0.5, epochs=EPOCHS, lr=0.3, patience=2),
    ],
    ids=lambda s: s.kind,
)
def test_every_step_that_trains_stops(step, batches, noise, tmp_path):  # noqa: F811
    result = carried_out(step, noise, batches, tmp_path)
    note = result.notes[-1]
    done, best = int(note.split()[3]), int(note.split()[-1])
    assert done == best + 2 < EPOCHS
    if step.kind != "prune":
        losses = [r["val_loss"] for r in epochs_of(tmp_path)]
        assert len(losses) == done
        assert losses.index(min(losses)) + 1 == best
    if step.kind == "sparsify":
        assert sum(int((p == 0).sum()) for p in result.model.parameters() if p.dim() > 1) > 0.49 * 14_000


def test_interrupted_it_resumes_to_the_same_weights(batches, noise, tmp_path):  # noqa: F811
    step = gs.Fit(epochs=EPOCHS, lr=0.02, patience=2)
    whole = carried_out(step, noise, batches, tmp_path / "whole")

    def stop(stage, done, total):
        if stage == "fit" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carried_out(step, noise, batches, tmp_path / "r", stop)
    assert len(epochs_of(tmp_path / "r")) == 1
    resumed = carried_out(step, noise, batches, tmp_path / "r")
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True))
    assert whole.notes == resumed.notes != ()


def test_a_tenth_of_the_training_split_is_held_back_and_nothing_else(batches):  # noqa: F811
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    data = Data("mine", TensorDataset(x[:60], y[:60]), TensorDataset(x[60:], y[60:]), 4, (1, 1, 12, 12))
    plain = resolve(network(), data, recipe=[gs.Fit()])
    patient = resolve(network(), data, recipe=[gs.Fit(patience=1)])
    assert plain.validation is None
    seen = [{tuple(t.flatten().tolist()) for batch in b for t in batch[0]} for b in (patient.training, patient.validation, plain.training)]
    assert [len(s) for s in seen] == [54, 6, 60]
    assert seen[0] | seen[1] == seen[2]
    for of in (plain, patient):
        assert sum(len(b[1]) for b in of.evaluation) == 36
    assert not seen[1] & {tuple(t.flatten().tolist()) for batch in patient.calibration for t in batch[0]}
    named = resolve(network(), data, recipe=[gs.Fit(patience=1)], validation=batches)
    assert named.validation is batches
    assert sum(len(b[1]) for b in named.training) == 60


def test_what_it_cannot_be_judged_on_is_one_line(batches, tmp_path):  # noqa: F811
    for data, options, error, words in [
        (batches, {"recipe": [gs.Distill(patience=2)]}, RecipeError, "step distill: patience needs validation data"),
        (batches, {"recipe": [gs.Fit(patience=2)], "validation": iter(batches)}, SourceError, "read only once"),
        (batches, {"recipe": [gs.Quantize()], "validation": batches}, RecipeError, "quantize has none: leave it out"),
        (Data("m", [batches[0]], batches, 4, (1, 1, 12, 12)), {"recipe": [gs.Fit(patience=2)]}, SourceError, "none can be held back"),
    ]:
        with pytest.raises(error, match=words) as e:
            gs.compress(network(), data, out=tmp_path / "r", **options)
        assert "\n" not in str(e.value)
        assert not (tmp_path / "r").exists()
