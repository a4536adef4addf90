"""Blocks against what their papers say in words, and all of them in one network through trace, pruning, int8 and ONNX."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import gossamer as gs
from gossamer.errors import SourceError
from gossamer.models import (
    BasicBlock,
    BasicResidual,
    Bottleneck,
    ChannelShuffle,
    ConvBNAct,
    DenseBlock,
    DepthwiseSeparable,
    Fire,
    GhostBottleneck,
    GhostModule,
    GroupedShuffle,
    InvertedResidual,
    InvertedResidualSE,
    ShuffleUnit,
    SqueezeExcite,
    Transition,
)
from gossamer.profiling import evaluate

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_a_shuffle_is_the_transpose_of_groups_and_is_undone_by_its_mate(groups):
    x = torch.randn(2, 12, 3, 3)
    y = ChannelShuffle(groups)(x)
    want = torch.stack([x[:, g * (12 // groups) + i] for i in range(12 // groups) for g in range(groups)], 1)
    assert torch.equal(y, want)
    assert torch.equal(ChannelShuffle(12 // groups)(y), x)


def test_every_output_of_two_grouped_convolutions_sees_every_input_only_with_the_shuffle():
    block = GroupedShuffle(16, 16, groups=4, middle=16).eval()
    for m in block.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.constant_(m.weight, 0.1)
    x = torch.rand(1, 16, 4, 4).requires_grad_()

    def seen() -> list[int]:
        out = block.block(x)
        return [int((torch.autograd.grad(out[0, c].sum(), x, retain_graph=True)[0].abs().sum((0, 2, 3)) > 0).sum()) for c in range(16)]

    assert seen() == [16] * 16
    block.block[1] = nn.Identity()
    assert seen() == [4] * 16


def test_squeeze_and_excite_by_hand():
    block = SqueezeExcite(8, 4)
    means = X.mean((2, 3))
    hidden = (means @ block.fc1.weight[:, :, 0, 0].T + block.fc1.bias).clamp(min=0)
    gates = ((hidden @ block.fc2.weight[:, :, 0, 0].T + block.fc2.bias) / 6 + 0.5).clamp(0, 1)
    assert torch.allclose(block(X), X * gates[:, :, None, None], atol=1e-6)


def test_a_fire_module_puts_1x1_before_3x3():
    block = Fire(8, 4, 6)
    squeezed = functional.conv2d(X, block.squeeze.weight, block.squeeze.bias).relu()
    small = functional.conv2d(squeezed, block.expand1x1.weight, block.expand1x1.bias).relu()
    large = functional.conv2d(squeezed, block.expand3x3.weight, block.expand3x3.bias, padding=1).relu()
    assert torch.allclose(block(X), torch.cat([small, large], 1), atol=1e-6)


def test_a_dense_block_keeps_its_input_in_front_and_its_layers_see_all_before():
    block = DenseBlock(8, 4, layers=3).eval()
    y = block(X)
    assert torch.equal(y[:, :8], X)
    assert [layer.conv1.in_channels for layer in block.values()] == [8, 12, 16]
    assert torch.allclose(y[:, 16:], block["denselayer3"](y[:, :16].clone()))
    assert Transition(20, 10).eval()(y).shape == (2, 10, 3, 3)


@pytest.mark.parametrize(("out", "ratio"), [(16, 2), (15, 2), (16, 3), (9, 4)])
def test_ghosts_are_cheap_copies_of_a_fraction(out, ratio):
    block = GhostModule(8, out, ratio=ratio).eval()
    y, own = block(X), -(-out // ratio)
    assert y.shape == (2, out, 6, 6)
    assert torch.equal(y[:, :own], block.primary(X))
    assert block.primary[0].weight.shape == (own, 8, 1, 1)
    assert torch.equal(y[:, own:], block.cheap(block.primary(X))[:, : out - own])


@pytest.mark.parametrize(
    "block",
    [
        BasicBlock(8, 8),
        BasicResidual(8, 8),
        Bottleneck(8, 8),
        GhostBottleneck(8, 8, middle=16),
        GroupedShuffle(8, 8, groups=2),
        InvertedResidual(8, 8),
        InvertedResidualSE(8, 8, middle=24),
    ],
    ids=lambda b: type(b).__name__,
)
def test_a_dead_branch_leaves_the_input(block):
    block.eval()
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms[-2:] if isinstance(block, GhostBottleneck) else norms[-1:]:
            nn.init.zeros_(norm.weight)
    rectified = isinstance(block, BasicBlock | BasicResidual | Bottleneck | GroupedShuffle)
    assert torch.allclose(block(X.clone()), X.relu() if rectified else X, atol=1e-6)


def test_a_shuffle_unit_passes_half_of_its_input_on():
    block = ShuffleUnit(8, 8).eval()
    assert torch.equal(block(X)[:, ::2], X[:, :4])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupedShuffle(8, 9, groups=2), "do not divide into 2 groups"),
        (lambda: GroupedShuffle(9, 8, groups=2), "do not divide into 2 groups"),
        (lambda: ShuffleUnit(8, 10), "equal at stride 1"),
        (lambda: ShuffleUnit(8, 9, stride=2), "an even number"),
    ],
)
def test_channels_that_do_not_fit_are_an_error(make, message):
    with pytest.raises(SourceError, match=message):
        make()


def every_block() -> nn.Module:
    """One network of all blocks, with statistics that matter."""
    net = nn.Sequential(
        ConvBNAct(3, 16),
        DepthwiseSeparable(16, 24),
        GroupedShuffle(24, 24, groups=3),
        InvertedResidual(24, 24, expand=2),
        InvertedResidualSE(24, 24, middle=48, kernel=5),
        BasicResidual(24, 24),
        BasicBlock(24, 32, stride=2),
        Bottleneck(32, 32),
        Fire(32, 8, 16),
        DenseBlock(32, 8, layers=2),
        Transition(48, 32),
        ShuffleUnit(32, 32),
        ShuffleUnit(32, 48, stride=2),
        GhostBottleneck(48, 48, middle=64, squeeze=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )
    net.train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.2)
            m.momentum = None
    with torch.no_grad():
        net(torch.randn(16, 3, 16, 16))
    return net.eval()


def test_all_blocks_trace_prune_and_export(tmp_path):
    net, x = every_block(), (torch.randn(4, 3, 16, 16),)
    with torch.no_grad():
        assert net(x[0]).std(0).min() > 1e-3, "pictures make a difference"
    assert not gs.channels(net, x).unvisited
    pruned = gs.prune(net, x, ratio=0.3)
    assert pruned.proof is not None and pruned.proof.holds
    assert pruned.after.params < 0.8 * pruned.before.params
    gs.export(pruned, tmp_path / "pruned.onnx")
    found = evaluate(tmp_path / "pruned.onnx", [torch.randn(8, 3, 16, 16)], reference=pruned.model)
    assert found.sqnr_db > 80


@pytest.mark.slow
def test_all_blocks_quantise_and_export(tmp_path):
    net, x = every_block(), (torch.randn(4, 3, 16, 16),)
    small = gs.quantize(net, x, calibration=[torch.randn(16, 3, 16, 16)])
    gs.export(small, tmp_path / "int8.onnx")
    found = evaluate(tmp_path / "int8.onnx", [torch.randn(64, 3, 16, 16)], reference=net)
    assert found.sqnr_db > 5  # some 45 layers of random weights; noise alone would be 0
    assert found.agreement > 0.5
