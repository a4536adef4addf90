"""Checkpoints under a budget: the peak that is measured, and a run that nobody can tell from the plain one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.errors import BudgetError, UsageError
from gossamer.training import fit
from gossamer.training.optimizers import make_optimizer
from gossamer.training.rematerialization import recomputing
from gossamer.training.rematerialization.allocations import Timeline, record
from gossamer.training.rematerialization.measure import Choice, Measured
from gossamer.training.rematerialization.place import place


def block(width: int, *, dropout: float = 0.0) -> nn.Sequential:
    conv = [nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU6(inplace=True)]
    return nn.Sequential(nn.Sequential(*conv), nn.Dropout(dropout), nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width))


class Residual(nn.Module):
    """Blocks in a row, with everything that a second pass could disturb: batch norm, dropout, in-place activations."""

    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(block(width, dropout=0.2) for _ in range(depth))
        self.cumulative = nn.BatchNorm2d(width, momentum=None)
        self.spectral = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(width, width, 1)), nn.ReLU())
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for b in self.blocks:
            x = x + b(x)
        return self.head(self.spectral(self.cumulative(x)).mean((2, 3)))


def batches(n: int = 2) -> list:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 24, 24, generator=g), torch.randint(5, (8,), generator=g)) for _ in range(n)]


def net() -> Residual:
    torch.manual_seed(0)
    return Residual()


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_gradients_statistics_and_random_numbers_are_those_of_the_plain_run(mode):
    x, y = batches(1)[0]

    def run(modes):
        model = net().train()
        torch.manual_seed(3)
        with recomputing(model, modes):
            nn.functional.cross_entropy(model(x), y).backward()
        return model, torch.get_rng_state()

    plain, state = run({})
    twice, again = run({f"blocks.{i}": mode for i in range(4)} | {"spectral": mode})
    same(plain, twice)
    assert torch.equal(state, again)
    for a, b in zip(plain.parameters(), twice.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert all("forward" not in m.__dict__ for m in twice.modules())


def test_nothing_is_computed_twice_in_eval_mode():
    model, calls = net().eval(), []
    model.blocks[0][0][0].register_forward_hook(lambda *_: calls.append(1))
    with recomputing(model, {"blocks.0": "full"}):
        model(batches(1)[0][0]).sum().backward()
    assert len(calls) == 1


@pytest.fixture(scope="module")
def plain():
    return fit(net(), batches(), epochs=2, lr=1e-2, measure_memory=True)


@pytest.mark.parametrize("part", [0.85, 0.7, 0.55])
def test_the_measured_peak_stays_within_the_budget_and_close_to_it_and_the_weights_are_the_plain_ones(plain, part):
    budget = int(part * plain.memory.peak_bytes)
    small = fit(net(), batches(), epochs=2, lr=1e-2, memory_budget=budget)
    assert small.memory.peak_bytes <= budget
    assert small.memory.peak_bytes >= 0.8 * budget
    assert small.memory.choices
    same(plain.model, small.model)
    assert plain.history[-1]["loss"] == small.history[-1]["loss"]
    assert "of the budget" in str(small.memory)


def test_the_peak_is_what_an_independent_count_of_the_allocator_says(plain):
    """All tensors of a step by hand: profile the whole, optimiser and weights included."""
    budget = int(0.7 * plain.memory.peak_bytes)
    small = fit(net(), batches(), epochs=2, lr=1e-2, memory_budget=budget)
    model = net().train()
    opt = make_optimizer(model)
    x, y = batches(1)[0]

    def step():
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad(set_to_none=True)

    step()
    alive = [*model.parameters(), *model.buffers(), x, y, *(t for s in opt.state.values() for t in s.values())]
    static = sum(t.numel() * t.element_size() for t in alive)
    with recomputing(model, small.memory.choices):
        peak = static + record(step, torch.device("cpu")).peak_bytes
    assert peak == pytest.approx(small.memory.peak_bytes, rel=0.05)


def test_a_budget_that_is_loose_changes_nothing(plain):
    loose = fit(net(), batches(), memory_budget="1GB")
    assert not loose.memory.choices
    assert loose.memory.peak_bytes == pytest.approx(plain.memory.plain_peak_bytes, rel=0.02)


def test_an_impossible_budget_names_the_smallest_peak_and_it_can_be_reached(plain):
    with pytest.raises(BudgetError, match=r"smallest peak that was reached is \d+ MB") as e:
        fit(Residual(64, 3), batches(), memory_budget="2MB")
    smallest = int(str(e.value).split("reached is ")[1].split(" MB")[0])
    reached = fit(Residual(64, 3), batches(), memory_budget=f"{smallest + 1}MB")
    assert reached.memory.peak_bytes <= (smallest + 1) * 10**6


@pytest.mark.parametrize(("budget", "message"), [("400", "with a unit"), ("4 apples", "unit"), (0, "above 0"), ("-1MB", "unit")])
def test_bad_budgets(budget, message):
    with pytest.raises(UsageError, match=message):
        fit(net(), batches(), memory_budget=budget)


def test_the_table_names_every_part(plain):
    text = str(plain.memory)
    for word in ("weights", "gradients", "optimiser state", "activations", "blocks", "stem", "peak, plain", "█"):
        assert word in text
    weights = sum(p.numel() * 4 for p in net().parameters())
    assert plain.memory.weight_bytes == plain.memory.gradient_bytes == weights
    assert plain.memory.optimizer_state_bytes == pytest.approx(2 * weights, rel=0.01)


def test_placing_equals_brute_force_on_small_problems():
    """Random savings, times and constraints: the integer program against all subsets."""
    from gossamer.training.rematerialization.allocations import Marks

    rng = np.random.default_rng(0)
    for _ in range(20):
        names = list("abcdef")
        marks = {n: Marks() for n in names}
        marks["e"].nested, marks["f"].nested = ["a", "b"], ["c"]
        choices = tuple(Choice(n, "full", int(rng.integers(1, 50)), float(rng.uniform(0.1, 1))) for n in names)
        intervals = tuple((int(rng.integers(60, 150)), frozenset(n for n in names if rng.random() < 0.7)) for _ in range(5))
        measured = Measured(choices, intervals, marks, Timeline(np.array([0]), np.array([150])), {})
        budget = float(rng.integers(40, 140))

        def fits(subset, intervals=intervals, budget=budget):
            blocks = {c.block for c in subset}
            if ({"a", "b"} & blocks and "e" in blocks) or {"c", "f"} <= blocks:
                return False
            return all(most - sum(c.saved_bytes for c in subset if c.block in d) <= budget for most, d in intervals)

        subsets = [s for n in range(7) for s in itertools.combinations(choices, n) if fits(s)]
        found = place(measured, budget)
        if not subsets:
            assert found is None
        else:
            best = min(sum(c.seconds for c in s) for s in subsets)
            assert fits(tuple(found))
            assert sum(c.seconds for c in found) == pytest.approx(best, rel=2e-3)


def test_checkpointing_works_with_distillation_and_taps_inside_a_block():
    from gossamer.distillation import Feature, distill

    teacher = net()
    options = {"features": [Feature("blocks.1.3", "blocks.1.3", "attention")], "epochs": 1, "lr": 1e-2}
    plain = distill(net(), teacher, batches(), measure_memory=True, **options)
    small = distill(net(), teacher, batches(), memory_budget=int(0.7 * plain.memory.peak_bytes), **options)
    assert small.memory.choices
    same(plain.model, small.model)


def test_gradients_are_freed_in_the_backward_pass_and_the_weights_are_the_plain_ones():
    wide = nn.Sequential(nn.Flatten(), *(nn.Linear(1728, 1728) for _ in range(3)), nn.Linear(1728, 5))
    for optimizer in ("adamw", "sgd", "adafactor"):
        plain = fit(wide, batches(), lr=1e-3, optimizer=optimizer, measure_memory=True)
        hooked = fit(wide, batches(), lr=1e-3, optimizer=optimizer, measure_memory=True, optimizer_in_backward=True)
        same(plain.model, hooked.model)
        assert hooked.memory.peak_bytes < plain.memory.peak_bytes - 1.5 * 1728**2 * 4
        assert all(not p._post_accumulate_grad_hooks for p in hooked.model.parameters())


def test_both_together_with_masks_held_after_each_step():
    def hold(model):
        model.stem.weight[0] = 0

    plain = fit(net(), batches(), lr=1e-2, after_step=hold)
    both = fit(net(), batches(), lr=1e-2, after_step=hold, optimizer_in_backward=True, memory_budget="8MB")
    same(plain.model, both.model)
    assert not both.model.stem.weight[0].any()


def test_gradients_of_earlier_batches_count_when_they_accumulate():
    wide = nn.Sequential(nn.Flatten(), nn.Linear(1728, 1728), nn.ReLU(), nn.Linear(1728, 5))
    one, many = (fit(wide, batches(), lr=1e-3, measure_memory=True, accumulate=n) for n in (1, 2))
    model, opt = wide.train(), make_optimizer(wide)
    (x, y), second = batches()

    def step():
        for a, b in ((x, y), second):
            nn.functional.cross_entropy(model(a), b).backward()
        opt.step()
        opt.zero_grad(set_to_none=True)

    step()
    alive = [*model.parameters(), x, y, *(t for s in opt.state.values() for t in s.values())]
    peak = sum(t.numel() * t.element_size() for t in alive) + record(step, torch.device("cpu")).peak_bytes
    assert many.memory.peak_bytes == pytest.approx(peak, rel=0.05)
    assert many.memory.peak_bytes > 1.1 * one.memory.peak_bytes
