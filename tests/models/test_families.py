"""Every network: counts against publications and closed forms, weights against torchvision's and timm's, the small-image stems."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import gossamer as gs
from gossamer.errors import SourceError
from gossamer.models import MODELS, build, input_side, shufflenet_v2

IN_TORCHVISION = [
    ("densenet121", {}, "densenet121"),
    ("mobilenet_v2", {}, "mobilenet_v2"),
    ("mobilenet_v3_large", {}, "mobilenet_v3_large"),
    ("mobilenet_v3_small", {}, "mobilenet_v3_small"),
    ("resnet18", {}, "resnet18"),
    ("resnet34", {}, "resnet34"),
    ("resnet50", {}, "resnet50"),
    ("shufflenet_v2", {"width_mult": 0.5}, "shufflenet_v2_x0_5"),
    ("shufflenet_v2", {}, "shufflenet_v2_x1_0"),
    ("shufflenet_v2", {"width_mult": 1.5}, "shufflenet_v2_x1_5"),
    ("shufflenet_v2", {"width_mult": 2.0}, "shufflenet_v2_x2_0"),
    ("squeezenet1_0", {}, "squeezenet1_0"),
    ("squeezenet1_1", {}, "squeezenet1_1"),
]
"""Name and options here, name there."""

PAPERS = [
    ("mobilenet_v1", 1.0, 4.2, 569, 0.0),
    ("mobilenet_v1", 0.75, 2.6, 325, 0.0),
    ("mobilenet_v1", 0.5, 1.3, 149, 0.0),
    ("mobilenet_v1", 0.25, 0.5, 41, 0.0),
    ("mobilenet_v2", 1.0, 3.4, 300, 0.03),
    ("mobilenet_v3_large", 1.0, 5.4, 219, 0.015),
    ("mobilenet_v3_small", 1.0, 2.5, 56, 0.01),
    ("squeezenet1_0", 1.0, 1.2, None, 0.0),
    ("shufflenet_v2", 0.5, 1.4, 41, 0.03),
    ("shufflenet_v2", 1.0, 2.3, 146, 0.01),
    ("shufflenet_v2", 1.5, 3.5, 299, 0.015),
    ("shufflenet_v2", 2.0, 7.4, 591, 0.015),
    ("ghostnet", 0.5, 2.6, 42, 0.0),
    ("ghostnet", 1.0, 5.2, 141, 0.0),
    ("ghostnet", 1.3, 7.3, 226, 0.01),
    ("densenet_bc100", 1.0, 0.8, None, 0.0),
    ("resnet20", 1.0, 0.27, None, 0.0),
]
"""Network, width, millions of parameters and of MACs as the paper rounds them, and by how much (relative) its own count is known to be off."""


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def alive(model: nn.Module) -> nn.Module:
    """Random scales and shifts, running statistics of random pictures: without them signals of untrained networks die out before the logits."""
    for m in model.train().modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.2)
            m.momentum = None
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    return model.eval()


def counted_by_hooks(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of convolutions and linear layers."""
    total = 0

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal total
        total += out[0].numel() * module.weight[0].numel()

    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(x)
    return total


@pytest.mark.parametrize(("name", "options", "theirs"), IN_TORCHVISION, ids=lambda v: v if isinstance(v, str) else "")
def test_torchvisions_weights_load_and_give_its_logits(name, options, theirs):
    reference = alive(torchvision.models.get_model(theirs, weights=None))
    ours = build(name, **options).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        want, got = reference(x), ours(x)
    assert (want[0] - want[1]).abs().max() > 1e-3 * want.abs().max(), "the pictures make a difference"
    assert (want - got).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(("name", "options", "theirs"), IN_TORCHVISION, ids=lambda v: v if isinstance(v, str) else "")
def test_counts_are_those_torchvision_publishes(name, options, theirs):
    published = torchvision.models.get_model_weights(theirs).DEFAULT.meta
    costs = gs.profile(build(name, **options).eval(), (torch.zeros(1, 3, 224, 224),))
    assert costs.params == published["num_params"]
    assert round(costs.macs / 1e9, 3) == published["_ops"]


