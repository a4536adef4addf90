"""What tests of memory planning share."""

from __future__ import annotations

import pytest
import torch
from networks import livened

import gossamer as gs
from gossamer.models import mobilenet_v2


@pytest.fixture(scope="session")
def mobilenet():
    """MobileNetV2, an input, and its plan."""
    torch.manual_seed(0)
    net, x = livened(mobilenet_v2()), torch.randn(1, 3, 224, 224)
    return net, x, gs.plan_memory(net, (x,))
