"""The networks that break other tools, trained for some steps in two processes: equal to one, or an error that says why."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from launching import run
from networks_to_divide import furthest
from torch import nn

import gossamer as gs
from gossamer.errors import GossamerError
from gossamer.parallel import Parallel
from gossamer.sources.batches import outputs

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "networks.py"


def makers():
    spec = importlib.util.spec_from_file_location("networks", CASES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {n: f for n, f in vars(module).items() if callable(f) and not n.startswith("_") and getattr(f, "__module__", "") == "networks"}


def size_of(model, batch):
    """A mean over the samples of every output."""
    found = outputs(model(*batch.args, **batch.kwargs))
    return torch.stack(
        [out.float().square().flatten(1).mean(1).mean() if out.dim() > 1 else out.float().square().mean() for out in found]
    ).sum()


def several(inputs, n):
    """Inputs of ``n`` samples, none like another."""
    g = torch.Generator().manual_seed(0)

    def one(x):
        if not isinstance(x, torch.Tensor) or not x.dim():
            return x
        if x.is_floating_point():
            return torch.randn(n, *x.shape[1:], generator=g)
        return torch.cat([x.roll(i, -1)[:1] for i in range(n)])

    return {k: one(x) for k, x in inputs.items()} if isinstance(inputs, dict) else tuple(one(x) for x in inputs)


def all_trained(_rank, parallel):
    found = {}
    warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True")  # what a network does itself
    for name, make in makers().items():
        torch.manual_seed(0)
        net, inputs = make()
        for module in net.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        data = [several(inputs, 4), several(inputs, 3)]
        options = {"objective": size_of, "lr": 1e-4, "optimizer": "sgd", "parallel": parallel, "example_inputs": inputs}
        try:
            found[name] = gs.fit(net, data, **options).model.state_dict()
        except GossamerError as e:
            found[name] = str(e)
    return found


@pytest.mark.skipif(not CASES.is_file(), reason="the networks that break other tools are not beside this checkout")
@pytest.mark.parametrize("shard", [pytest.param(False, id="ddp"), pytest.param(True, id="fsdp", marks=pytest.mark.slow)])
def test_networks_that_break_other_tools(tmp_path, shard):
    reference = all_trained(0, None)
    found = run(all_trained, 2, tmp_path, Parallel(data=2, shard=shard))
    wrong = {}
    for name, theirs in reference.items():
        mine = found[0][name]
        if isinstance(theirs, str) or isinstance(mine, str):
            if mine != theirs:
                wrong[name] = mine if isinstance(mine, str) else theirs
        elif furthest(mine, theirs) > 1e-5:
            wrong[name] = furthest(mine, theirs)
    assert not wrong
