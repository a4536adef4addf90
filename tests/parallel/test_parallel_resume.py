"""Checkpoints of any number and kind of processes resume in any other, to the weights of an uninterrupted training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import run
from networks_to_divide import assert_alike, assert_same, network, rows, trained

import gossamer as gs
from gossamer.errors import RunFolderError
from gossamer.parallel import Parallel
from gossamer.training.checkpoint import PREVIOUS_SHARDS, SHARDS

DDP, FSDP = Parallel(data=2), Parallel(data=2, shard=True)
OPTIONS = {"ema": 0.8, "optimizer": "adamw", "epochs": 3, "patience": 3, "checkpoint_every": 4}


class Interrupt(Exception):
    """What a kill would be."""


def double(kind="mlp"):
    return {"model": network(kind).double(), "data": [(x.double(), y) for x, y in rows()], "val": [(x.double(), y) for x, y in rows(14, 5)]}


def sitting(folder: Path, parallel, stop: int | None, **options):
    """Train, from a checkpoint where there is one, and be interrupted after so many steps; what the loop's end gives otherwise."""

    def progress(done: int, _total: int) -> None:
        if done == stop:
            raise Interrupt

    given = {"checkpoint": folder, "resume": True, "log": folder.parent / "log.jsonl", **OPTIONS, **double(), **options}
    try:
        return trained("mlp", parallel, progress=progress, **given)
    except Interrupt:
        return None


def sittings(_rank, folder, plan):
    """Several sittings of two processes; a tie between them is a whole epoch."""
    return [sitting(Path(folder) / "c", parallel, None, epochs=epochs, patience=None, **more) for parallel, epochs, more in plan]


def two_stop(rank, folder, parallel, stop):
    """Both processes stop after the same step, in the middle of an epoch."""
    from gossamer.training import epoch as module

    seen = [0]
    train = module.Epoch.train

    def stopping(self, *args):
        save = self.save

        def counted():
            save()
            seen[0] += 1
            if seen[0] == stop:
                raise Interrupt

        self.save = counted
        train(self, *args)

    module.Epoch.train = stopping
    return sitting(Path(folder) / "c", parallel, None)


def go_on(_rank, folder, parallel):
    return sitting(Path(folder) / "c", parallel, None)


WAYS = [
    pytest.param(DDP, 2, None, 1, id="ddp-one", marks=pytest.mark.slow),
    pytest.param(FSDP, 2, None, 1, id="fsdp-one"),
    pytest.param(FSDP, 2, DDP, 3, id="fsdp-ddp3"),
    pytest.param(None, 1, FSDP, 2, id="one-fsdp"),
    pytest.param(DDP, 2, FSDP, 2, id="ddp-fsdp", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("before", "n", "after", "m"), WAYS)
def test_a_checkpoint_resumes_anywhere(tmp_path, before, n, after, m):
    whole = trained("mlp", None, **OPTIONS, **double())
    folder = tmp_path / "run"
    if n == 1:
        assert sitting(folder / "c", None, 14) is None
    else:
        assert run(two_stop, n, tmp_path / "first", str(folder), before, 3) == [None] * n
        assert (folder / "c" / SHARDS / "training.json").exists()
    progress = json.loads((folder / "c" / SHARDS / "training.json").read_text())["header"]["progress"] if n > 1 else {"step": 2, "epoch": 1}
    assert (progress["epoch"], progress["step"]) == (1, 2) or n > 1
    if after is not None and after.data != m:
        after = Parallel(data=m, shard=after.shard)
    found = [go_on(0, str(folder), None)] if m == 1 else run(go_on, m, tmp_path / "second", str(folder), after)
    for one in found:
        assert_alike(one, whole, 1e-9)
    assert_same([one[0] for one in found])
    assert [json.loads(line)["epoch"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_damaged_shard_falls_back_and_other_networks_are_refused(tmp_path):
    whole = trained("mlp", None, **{**OPTIONS, "patience": None}, **double())
    first = run(sittings, 2, tmp_path / "a", str(tmp_path), [(DDP, 3, {"checkpoint_every": 4})])
    folder = tmp_path / "c"
    assert (folder / PREVIOUS_SHARDS).is_dir()
    shard = next((folder / SHARDS).glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged"):
        again = trained("mlp", None, **{**OPTIONS, "patience": None}, **double(), checkpoint=folder, resume=True)
    assert_alike(again, whole, 1e-9)
    assert_alike(first[0][0], whole, 1e-9)
    with pytest.raises(RunFolderError, match="other settings"):
        gs.fit(network("mlp").double(), double()["data"], checkpoint=folder, resume=True, epochs=7)


def with_dropout(_rank, parallel, folder, again):
    net = torch.nn.Sequential(network("mlp"), torch.nn.Dropout(0.5))
    options = {"epochs": 2, "lr": 1e-2, "checkpoint": Path(folder), "parallel": parallel, "checkpoint_every": 3}
    result = gs.fit(net, rows(), resume=again, **options)
    return result.model.state_dict()


def test_dropout_is_seeded_by_process_and_reproducible(tmp_path):
    one = run(with_dropout, 2, tmp_path / "a", DDP, str(tmp_path / "c1"), False)
    two = run(with_dropout, 2, tmp_path / "b", DDP, str(tmp_path / "c2"), False)
    assert_same([*one, *two])
