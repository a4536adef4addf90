"""The module that runs inside one buffer: batch sizes, threads, nesting, and what it takes from the allocator."""

from __future__ import annotations

import threading

import pytest
import torch
from networks import Attention, Dense, Random, livened, planned_mobilenet
from torch import nn
from watching import taken

import gossamer as gs
from gossamer.errors import UsageError
from gossamer.memory.kernels import convolutions

LIMIT = 64 << 10


@pytest.mark.parametrize(
    "make", [pytest.param(Dense, marks=pytest.mark.slow), Attention, pytest.param(lambda: Random(2), marks=pytest.mark.slow)]
)
def test_another_batch_size_is_planned_once(make):
    net = livened(make())
    compiled = gs.plan_memory(net, (torch.randn(1, 3, 16, 16),)).compile()
    for n in (1, 3, 1, 3):
        x = torch.randn(n, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)
    assert compiled.idle_arenas == 2
    with pytest.raises(UsageError, match="batch size"):
        compiled(torch.randn(1, 3, 8, 8))
    with pytest.raises(UsageError, match="1 inputs, not 2"):
        compiled(torch.randn(1, 3, 16, 16), torch.randn(1))


def test_threads_take_arenas_of_their_own():
    net = livened(Dense(2))
    compiled = gs.plan_memory(net, (torch.randn(1, 3, 24, 24),)).compile()
    inputs = [torch.randn(1, 3, 24, 24) for _ in range(6)]
    with torch.no_grad():
        wanted = [net(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.allclose(compiled(inputs[i]), wanted[i], atol=1e-5))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert 1 <= compiled.idle_arenas <= 6


def test_keyword_inputs_and_nested_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, a, b):
            return {"sum": a + b, "both": [self.fc(a), b * 2]}

    net = Net().eval()
    inputs = {"a": torch.randn(2, 4), "b": torch.randn(2, 4)}
    compiled = gs.plan_memory(net, inputs).compile()
    found, wanted = compiled(b=inputs["b"], a=inputs["a"]), net(**inputs)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(UsageError, match="keyword inputs a, b"):
        compiled(inputs["a"], inputs["b"])


def test_an_output_stays_what_it_was():
    net = livened(Dense(1))
    compiled = gs.plan_memory(net, (torch.randn(1, 3, 16, 16),)).compile()
    first = compiled(torch.randn(1, 3, 16, 16))
    kept = first.clone()
    compiled(torch.randn(1, 3, 16, 16))
    assert torch.equal(first, kept)


def test_it_only_infers():
    compiled = gs.plan_memory(nn.Linear(3, 2), (torch.randn(1, 3),)).compile()
    with pytest.raises(UsageError, match="only infers"):
        compiled.train()
    assert not compiled(torch.randn(1, 3)).requires_grad


@pytest.mark.skipif(not convolutions.onednn(), reason="without oneDNN, a test of its own")
@pytest.mark.parametrize(("make", "shape"), [(Attention, (1, 3, 64, 64)), (None, ())])
def test_a_run_takes_next_to_nothing_from_the_allocator(make, shape):
    net, x, plan = planned_mobilenet()
    if make is not None:
        net, x = livened(make()), torch.randn(shape)
        plan = gs.plan_memory(net, (x,))
    compiled = plan.compile()
    compiled(x)
    eager = taken(lambda: net(x))
    own = taken(lambda: compiled(x))
    assert own.peak < LIMIT
    assert eager.peak > 4 * LIMIT


def test_without_onednn_the_same_comes_out(monkeypatch):
    convolutions.onednn.cache_clear()
    monkeypatch.setattr(convolutions, "onednn", lambda: False)
    for make in (lambda: Dense(2), lambda: Random(1, 8)):
        net, x = livened(make()), torch.randn(2, 3, 10, 12)
        compiled = gs.plan_memory(net, (x,)).compile()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)
        assert taken(lambda c=compiled, x=x: c(x)).peak < LIMIT