@pytest.mark.parametrize(("name", "width", "millions", "mega_macs", "off"), PAPERS)
def test_counts_are_those_of_the_papers(name, width, millions, mega_macs, off):
    side = input_side(name)
    costs = gs.profile(build(name, width_mult=width).eval(), (torch.zeros(1, 3, side, side),))
    digit = 0.005 if name == "resnet20" else 0.05
    assert costs.params / 1e6 == pytest.approx(millions, abs=digit + off * millions)
    if mega_macs is not None:
        assert costs.macs / 1e6 == pytest.approx(mega_macs, abs=0.5 + off * mega_macs)


def test_squeezenet_has_exactly_the_papers_parameters():
    assert params(build("squeezenet1_0")) == 1_248_424  # table 1, bottom line before pruning


@pytest.mark.parametrize("name", MODELS)
def test_profile_counts_what_hooks_count(name):
    for small, side in ((False, 224), (True, 32)):
        net = build(name, width_mult=0.25, small=small, in_channels=2, num_classes=7).eval()
        x = torch.zeros(1, 2, side, side)
        costs = gs.profile(net, (x,))
        assert costs.macs == counted_by_hooks(net, x)
        assert costs.params == params(net)


def residual_macs(depth: int, width: int, side: int) -> int:
    """Closed form of the residual networks for small images."""
    total = side * side * 3 * width * 9
    for stage in range(3):
        w, area = width * 2**stage, (side >> stage) ** 2
        total += area * 9 * w * w * 2 * depth
        if stage:
            total += area * (w // 2 * w - 9 * w * w // 2)  # a 1x1 shortcut; the first 3x3 has half the inputs
    return total + 4 * width * 10


@pytest.mark.parametrize(("name", "depth"), [("resnet8", 1), ("resnet20", 3)])
def test_small_residual_networks_by_closed_form(name, depth):
    assert gs.profile(build(name).eval(), (torch.zeros(1, 3, 32, 32),)).macs == residual_macs(depth, 16, 32)


def test_densenet_bc100_by_closed_form():
    growth, channels, side, macs = 12, 24, 32, 32 * 32 * 27 * 24
    for block in range(3):
        for _ in range(16):
            macs += side * side * (channels * 4 * growth + 9 * 4 * growth * growth)
            channels += growth
        if block < 2:
            macs += side * side * channels * (channels // 2)
            channels, side = channels // 2, side // 2
    assert gs.profile(build("densenet_bc100").eval(), (torch.zeros(1, 3, 32, 32),)).macs == macs + channels * 10


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_ghostnet_is_timms_network(width):
    timm = pytest.importorskip("timm")
    reference = alive(timm.create_model(f"ghostnet_{round(100 * width):03d}", pretrained=False))
    ours = build("ghostnet", width_mult=width).eval()
    want, names = list(reference.state_dict().values()), list(ours.state_dict())
    assert [v.shape for v in want] == [v.shape for v in ours.state_dict().values()]
    ours.load_state_dict(dict(zip(names, want, strict=True)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(x), reference(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_small_images_end_at_4x4_or_8x8_and_any_width_runs(name):
    sides = []
    net = build(name, num_classes=5, in_channels=1, width_mult=0.3, small=True).eval()
    pool = next(m for m in net.modules() if isinstance(m, nn.AdaptiveAvgPool2d) and m not in _gates(net))
    pool.register_forward_hook(lambda m, given, out: sides.append(given[0].shape[-1]))
    with torch.no_grad():
        assert net(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert sides == [8 if name in ("densenet_bc100", "resnet8", "resnet20", "squeezenet1_0", "squeezenet1_1") else 4]


def _gates(net: nn.Module) -> set[nn.Module]:
    from gossamer.models import SqueezeExcite

    return {m.pool for m in net.modules() if isinstance(m, SqueezeExcite)}


@pytest.mark.parametrize("name", MODELS)
def test_wider_is_larger_and_arguments_are_checked(name):
    sizes = [params(build(name, width_mult=w)) for w in (0.25, 0.5, 0.75)]
    assert sizes[0] < sizes[1] < sizes[2]
    for bad in ({"width_mult": 0.0}, {"width_mult": float("nan")}, {"num_classes": 0}, {"in_channels": 0}):
        with pytest.raises(SourceError, match=f"{name} takes"):
            build(name, **bad)


def test_shufflenet_widths_between_the_published_ones_grow():
    sizes = [params(shufflenet_v2(width_mult=w)) for w in (0.1, 0.25, 0.4, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
