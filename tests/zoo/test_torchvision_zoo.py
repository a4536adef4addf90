"""Half of every family of torchvision's convolutional networks, with no configuration. Long: `make test-slow`."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision

from gossamer.surgery import cut
from gossamer.trace import costs, trace

NAMES = [
    *("alexnet", "convnext_tiny", "densenet121", "densenet169", "densenet201", "efficientnet_b0", "efficientnet_b3", "efficientnet_v2_s"),
    *(
        "googlenet",
        "mnasnet0_5",
        "mnasnet1_0",
        "mobilenet_v2",
        "mobilenet_v3_large",
        "mobilenet_v3_small",
        "regnet_x_400mf",
        "regnet_y_400mf",
    ),
    *("regnet_x_1_6gf", "regnet_y_1_6gf", "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "shufflenet_v2_x0_5"),
    *("shufflenet_v2_x1_0", "squeezenet1_0", "squeezenet1_1", "vgg11", "vgg16_bn", "wide_resnet50_2"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_half_of_every_family_and_both_modes(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torchvision.models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    inputs = (torch.randn(2, 3, 96, 96),)
    traced = trace(net, inputs)
    removed = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    for g in traced.channels.groups:
        n = len(g.classes)
        removed[g.classes[torch.randperm(n)[: n // 2]]] = True
    made = cut(net, traced, removed)
    assert made.proof.holds
    assert costs(made.model, inputs).macs < 0.6 * traced.profile.macs
    made.model.eval()(torch.randn(3, 3, 96, 96))
    made.model.train()(torch.randn(3, 3, 96, 96))
