"""What must survive: kills at random moments, SIGTERM, damaged files, full disks, NaN."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gossamer.errors import RunFolderError, UsageError
from gossamer.training import TrainingStopped, checkpoint, fit
from gossamer.training.checkpoint import FILE, PREVIOUS

CLEAN = multiprocessing.get_context("forkserver")  # a fork of this process would inherit locks of threads that it does not have
CLEAN.set_forkserver_preload(["gossamer.training"])


def work(folder: Path, pause: float, steps: Any) -> None:
    """A training with everything that has a state, in a process of its own."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 3))
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 6, generator=g), torch.randint(3, (64,), generator=g)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))

    def progress(done: int, total: int) -> None:
        steps.value += 1
        time.sleep(pause)

    options = {"ema": 0.9, "val": [(x, y)], "patience": 9, "checkpoint": folder / "c", "checkpoint_every": 3, "log": folder / "log.jsonl"}
    result = fit(model, loader, epochs=10, lr=1e-2, resume=True, progress=progress, **options)
    save_file({k: v.contiguous() for k, v in result.model.state_dict().items()}, folder / "done.safetensors")


def start(folder: Path, pause: float = 0.01) -> tuple[Any, Any]:
    """The process, and how many steps it made."""
    steps = CLEAN.Value("i", 0)
    process = CLEAN.Process(target=work, args=(folder, pause, steps), daemon=True)
    process.start()
    return process, steps


def wait_for(process: Any, steps: Any, wanted: int) -> None:
    while process.is_alive() and steps.value < wanted:
        time.sleep(0.002)


def finish(folder: Path) -> None:
    process, _ = start(folder, pause=0)
    process.join()
    assert process.exitcode == 0


def kill_until_done(folder: Path, kills: int, seed: int) -> int:
    """Kill at random moments after at least one further step; returns how many kills hit a running process."""
    rng, hit = random.Random(seed), 0
    for _ in range(kills):
        process, steps = start(folder)
        wait_for(process, steps, 1)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.join()
        hit += process.exitcode == -signal.SIGKILL
    finish(folder)
    return hit


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    finish(folder)
    return folder


def same_end(a: Path, b: Path) -> None:
    one, two = load_file(a / "done.safetensors"), load_file(b / "done.safetensors")
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert len((a / "log.jsonl").read_text().splitlines()) == len((b / "log.jsonl").read_text().splitlines())


def test_three_kills_at_random_moments_end_in_the_same_weights(uninterrupted, tmp_path):
    assert kill_until_done(tmp_path, 3, seed=1) > 1
    same_end(uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_twenty_kills_at_random_moments_end_in_the_same_weights(uninterrupted, tmp_path, seed):
    assert kill_until_done(tmp_path, 4, seed=seed) == 4
    same_end(uninterrupted, tmp_path)


def test_sigterm_saves_and_exits_with_0_and_the_rest_is_the_same(uninterrupted, tmp_path):
    process, steps = start(tmp_path)
    wait_for(process, steps, 5)
    process.terminate()
    process.join()
    assert process.exitcode == 0
    assert checkpoint.exists(tmp_path / "c")
    assert not (tmp_path / "done.safetensors").exists()
    finish(tmp_path)
    same_end(uninterrupted, tmp_path)


def data(n: int = 4) -> list:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=g), torch.randint(2, (8,), generator=g)) for _ in range(n)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def stop_at(step: int):
    def progress(done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def equal(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.8, "accumulate": 2, "clip": 1.0},
        {"optimizer": "adafactor", "layer_decay": 0.7},
        {"optimizer_in_backward": True},
        {"precision": "bf16"},
        {"patience": 5, "monitor": "val_accuracy"},
    ],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.filterwarnings("ignore:this CPU has no bf16")
