"""The first stage patch by patch: the same outputs for strides, dilations, padding and odd sizes; budgets; what is computed twice."""

from __future__ import annotations

import pytest
import torch
from networks import again, block, livened, planned_mobilenet
from test_plan_memory import agrees
from torch import nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.errors import BudgetError, NothingToDo
from gossamer.memory.patches import parse_patches


class Residual(nn.Module):
    """A sum of a tensor and of what two convolutions make of it."""

    def __init__(self, c: int, hidden: int, d: int = 1) -> None:
        super().__init__()
        self.expand, self.deep = block(c, hidden, 1, act=nn.ReLU6()), block(hidden, hidden, 3, 1, hidden, d, act=nn.Hardswish())
        self.project = nn.Sequential(nn.Conv2d(hidden, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        return x + self.project(self.deep(self.expand(x)))


class Split(nn.Module):
    """Two branches that look differently far, one of them padded by a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(8, 8, 5), block(8, 8, 1)

    def forward(self, x):
        return self.a(x) * torch.sigmoid(self.b(x)) + F.avg_pool2d(self.b(x), 3, 1, 1)


def head(c: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 3)]


NETWORKS = {
    "strides": lambda: nn.Sequential(block(3, 8, 3, 2), block(8, 16, 5, 1), block(16, 16, 3, 2, 16), block(16, 32, 1), *head(32)),
    "dilations": lambda: nn.Sequential(block(3, 8, 3, 1, 1, 2), block(8, 16, 3, 2, 1, 3), nn.Conv2d(16, 16, 3, padding=0), *head(16)),
    "pooling": lambda: nn.Sequential(
        block(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1), block(8, 16), nn.AvgPool2d(2), nn.MaxPool2d(3, 1, 1, 1), *head(16)
    ),
    "residuals": lambda: nn.Sequential(block(3, 8, 3, 2), Residual(8, 24), Residual(8, 24, 2), block(8, 8, 3, 2), *head(8)),
    "branches": lambda: nn.Sequential(block(3, 8), Split(), block(8, 16, 3, 2), *head(16)),
    "norm first": lambda: nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), block(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), *head(16)
    ),
    "uneven": lambda: nn.Sequential(nn.Conv2d(3, 8, (3, 5), (2, 1), (1, 2)), nn.ReLU(), nn.Conv2d(8, 8, (1, 3), (1, 2), (0, 1)), *head(8)),
}


@pytest.mark.parametrize(
    "name", [n if n in ("pooling", "residuals", "branches") else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
)
def test_patches_change_nothing(name):
    net = livened(NETWORKS[name]())
    x = torch.randn(2, 3, 37, 42)
    whole = gs.plan_memory(net, (x,))
    for grid in ((2, 2), (3, 2), (1, 4)):
        plan = again(whole, (x,), patches=grid)
        assert plan.patching is not None
        assert plan.patching.grid == grid
        assert plan.patching.recomputed_macs >= 0
        agrees(net, (x,), plan)


def test_pixels_beyond_the_edge_are_what_the_convolution_pads_with():
    # a bias makes 1x1 outputs beyond the edge non-zero: they must not reach the 3x3 convolution
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), *head(4)).eval()
    nn.init.constant_(net[0].bias, 100.0)
    x = torch.randn(1, 3, 16, 16)
    agrees(net, (x,), gs.plan_memory(net, (x,), patches=(4, 4)), tolerance=1e-4)


def test_multiply_adds_computed_twice_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 16 * 16, 2)).eval()
    plan = gs.plan_memory(net, (torch.randn(1, 3, 16, 16),), patches=(2, 2))
    patching = plan.patching
    first, second, last = 3 * 8 * 9, 8 * 4 * 9, 4 * 256 * 2
    assert patching.macs == 256 * (first + second) + last
    assert patching.steps == 2  # four patches of 8 x 8 look at 10 x 10 pixels of the first convolution
    assert patching.recomputed_macs == first * (4 * 10 * 10 - 256)


def test_the_planner_chooses_for_a_budget():
    net = livened(NETWORKS["residuals"]())
    x = torch.randn(1, 3, 96, 96)
    whole = gs.plan_memory(net, (x,))
    smallest = again(whole, (x,), patches=(8, 8))
    budget = (2 * whole.arena_bytes + smallest.arena_bytes) // 3
    fits = again(whole, (x,), ram_budget=budget)
    assert fits.arena_bytes <= budget < whole.arena_bytes
    assert fits.patching.recomputed_macs <= smallest.patching.recomputed_macs
    agrees(net, (x,), fits)
    tight = gs.plan_memory(net, (x,), ram_budget=f"{int(smallest.arena_bytes / 1e3) + 1}kB")
    assert tight.patching.recomputed_macs >= fits.patching.recomputed_macs
    assert again(whole, (x,), ram_budget=whole.arena_bytes).patching is None
    with pytest.raises(BudgetError, match="smallest arena with patches takes"):
        again(whole, (x,), ram_budget=50_000)


def test_mobilenet_in_a_fifth_of_the_memory():
    net, x, whole = planned_mobilenet()
    plan = again(whole, (x,), patches="auto")
    assert plan.arena_bytes <= plan.input_bytes + 2**20
    assert plan.patching.recomputed <= 0.15
    assert plan.patching.without_bytes > 4 * plan.arena_bytes
    assert "4 x 4 patches" in str(plan)
    compiled = plan.compile()
    with torch.no_grad():
        wanted = net(x)
    torch.testing.assert_close(compiled(x), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(compiled.run_poisoned(x), compiled(x))


def test_what_cannot_run_in_patches_says_so():
    with pytest.raises(NothingToDo, match="patch by patch"):
        gs.plan_memory(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (torch.rand(1, 3, 2, 2),), patches="auto")
    flat = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2 * 64, 2))
    with pytest.raises(NothingToDo, match="give a grid"):
        gs.plan_memory(flat, (torch.rand(1, 3, 8, 8),), patches="auto")
    with pytest.raises(NothingToDo, match="9 x 9"):
        gs.plan_memory(flat, (torch.rand(1, 3, 8, 8),), patches=(9, 9))


def test_grids_are_read():
    assert parse_patches("3x4") == parse_patches((3, 4)) == (3, 4)
