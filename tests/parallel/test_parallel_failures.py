"""A process that dies, hangs, fails or is told to stop: all end with one line within a minute, and torchrun's restart goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import run
from safetensors.torch import load_file
from train_under_torchrun import one_line

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(one_line, 2, folder / "processes", str(folder), "undisturbed")
    return load_file(folder / "model.safetensors")


def killed_once(folder: Path, chance: random.Random, undisturbed) -> None:
    """Two processes under torchrun, one of which is killed at some moment."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    command += ["--monitor-interval", "0.1", str(HERE / "train_under_torchrun.py"), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    job = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    rank, until = chance.randrange(2), time.monotonic() + 90
    while not (folder / "checkpoints" / "training.shards").exists():
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 1.0))
    os.kill(int((folder / f"pid-{rank}-0").read_text()), signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert (folder / f"pid-{rank}-1").exists()  # it was restarted
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[n], t) for n, t in undisturbed.items())
    assert [json.loads(line)["epoch"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_killed_process_is_restarted_to_the_same_weights(tmp_path, undisturbed):
    killed_once(tmp_path, random.Random(0), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_processes_killed_at_random_moments(tmp_path, undisturbed, seed):
    killed_once(tmp_path, random.Random(seed), undisturbed)


def test_an_error_in_one_process_is_told_to_all(tmp_path):
    other, failed = run(one_line, 2, tmp_path / "processes", str(tmp_path), "error")
    assert failed[:2] == ("UsageError", "the disk of process 1 is on fire")
    assert other[0] == "PeerLost" and "on fire" in other[1] and "--max-restarts" in other[1] and "\n" not in other[1]
    assert other[2] < 60 and not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up(tmp_path):
    other, _ = run(one_line, 2, tmp_path / "processes", str(tmp_path), "hang", patience_s=3)
    assert other[0] == "PeerLost" and "did not answer in time" in other[1] and "\n" not in other[1]
    assert other[2] < 60


def test_sigterm_to_one_process_saves_once_and_ends_all(tmp_path):
    found = run(one_line, 2, tmp_path / "processes", str(tmp_path), "stop")
    assert [f[0] for f in found] == ["TrainingStopped"] * 2  # a SystemExit with code 0
    header = json.loads((tmp_path / "checkpoints" / "training.shards" / "training.json").read_text())["header"]
    assert (header["progress"]["epoch"], header["progress"]["step"]) == (0, 5)
    assert not (tmp_path / "model.safetensors").exists()
