"""Reordering against every order there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from gossamer.memory import ordering
from gossamer.memory.liveness import lives, peak
from gossamer.memory.ordering import best_order, bound_over_orders, dependencies, reordered
from gossamer.memory.program import Program, Step, View


def random_program(seed: int, n: int) -> Program:
    """Steps that read one or two earlier buffers; some outputs may be written over an input; some buffers have two writers."""
    rng = np.random.default_rng(seed)
    sizes = {0: 64 * int(rng.integers(1, 5))}
    views = {0: View(0, (sizes[0] // 4,), (1,), 0, torch.float32)}
    steps = []
    for i in range(1, n + 1):
        reads = rng.choice(i, size=min(i, int(rng.integers(1, 3))), replace=False)
        sizes[i] = sizes[int(reads[0])] if rng.random() < 0.5 else 64 * int(rng.integers(1, 9))
        views[i] = View(i, (sizes[i] // 4,), (1,), 0, torch.float32)
        into = tuple(k for k, r in enumerate(reads) if sizes[int(r)] == sizes[i])
        scratch = 64 * int(rng.integers(0, 4)) if rng.random() < 0.3 else 0
        steps.append(Step(f"s{i}", "pointwise", tuple(views[int(r)] for r in reads), (views[i],), into=into, scratch=scratch))
    read = {v.buffer for s in steps for v in s.read_views()}
    outputs = tuple(views[i] for i in range(1, n + 1) if i not in read)
    return Program(tuple(steps), sizes, (views[0],), outputs, {i: str(i) for i in sizes}, {})


def height(program: Program, order: tuple[int, ...], inplace: bool) -> int:
    return peak(lives(reordered(program, order), inplace=inplace), len(order))


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_the_best_order_is_that_of_all_orders(seed, inplace):
    program = random_program(seed, 7)
    before = dependencies(program)
    orders = [o for o in itertools.permutations(range(7)) if all(set(o[: o.index(i)]) >= before[i] for i in range(7))]
    lowest = min(height(program, o, inplace) for o in orders)
    found = best_order(program, inplace=inplace)
    assert found.peak == height(program, found.order, inplace) == lowest
    assert found.exact
    assert bound_over_orders(program, inplace=inplace) <= lowest
    assert sorted(found.order) == list(range(7))
    assert all(before[i] <= set(found.order[:k]) for k, i in enumerate(found.order))


def test_orders_differ_in_these_programs():
    gains = [height(random_program(s, 7), tuple(range(7)), True) - best_order(random_program(s, 7)).peak for s in range(20)]
    assert sum(g > 0 for g in gains) >= 3


@pytest.mark.parametrize("seed", range(6))
def test_beam_search_is_never_worse_than_the_given_order(seed, monkeypatch):
    monkeypatch.setattr(ordering, "EXACT_STATES", 20)
    monkeypatch.setattr(ordering, "BEAM", 4)
    program = random_program(100 + seed, 24)
    found = best_order(program)
    assert found.peak == height(program, found.order, True) <= height(program, tuple(range(24)), True)
    assert found.bound <= found.peak
