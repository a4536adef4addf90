"""The planner held against measured steps of two processes, and what it predicts for up to 1,024.

    python benchmarks/parallel_planner.py measure --network mobilenet --splits ddp,2 tp,2 pp,2 --steps 8
    python benchmarks/parallel_planner.py curve --picture docs/parallel-scaling.png

`measure` first times this machine: a product of matrices, a copy, messages between two gloo processes, and one step in one process, by which the
compute part of the model is scaled (the factor is printed). Then it trains with `gossamer.fit` in two processes of one thread each, and compares the
median step with the prediction. `curve` measures nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import gossamer as gs
from gossamer.parallel import Parallel
from gossamer.parallel.planning import Machine, Planner
from gossamer.parallel.planning.showing import degrees
from gossamer.report.picture import GRID, INK, QUIET
from gossamer.run_folder import processor

CLUSTER = Machine(flops=5e13, memory_bandwidth=1.5e12, bandwidth=25e9, latency_s=20e-6, memory_bytes=16 * 10**9)
"""What the curve assumes of each process."""

STRONG, WEAK = 4096, 64
"""Samples of a step over all processes; and for each process."""


def network(kind: str) -> tuple[nn.Module, int, int]:
    """A network, the side of its images, and a batch size."""
    torch.manual_seed(0)
    if kind == "vit":
        from torchvision.models import VisionTransformer

        return VisionTransformer(32, 4, 4, 4, 128, 512, num_classes=10), 32, 32
    from gossamer.models import mobilenet_v2

    return mobilenet_v2(num_classes=10, small=True, width_mult=0.5, dropout=0.0), 32, 32


def batches(side: int, size: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, side, side, generator=g), torch.randint(10, (size,), generator=g)) for _ in range(count)]


def step_seconds(kind: str, parallel: Parallel | None, steps: int) -> list[float]:
    """Seconds of each step but the first two."""
    model, side, size = network(kind)
    ticks: list[float] = []
    gs.fit(model, batches(side, size, steps), optimizer="sgd", parallel=parallel, progress=lambda *_: ticks.append(time.perf_counter()))
    return [b - a for a, b in pairwise(ticks[1:])]


def in_process(rank: int, world: int, store: str, kind: str, parallel: Parallel | None, steps: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    if parallel is None:
        found = link(rank)
    else:
        found = step_seconds(kind, parallel, steps)
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


def spawned(kind: str, parallel: Parallel | None, steps: int, folder: Path) -> list[float]:
    out, store = folder / "out", folder / "store"
    store.unlink(missing_ok=True)
    mp.spawn(in_process, (2, str(store), kind, parallel, steps, str(out)), 2)
    found: list[float] = torch.load(out)
    return found


def link(rank: int) -> list[float]:
    """Bytes a second of large messages, and seconds of a short one."""
    times: dict[int, list[float]] = {}
    for size in (2**22, 1):
        x = torch.zeros(size)
        for _ in range(12):
            dist.barrier()
            started = time.perf_counter()
            for _ in range(2):  # there and back
                dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
                dist.recv(x, 1) if rank == 0 else dist.send(x, 0)
            times.setdefault(size, []).append((time.perf_counter() - started) / 4)
    return [4 * 2**22 / min(times[2**22]), statistics.median(times[1])]


def best_of(work: Any, rounds: int = 5) -> float:
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def this_machine(folder: Path) -> Machine:
    torch.set_num_threads(1)
    a, b, big = torch.randn(512, 512), torch.randn(512, 512), torch.randn(2**24)
    flops = 2 * 512**3 / best_of(lambda: a @ b)
    memory = 2 * big.numel() * 4 / best_of(lambda: big.clone())
    bandwidth, latency = spawned("", None, 0, folder)
    return Machine(flops=flops, memory_bandwidth=memory, bandwidth=bandwidth, latency_s=latency)


def measure(kind: str, splits: list[str], steps: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    machine = this_machine(folder)
    model, side, size = network(kind)
    planner = Planner(model, (torch.randn(2, 3, side, side),), optimizer="sgd")
    one = statistics.median(step_seconds(kind, None, steps))
    raw = planner.split(Parallel(), size, machine, None)
    assert not isinstance(raw, str)
    factor = one / raw.seconds
    print(f"{processor()}, torch {torch.__version__}, one thread a process, gloo over loopback; {kind}, batch {size}, {steps} steps")
    print(
        f"measured: {machine.flops / 1e9:.1f} Gflop/s in products, {machine.memory_bandwidth / 1e9:.1f} GB/s of copies, "
        f"{machine.bandwidth / 1e9:.2f} GB/s and {1e6 * machine.latency_s:.0f} us between processes"
    )
    print(f"one process: {1e3 * raw.seconds:.0f} ms predicted from these, {1e3 * one:.0f} ms measured; compute is scaled by {factor:.2f}")
    scaled = replace(machine, flops=machine.flops / factor, memory_bandwidth=machine.memory_bandwidth / factor)
    print(f"{'split':10}{'predicted ms':>14}{'measured ms':>13}{'error':>8}{'sent KB':>10}")
    for text in splits:
        parallel = Parallel.parse(text, world=2)
        if parallel.pipeline > 1:
            parallel = replace(parallel, microbatches=8)
        predicted = planner.split(parallel, size, scaled, 8)
        if isinstance(predicted, str):
            print(f"{text:10} {predicted}")
            continue
        found = statistics.median(spawned(kind, parallel, steps, folder))
        sent = sum(predicted.sent_bytes.values())
        print(
            f"{text:10}{1e3 * predicted.seconds:14.0f}{1e3 * found:13.0f}{predicted.seconds / found - 1:8.0%}{sent / 1e3:10.0f}", flush=True
        )


def curve(kind: str, picture: Path | None, most: int) -> None:
    if kind == "vit":
        from torchvision.models import vit_b_16

        model = vit_b_16()
    else:
        from torchvision.models import mobilenet_v2

        model = mobilenet_v2()
    planner = Planner(model, (torch.randn(2, 3, 224, 224),))
    print(f"{kind}: strong, {STRONG} samples a step in all; weak, {WEAK} for each process; simulated, {CLUSTER}")
    print("processes | strong: split | ms | efficiency | weak: split | ms | efficiency")
    points: dict[str, list[tuple[int, float]]] = {"strong": [], "weak": []}
    for world in [2**k for k in range(11) if 2**k <= most]:
        cells = [str(world)]
        for name, batch in (("strong", STRONG), ("weak", WEAK * world)):
            plan = planner.plan(world=world, batch_size=batch, machine=CLUSTER)
            best = plan.best
            if best is None:
                cells += ["does not fit", "", ""]
                continue
            points[name].append((world, best.efficiency))
            cells += [degrees(best), f"{1e3 * best.seconds:.3g}", f"{best.efficiency:.1%}"]
        print(" | ".join(cells), flush=True)
    if picture is not None:
        draw(kind, points, picture)


def draw(kind: str, points: dict[str, list[tuple[int, float]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.14, 0.87, 0.72))
    for (name, line), colour in zip(points.items(), ("#c2410c", "#0f766e"), strict=True):
        xs, ys = [x for x, _ in line], [100 * y for _, y in line]
        axes.plot(xs, ys, color=colour, lw=2, marker="o", ms=4)
        label = f"{STRONG} samples a step in all" if name == "strong" else f"{WEAK} samples for each process"
        axes.annotate(label, (xs[len(xs) // 2], ys[len(xs) // 2]), xytext=(6, 8), textcoords="offset points", color=colour, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 105)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=QUIET)
    axes.set_xlabel("processes", color=QUIET)
    axes.set_ylabel("efficiency, %", color=QUIET)
    figure.text(0.09, 0.92, f"{kind}: the fastest split that fits, simulated", color=INK, fontsize=12)
    figure.savefig(path, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure")
    one.add_argument("--network", choices=("mobilenet", "vit"), default="mobilenet")
    one.add_argument("--splits", nargs="+", default=["ddp,2", "fsdp,2", "tp,2", "pp,2"])
    one.add_argument("--steps", type=int, default=10)
    one.add_argument("--folder", type=Path, default=Path("parallel-bench"))
    other = commands.add_parser("curve")
    other.add_argument("--network", choices=("mobilenet", "vit"), default="mobilenet")
    other.add_argument("--picture", type=Path)
    other.add_argument("--most", type=int, default=1024)
    given = parser.parse_args()
    if given.command == "measure":
        measure(given.network, given.splits, given.steps, given.folder)
    else:
        curve(given.network, given.picture, given.most)


if __name__ == "__main__":
    main()
