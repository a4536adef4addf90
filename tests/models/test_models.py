"""Networks of gossamer's own against torchvision's, published counts, and their documented shapes."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from gossamer.errors import SourceError
from gossamer.models import MODELS, BasicResidual, DepthwiseSeparable, InvertedResidual, build, mobilenet_v2, resnet8, round_channels


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def conv_macs(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of convolutions and linear layers, counted by hooks."""
    total = 0

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal total
        total += out[0].numel() * module.weight[0].numel()  # type: ignore[index, operator, union-attr]

    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.register_forward_hook(count)
    model.eval()(x)
    return total


def test_mobilenet_v2_is_torchvisions_network():
    theirs = torchvision.models.mobilenet_v2(weights=None).eval()
    for m in theirs.modules():  # statistics that matter
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    ours = mobilenet_v2().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.4])
def test_widths_round_as_torchvision_rounds_them(width):
    theirs = torchvision.models.mobilenet_v2(width_mult=width)
    assert {k: v.shape for k, v in mobilenet_v2(width_mult=width).state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


def test_published_counts():
    net = mobilenet_v2()
    assert params(net) == 3_504_872
    assert conv_macs(net, torch.zeros(1, 3, 224, 224)) == 300_774_272  # the paper's 300 M
    assert params(mobilenet_v2(width_mult=0.5)) == params(torchvision.models.mobilenet_v2(width_mult=0.5))
    assert round(params(mobilenet_v2(width_mult=1.4)) / 1e6, 1) == 6.1  # the published 6.1 M (6.9 M with other rounding)


def test_channels_follow_the_published_rule():
    for wanted in range(1, 400):
        got = round_channels(wanted)
        assert got % 8 == 0
        assert got >= 0.9 * wanted
        assert abs(got - wanted) <= 8


def test_small_variant_ends_at_4x4_and_has_the_same_weights():
    net, full = mobilenet_v2(small=True, num_classes=10).eval(), mobilenet_v2(num_classes=10).eval()
    assert net.features(torch.zeros(1, 3, 32, 32)).shape == (1, 1280, 4, 4)
    assert full.features(torch.zeros(1, 3, 32, 32)).shape == (1, 1280, 1, 1)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in full.state_dict().items()}


@pytest.mark.parametrize(("side", "last"), [(8, 2), (28, 7), (32, 8)])
def test_resnet8_shapes(side, last):
    net = resnet8(num_classes=7, in_channels=1, width=8).eval()
    x = torch.zeros(2, 1, side, side)
    assert net.stages(net.stem(x)).shape == (2, 32, last, last)
    assert net(x).shape == (2, 7)


def test_resnet8_parameter_count_by_hand():
    w = 16

    def conv(i: int, o: int, k: int) -> int:
        return i * o * k * k + 2 * o

    want = conv(3, w, 3) + 2 * conv(w, w, 3)
    want += conv(w, 2 * w, 3) + conv(2 * w, 2 * w, 3) + conv(w, 2 * w, 1)
    want += conv(2 * w, 4 * w, 3) + conv(4 * w, 4 * w, 3) + conv(2 * w, 4 * w, 1)
    assert params(resnet8()) == want + 4 * w * 10 + 10


def test_inverted_residual_adds_its_input_only_where_shapes_agree():
    x = torch.randn(1, 8, 4, 4)
    block = InvertedResidual(8, 8).eval()
    with torch.no_grad():
        block.conv[-1].weight.zero_()
        assert torch.equal(block(x), x)
    assert not InvertedResidual(8, 8, stride=2).residual
    assert not InvertedResidual(8, 16).residual


def test_basic_residual_with_dead_branch_is_the_rectified_input():
    block = BasicResidual(8, 8).eval()
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        block.conv2[1].weight.zero_()
        assert torch.equal(block(x.clone()), x.relu())


def test_depthwise_separable_mixes_channels_only_pointwise():
    block = DepthwiseSeparable(4, 6).eval()
    assert block[0][0].weight.shape == (4, 1, 3, 3)
    assert block[1][0].weight.shape == (6, 4, 1, 1)


def test_every_model_trains_one_step_and_builds_from_its_name():
    for name in MODELS:
        net = build(name, num_classes=3, in_channels=2, width_mult=0.25)
        net(torch.randn(2, 2, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnt8", {}, "did you mean 'resnet8'"),
        ("resnet8", {"widht": 3}, "did you mean 'width'"),
        ("resnet8", {"width": "wide"}, "not of type int"),
        ("resnet8", {"width": 0}, "at least 1"),
        ("resnet8", {"width": True}, "not of type int"),
        ("mobilenet_v2", {"small": 1}, "not of type bool"),
        ("mobilenet_v2", {"width_mult": -1.0}, "width_mult > 0"),
        ("mobilenet_v2", {"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_names_and_options(name, options, message):
    with pytest.raises(SourceError, match=message):
        build(name, **options)
