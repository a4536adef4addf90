"""Peak memory and time of a training step of MobileNetV2 (224, batch 16): plain, gossamer's budgets, and what PyTorch offers.

    python benchmarks/training_memory.py --budgets 8 --rounds 7

Peaks are the allocator's, of weights, gradients, optimiser state, inputs and activations together. Times are CPU seconds of the one thread, interleaved,
as ratios of the plain step in the same round. "statistics" is the largest difference of the running statistics from those of the plain step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gossamer as gs
from gossamer.errors import BudgetError
from gossamer.run_folder import processor
from gossamer.training.rematerialization import recomputing
from gossamer.training.rematerialization.allocations import record


def network() -> nn.Module:
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    return mobilenet_v2().train().to(memory_format=torch.channels_last)


def head(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.classifier(x.mean((2, 3)))


def plain(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return head(model, model.features(x))


def every_block(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for block in model.features:
        x = checkpoint(block, x, use_reentrant=False)
    return head(model, x)


def sequential(segments: int) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    return lambda model, x: head(model, checkpoint_sequential(model.features, segments, x, use_reentrant=False))


class Case:
    """One way to make a step, on a network of its own."""

    def __init__(self, name: str, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor], choices: dict | None = None) -> None:
        self.name, self.forward, self.choices = name, forward, choices or {}
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-12, momentum=0.9)
        self.seconds: list[float] = []
        self.peak_bytes = 0

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        with recomputing(self.model, self.choices) if self.choices else nullcontext():
            torch.manual_seed(0)  # the classifier's dropout
            F.cross_entropy(self.forward(self.model, x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measure_peak(self, x: torch.Tensor, y: torch.Tensor) -> None:
        static = [*self.model.parameters(), *self.model.buffers(), x, y]
        static += [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        held = sum(t.numel() * t.element_size() for t in static)
        self.peak_bytes = held + record(lambda: self.step(x, y), torch.device("cpu")).peak_bytes

    def running(self) -> list[torch.Tensor]:
        return [b for n, b in self.model.named_buffers() if n.endswith(("mean", "var"))]


def compiled(budget: float) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """PyTorch's activation_memory_budget, which works on compiled graphs; the partitioner without code generation."""
    made: dict[int, Callable] = {}

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        import torch._functorch.config as config

        with config.patch(activation_memory_budget=budget, activation_memory_budget_runtime_estimator="flops"):
            if id(model) not in made:
                made[id(model)] = torch.compile(model, backend="aot_eager_decomp_partition")
            return made[id(model)](x)

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=int, default=8, help="budgets from 0.95 of plain down to the smallest reachable one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--no-compiled", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.batch, 3, 224, 224, generator=generator).contiguous(memory_format=torch.channels_last)
    y = torch.randint(1000, (options.batch,), generator=generator)

    def plan(budget: int | None) -> gs.training.rematerialization.MemoryReport:  # type: ignore[name-defined]
        arguments = {"memory_budget": budget, "measure_memory": True, "optimizer": "sgd", "lr": 1e-12}
        return gs.fit(network(), [(x, y)], **arguments).memory  # type: ignore[arg-type, return-value]

    whole = plan(None)
    print(f"{processor()}, 1 thread, torch {torch.__version__}, batch {options.batch}; plain peak {whole.peak_bytes / 1e6:.0f} MB\n")
    try:
        plan(whole.peak_bytes // 100)
    except BudgetError as e:
        smallest = int(str(e).split("reached is ")[1].split(" MB")[0]) * 10**6 + 10**6
    third = int(whole.peak_bytes / 2.7)
    grid = sorted({*np.linspace(smallest, 0.95 * whole.peak_bytes, options.budgets).astype(int).tolist(), third}, reverse=True)
    cases = [
        Case("plain", plain),
        Case("checkpoint each block", every_block),
        *(Case(f"checkpoint_sequential({n})", sequential(n)) for n in (2, 4)),
    ]
    if not options.no_compiled:
        cases += [Case(f"activation_memory_budget={b}", compiled(b)) for b in (0.5, 0.2)]
    for budget in grid:
        report = plan(budget)
        cases.append(Case(f"gossamer, {budget / 1e6:.0f} MB{' (1/2.7)' if budget == third else ''}", plain, dict(report.choices)))
        print(f"budget {budget / 1e6:.0f} MB: verified {report.peak_bytes / 1e6:.0f} MB, {len(report.choices)} blocks", flush=True)
    for case in list(cases):
        try:
            case.step(x, y)
            if case.name == "plain":
                want = [b.clone() for b in case.running()]
            case.difference = max(float((a - b).abs().max()) for a, b in zip(case.running(), want, strict=True))  # type: ignore[attr-defined]
            case.measure_peak(x, y)
        except Exception as e:  # a peer that fails is a row, not the end
            print(f"{case.name}: {type(e).__name__}: {str(e).splitlines()[0]}")
            cases.remove(case)
    for _ in range(options.rounds):
        for case in cases:
            started = time.process_time()
            case.step(x, y)
            case.seconds.append(time.process_time() - started)
    base = cases[0]
    print("\n| step | peak MB | of plain | time, plain = 1 (10th to 90th percentile) | statistics |\n|---|---|---|---|---|")
    for case in cases:
        ratios = [a / b for a, b in zip(case.seconds, base.seconds, strict=True)]
        low, high = np.percentile(ratios, [10, 90])
        times = f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
        print(
            f"| {case.name} | {case.peak_bytes / 1e6:.0f} | 1/{base.peak_bytes / case.peak_bytes:.2f} | {times} | {case.difference:.1e} |"
        )  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
