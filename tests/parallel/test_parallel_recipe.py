"""A recipe in several processes ends in the weights of one process; all but the first write nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import run
from networks_to_divide import assert_same, furthest, images
from safetensors.torch import load_file
from torch import nn

import gossamer as gs
from gossamer.errors import RecipeError, UsageError
from gossamer.parallel import Parallel


def compressed(_rank, parallel, folder):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    net = nn.Sequential(block, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    x, y = images(24).tensors
    batches = list(zip(x.split(5), y.split(5), strict=True))
    recipe = [
        gs.Prune(ratio=0.25),
        gs.Distill(epochs=1, optimizer="sgd", lr=1e-3),
        gs.Sparsify(sparsity=0.5, epochs=1, lr=1e-4),
        gs.Quantize(),
    ]
    result = gs.compress(net, batches, recipe=recipe, out=folder, parallel=parallel, example_inputs=(x[:1],))
    return result.report is not None, result.model.state_dict()


@pytest.mark.slow
def test_a_recipe_ends_where_one_process_does(tmp_path):
    assert compressed(0, None, str(tmp_path / "one"))[0]
    found = run(compressed, 2, tmp_path / "processes", Parallel(data=2), str(tmp_path / "two"))
    assert [f[0] for f in found] == [True, False]
    assert_same([f[1] for f in found])
    for step in ("2-distill", "3-sparsify"):
        mine, theirs = (load_file(tmp_path / run / "checkpoints" / "candidate-1" / step / "model.safetensors") for run in ("two", "one"))
        plain = {n for n in theirs if theirs[n].is_floating_point() and mine[n].shape == theirs[n].shape}
        assert plain and furthest({n: mine[n] for n in plain}, {n: theirs[n] for n in plain}) <= 1e-5
    assert not list((tmp_path / "two").rglob("begun"))


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"recipe": [gs.Distill()]}, UsageError, "out"),
        ({"recipe": [gs.Quantize()], "out": "absent"}, RecipeError, "leave it out"),
        ({"recipe": [gs.Prune(latency=0.9, epochs=1)], "out": "absent"}, RecipeError, "macs"),
        ({"budget": "latency=0.5", "out": "absent"}, UsageError, "recipe"),
    ],
)
def test_what_cannot_be_done_in_several_processes(options, kind, says):
    x, y = images(8).tensors
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 196, 5))
    with pytest.raises(kind, match=says):
        gs.compress(net, [(x, y)], parallel=Parallel(data=2), **options)
    assert not Path("absent").exists()


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path):
    pytest.importorskip("sklearn")

    def call(*arguments):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gossamer"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, env=environment, check=False)
        return done.returncode, done.stdout, done.stderr

    model, data = "gossamer:resnet8?in_channels=1", ("--data", "digits")
    for kind in ("ddp", "fsdp"):
        code, said, errors = call("train", model, *data, "--out", str(tmp_path / kind), "--epochs", "2", "--parallel", kind)
        assert code == 0, errors
        assert said.count("top-1") == 1
    ddp, fsdp = (load_file(tmp_path / kind / "model.safetensors") for kind in ("ddp", "fsdp"))
    assert list(ddp) == list(fsdp)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps:\n  - prune: {macs: 0.6}\n  - distill: {epochs: 1}\n  - fit: {epochs: 1}\n  - quantize\n")
    weights = ("--weights", str(tmp_path / "ddp" / "model.safetensors"))
    out = ("--out", str(tmp_path / "run"))
    code, said, errors = call("compress", model, *weights, *data, "--recipe", str(recipe), *out, "--parallel", "ddp")
    assert code == 0, errors
    assert (tmp_path / "run" / "report.json").exists() and said.count("size on disk") == 1
    code, _, errors = call("train", model, *data, "--out", str(tmp_path / "new"), "--parallel", "ddp,3")
    assert code != 0 and "torchrun --nproc-per-node 3" in errors
