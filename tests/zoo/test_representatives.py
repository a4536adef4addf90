"""A few networks of each kind, small, in the default suite: pruned by half, proved, run in both modes at another batch size, reloaded."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchvision

import gossamer as gs

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _zoo import enliven

TORCHVISION = {
    "swin_t": 64,
    "convnext_tiny": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "lraspp_mobilenet_v3_large": 64,
}
TIMM = [
    *(
        "test_vit",
        "test_vit2",
        "test_vit4",
        "test_convnext",
        "test_convnext3",
        "test_byobnet",
        "test_nfnet",
        "test_resnet",
        "test_mambaout",
    ),
    *("test_efficientnet", "test_efficientnet_gn", "test_efficientnet_evos", "levit_128s"),
]


def check(net: torch.nn.Module, size: int, tmp_path: Path, most: float = 0.6) -> None:
    torch.manual_seed(0)
    net = enliven(net).eval()
    inputs = (torch.randn(1, 3, size, size),)
    result = gs.prune(net, inputs, ratio=0.5)
    assert result.after.macs <= most * result.before.macs
    assert result.proof.holds or result.proof.difference is None
    assert not [n for n in result.notes if n.startswith("left in")]
    again = gs.load(result.save(tmp_path / "run"), model=copy.deepcopy(net)).eval()
    with torch.no_grad():
        three = torch.randn(3, 3, size, size)
        expected, found = result.model(three), again(three)
        for a, b in zip(*(v.values() if isinstance(v, dict) else [v] for v in (expected, found)), strict=True):
            assert torch.equal(a, b)
        result.model.train()(torch.randn(2, 3, size, size))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, tmp_path):
    extra = {"weights_backbone": None} if name.startswith("lraspp") else {}
    check(torchvision.models.get_model(name, weights=None, **extra), TORCHVISION[name], tmp_path)


def test_a_vision_transformer_loses_heads(tmp_path):
    net = torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128)
    check(net, 32, tmp_path)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = timm.create_model(name, pretrained=False)
    check(net, net.default_cfg["input_size"][-1], tmp_path, most=0.8)
