"""Every network through trace, pruning, int8 and ONNX, as its small-image variant at a quarter of the width."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.models import MODELS, build
from gossamer.profiling import evaluate


def awake(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network with batch-norm statistics of its own, so that its logits depend on the picture."""
    net = build(name, num_classes=10, width_mult=0.25, small=True).train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        net(torch.randn(16, 3, 32, 32))
    return net.eval(), (torch.randn(2, 3, 32, 32),)


@pytest.mark.parametrize("name", MODELS)
def test_prunes_with_proof(name):
    net, x = awake(name)
    with torch.no_grad():
        logits = net(x[0])
    assert (logits[0] - logits[1]).abs().max() > 1e-3 * logits.abs().max()
    pruned = gs.prune(net, x, ratio=0.3)
    assert pruned.proof is not None and pruned.proof.holds and pruned.proof.exact
    assert pruned.after.params < 0.8 * pruned.before.params
    assert pruned.after.macs < pruned.before.macs
    with torch.no_grad():
        assert (pruned.model(x[0]) - logits).abs().max() > 0


SLOW = [pytest.param(n, marks=() if n == "resnet8" else pytest.mark.slow) for n in MODELS]


@pytest.mark.parametrize("name", SLOW)
def test_quantises_and_exports_with_parity(name, tmp_path):
    net, x = awake(name)
    plain = gs.export(net, tmp_path / "float.onnx", example_inputs=x)
    small = gs.quantize(net, x, calibration=[torch.randn(16, 3, 32, 32)])
    exported = gs.export(small, tmp_path / "int8.onnx")
    assert exported.path.stat().st_size < plain.path.stat().st_size
    assert evaluate(exported.path, [torch.randn(32, 3, 32, 32)], reference=net).sqnr_db > 3
