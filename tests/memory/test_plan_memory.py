"""Plans of whole networks: bytes by hand, the same outputs, and no byte that is read after its last use."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from networks import Attention, Branches, Dense, Random, again, block, livened, planned_mobilenet
from torch import nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.errors import BudgetError, ExportError, NothingToDo, UsageError
from gossamer.memory import ArenaModule


def agrees(model: nn.Module, inputs: tuple, plan: gs.MemoryPlan, tolerance: float = 1e-5) -> ArenaModule:
    """The compiled plan computes what the network does, whatever the bytes hold that are not in use."""
    compiled = plan.compile()
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(model(*inputs))
    for run in (compiled, compiled.run_poisoned, compiled):
        found = torch.utils._pytree.tree_leaves(run(*inputs))
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    return compiled


def test_bytes_of_a_chain_by_hand():
    net = nn.Sequential(block(3, 8), block(8, 16), nn.Conv2d(16, 4, 1)).eval()
    x = torch.rand(1, 3, 16, 16)
    plan = gs.plan_memory(net, (x,))
    unit = 16 * 16 * 4
    assert plan.arena_bytes == plan.lower_bound_bytes == plan.any_order_bound_bytes == (8 + 16) * unit
    assert plan.no_reuse_bytes == (3 + 3 * 8 + 3 * 16 + 4) * unit  # each convolution, norm and activation has a tensor of its own
    assert plan.optimal
    assert [s.kernel for s in plan.program.steps] == ["convolution"] * 3
    agrees(net, (x,), plan)


def test_a_residual_is_added_where_it_lies():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = block(8, 8), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

        def forward(self, x):
            return F.relu(x + self.b(self.a(x)))

    net, x = livened(Residual()), torch.rand(1, 8, 16, 16)
    unit = 8 * 16 * 16 * 4
    plan = gs.plan_memory(net, (x,))
    assert plan.arena_bytes == 2 * unit  # x and the middle; the sum lies on x
    assert len(plan.program.steps) == 2
    agrees(net, (x,), plan)
    assert again(plan, (x,), inplace=False).arena_bytes == 3 * unit


def test_what_is_read_again_is_not_written_over():
    class Twice(nn.Module):
        def forward(self, x):
            y = torch.sigmoid(x)
            return y * torch.tanh(y), x + y

    x = torch.randn(2, 5, 7)
    agrees(Twice(), (x,), gs.plan_memory(Twice(), (x,)))


def test_views_take_nothing():
    net = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 3, 16)), nn.Flatten(2), nn.Flatten())
    plan = gs.plan_memory(net, (torch.rand(2, 3, 8, 8),))
    assert plan.arena_bytes == 2 * 3 * 8 * 8 * 4
    assert not plan.program.steps


def test_concatenations_cost_nothing():
    net, x = livened(Dense()), torch.rand(1, 3, 16, 16)
    plan = gs.plan_memory(net, (x,))
    assert not [s for s in plan.program.steps if s.kernel == "copy"]
    unit = 16 * 16 * 4
    assert plan.lower_bound_bytes <= (16 + 4 * 8 + 32 + 8) * unit + (1 << 17)  # one slab, one thin tensor, one new part, one strip
    agrees(net, (x,), plan)


@pytest.mark.parametrize("seed", [0, 3, *(pytest.param(i, marks=pytest.mark.slow) for i in range(4, 40))])
def test_random_graphs(seed):
    net, x = livened(Random(seed)), torch.randn(2, 3, 9, 11)
    plan = gs.plan_memory(net, (x,))
    assert plan.any_order_bound_bytes <= plan.lower_bound_bytes <= plan.arena_bytes
    assert plan.lower_bound_bytes <= plan.given_order_bytes <= plan.no_reuse_bytes + 64 * 200
    spans = [(x.first, x.last, o, o + x.size) for x, o in zip(plan.lives, plan.offsets, strict=True)]
    for i, (a, b, low, high) in enumerate(spans):
        assert all(b < c or d < a or high <= e or f <= low for c, d, e, f in spans[:i])
    agrees(net, (x,), plan)
    assert plan.lower_bound_bytes <= again(plan, (x,), reorder=False).lower_bound_bytes


def test_a_wrong_plan_is_seen():
    net, x = livened(Random(3)), torch.randn(1, 3, 9, 11)
    plan = gs.plan_memory(net, (x,))
    seen = 0
    for i, life in enumerate(plan.lives):
        if life.first < 1 or life.last >= len(plan.program.steps) or life.scratch is not None:
            continue
        short = replace(life, last=life.last - 1) if life.last > life.first else life  # ends one step too early
        wrong = replace(plan, lives=(*plan.lives[:i], short, *plan.lives[i + 1 :])).compile()
        seen += short is not life and not all(torch.equal(a, b) for a, b in zip(wrong.run_poisoned(x), net(x), strict=True))
    assert seen >= 5


def test_reordering_lowers_the_peak():
    net, x = livened(Branches()), torch.rand(1, 3, 16, 16)
    plan = gs.plan_memory(net, (x,))
    given = again(plan, (x,), reorder=False)
    assert plan.arena_bytes < 0.6 * given.arena_bytes
    assert plan.given_order_bytes == given.lower_bound_bytes
    assert "Reordered" in str(plan)
    agrees(net, (x,), plan)
    agrees(net, (x,), given)


def test_transformers():
    net, x = Attention().eval(), torch.randn(2, 3, 16, 16)
    plan = gs.plan_memory(net, (x,))
    assert {"attention", "norm", "matrix"} <= {s.kernel for s in plan.program.steps}
    assert not plan.outside
    agrees(net, (x,), plan)


def test_an_operation_that_cannot_write_into_the_arena_is_named_and_counted():
    class Sorted(nn.Module):
        def forward(self, x):
            return torch.sort(F.relu(x), dim=-1)[0] + 1

    x = torch.randn(3, 40)
    plan = gs.plan_memory(Sorted(), (x,))
    assert plan.outside_bytes == 3 * 40 * (4 + 8)
    assert list(plan.outside) == ["sort (sort)"]
    assert "sort" in str(plan)
    agrees(Sorted(), (x,), plan)


def test_a_plan_of_mobilenet_is_not_above_the_published_bytes():
    _, _, plan = planned_mobilenet()
    assert plan.arena_bytes <= 5.743 * 2**20
    assert plan.any_order_bound_bytes == plan.arena_bytes
    data = json.loads(json.dumps(plan.to_json()))
    assert data["arena_bytes"] == max(t["offset"] + t["bytes"] for t in data["tensors"])
    assert len(data["steps"]) == len(plan.program.steps)
    table = str(plan)
    assert "6.02 MB" in table
    assert "features.2" in table
    assert all(len(line) <= 200 for line in table.splitlines())


def test_the_profile_says_what_the_plan_takes():
    net, x, plan = planned_mobilenet()
    assert gs.profile(net, (x,)).peak_activation_bytes == plan.arena_bytes
    small, x = gs.load_model("gossamer:resnet8").model.eval(), torch.rand(1, 3, 32, 32)
    assert gs.profile(small, (x,)).peak_activation_bytes == gs.plan_memory(small, (x,)).arena_bytes


def test_the_same_inputs_give_the_same_plan():
    x = torch.randn(1, 3, 9, 11)
    first, second = (gs.plan_memory(livened(Random(5, 6)), (x,)) for _ in range(2))
    assert first.to_json() == second.to_json()


def test_the_network_stays_as_it_is():
    net, x = Dense(), torch.rand(1, 3, 16, 16)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    gs.plan_memory(net, (x,)).compile()(x)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_picture(tmp_path):
    _, _, plan = planned_mobilenet()
    from PIL import Image

    with Image.open(plan.picture(tmp_path / "plan.png")) as picture:
        assert picture.size[0] > 1000
    with pytest.raises(UsageError, match=r"\.png"):
        plan.picture(tmp_path / "plan.txt")


def test_bad_input_is_one_line():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2)
    with pytest.raises(UsageError, match="example_inputs"):
        gs.plan_memory(net)
    with pytest.raises(UsageError, match=r"torch\.nn\.Module"):
        gs.plan_memory("net", (x,))
    with pytest.raises(UsageError, match="4x4"):
        gs.plan_memory(net, (x,), patches="1x1")
    with pytest.raises(NothingToDo, match="patch by patch"):
        gs.plan_memory(net, (x,), patches="auto")
    with pytest.raises(BudgetError, match="ram_budget"):
        gs.plan_memory(net, (x,), ram_budget=8)


def test_every_case_runs_or_says_why_not(case):
    model, inputs = case
    model = model.eval()
    if type(model).__qualname__.startswith("data_dependent_branch"):
        with pytest.raises(ExportError, match="branches on a tensor"):
            gs.plan_memory(model, inputs)
        return
    agrees(model, inputs, gs.plan_memory(model, inputs))