def test_every_option_resumes_bit_for_bit(tmp_path, options):
    common = {"epochs": 3, "lr": 1e-2, "val": data(2)} | options
    whole = fit(net(), data(5), **common)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), data(5), checkpoint=tmp_path, checkpoint_every=1, progress=stop_at(5), **common)
    again = fit(net(), data(5), checkpoint=tmp_path, resume=True, **common)
    equal(whole.model, again.model)
    assert whole.steps == again.steps
    assert whole.optimizer_state_bytes == again.optimizer_state_bytes


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(tmp_path, damage):
    whole = fit(net(), data(), epochs=3, lr=1e-2)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), data(), epochs=3, lr=1e-2, checkpoint=tmp_path, progress=stop_at(9))
    path = tmp_path / FILE
    raw = bytearray(path.read_bytes())
    if damage == "gone":  # killed between the two renames
        path.unlink()
        equal(whole.model, fit(net(), data(), epochs=3, lr=1e-2, checkpoint=tmp_path, resume=True).model)
        return
    raw[-3] ^= 1  # one bit of one weight
    path.write_bytes({"flip": bytes(raw), "cut": bytes(raw[:-40]), "empty": b""}[damage])
    with pytest.warns(UserWarning, match="is damaged.*the checkpoint before it"):
        again = fit(net(), data(), epochs=3, lr=1e-2, checkpoint=tmp_path, resume=True)
    equal(whole.model, again.model)


def test_two_damaged_checkpoints_are_an_error(tmp_path):
    fit(net(), data(), epochs=2, checkpoint=tmp_path)
    for name in (FILE, PREVIOUS):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(RunFolderError, match=r"damaged.*no good one before it"):
        fit(net(), data(), epochs=2, checkpoint=tmp_path, resume=True)


def test_a_nan_stops_and_the_last_good_state_is_kept(tmp_path):
    poisoned = data()
    poisoned[2][0][0, 0] = float("nan")
    with pytest.raises(UsageError, match="nan at step 3 of epoch 1"):
        fit(net(), poisoned, checkpoint=tmp_path, checkpoint_every=1)
    kept = load_file(tmp_path / FILE)
    assert all(torch.isfinite(t).all() for t in kept.values() if t.is_floating_point())
    assert fit(net(), data(), checkpoint=tmp_path, resume=True).steps == 4


def test_weights_that_became_nan_are_never_saved_over_good_ones(tmp_path):
    def poison(model):
        poison.steps += 1
        if poison.steps == 3:
            model[0].weight[0, 0] = float("inf")

    poison.steps = 0
    with pytest.raises(UsageError, match=r"0\.weight became NaN or infinite.*last good"):
        fit(net(), data(), checkpoint=tmp_path, checkpoint_every=1, after_step=poison)
    assert torch.isfinite(load_file(tmp_path / FILE)["model.0.weight"]).all()


def fill_up(folder: Path, told: Any) -> None:
    """A training whose third step finds that no file may grow past 1,000 bytes."""

    def progress(done: int, total: int) -> None:
        if done == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    try:
        fit(net(), data(), epochs=2, checkpoint=folder, checkpoint_every=1, progress=progress)
    except RunFolderError as e:
        told.put(str(e))


def test_a_full_disk_stops_with_one_line_and_the_last_good_state_is_kept(tmp_path):
    """The real thing: the kernel refuses to write past a limit."""
    told = CLEAN.Queue()
    process = CLEAN.Process(target=fill_up, args=(tmp_path / "c", told), daemon=True)
    process.start()
    message = told.get(timeout=60)
    process.join()
    assert message.startswith("cannot write a checkpoint")
    assert "the last one that was written is kept" in message
    assert {p.name for p in (tmp_path / "c").iterdir()} == {FILE, PREVIOUS}
    _, header = checkpoint.last_good(tmp_path / "c", checkpoint.read_header)
    assert header["progress"]["step"] == 3


def test_sigterm_in_this_process_and_the_handler_of_before_comes_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def progress(done: int, total: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingStopped) as e:
        fit(net(), data(), epochs=2, checkpoint=tmp_path, progress=progress)
    assert e.value.code == 0
    assert "continue with resume" in str(e.value)
    assert signal.getsignal(signal.SIGTERM) is before
    equal(fit(net(), data(), epochs=2, checkpoint=tmp_path, resume=True).model, fit(net(), data(), epochs=2).model)
