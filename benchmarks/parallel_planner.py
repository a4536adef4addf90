"""The planner held against measured steps of two processes, and what it predicts for up to 1,024.

    python benchmarks/parallel_planner.py measure --network mobilenet --splits ddp,2 tp,2 pp,2 --steps 8
    python benchmarks/parallel_planner.py curve --picture docs/parallel-scaling.png

`measure` first times this machine: a product of matrices, a copy, messages between two gloo processes, and one step in one process, by which the
compute part of the model is scaled to its CPU seconds (the factor is printed). Then it trains with `gossamer.fit` in two processes of one thread each, and compares CPU
seconds of the first process (median) and its fastest step with the prediction: others may use the machine, too. What was timed is kept in the folder. `curve` measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, replace
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
from gossamer.parallel.planning.costs import BACKWARD
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


def step_seconds(kind: str, parallel: Parallel | None, steps: int) -> list[tuple[float, float]]:
    """Wall and CPU seconds of each step but the first two."""
    model, side, size = network(kind)
    ticks: list[tuple[float, float]] = []

    def tick(*_: int) -> None:
        ticks.append((time.perf_counter(), time.process_time()))

    gs.fit(model, batches(side, size, steps), optimizer="sgd", parallel=parallel, progress=tick)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ticks[1:])]


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


def spawned(kind: str, parallel: Parallel | None, steps: int, folder: Path) -> list[Any]:
    out, store = folder / "out", folder / "store"
    store.unlink(missing_ok=True)
    mp.spawn(in_process, (2, str(store), kind, parallel, steps, str(out)), 2)
    found: list[Any] = torch.load(out)
    return found


def link(rank: int) -> list[float]:
    """Bytes a second of large messages, and seconds of a short one."""
    times: dict[int, list[float]] = {}
    for size in (2**22, 1):
        x = torch.zeros(size)
        for _ in range(40):
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
    a, b, x, y = torch.randn(512, 512), torch.randn(512, 512), torch.randn(2**20), torch.empty(2**20)
    flops = 2 * 512**3 / best_of(lambda: a @ b, 60)
    memory = 2 * x.numel() * 4 / best_of(lambda: y.copy_(x), 60)
    bandwidth, latency = spawned("", None, 0, folder)
    launch = best_of(started, 20) / (100 * (1 + BACKWARD))
    return Machine(flops=flops, memory_bandwidth=memory, bandwidth=bandwidth, latency_s=latency, launch_s=launch)


def started() -> None:
    """A hundred operations that do next to nothing, forward and backward."""
    x = torch.zeros(8, requires_grad=True)
    y = x
    for _ in range(100):
        y = y.sigmoid()
    y.sum().backward()


def measure(kind: str, splits: list[str], steps: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{kind}.json"
    if not kept.exists():
        torch.set_num_threads(1)
        kept.write_text(json.dumps([asdict(this_machine(folder)), statistics.median(cpu for _, cpu in step_seconds(kind, None, steps))]))
    known, one = json.loads(kept.read_text())
    machine = Machine(**known)
    model, side, size = network(kind)
    planner = Planner(model, (torch.randn(2, 3, side, side),), optimizer="sgd")
    raw = planner.split(Parallel(), size, machine, None)
    assert not isinstance(raw, str)
    still = planner.split(Parallel(), size, replace(machine, flops=1e30, memory_bandwidth=1e30), None)
    assert not isinstance(still, str)
    factor = (one - still.seconds) / (raw.seconds - still.seconds)
    print(f"{processor()}, torch {torch.__version__}, one thread a process, gloo over loopback; {kind}, batch {size}, {steps} steps")
    print(
        f"measured: {machine.flops / 1e9:.1f} Gflop/s in products, {machine.memory_bandwidth / 1e9:.1f} GB/s of copies, "
        f"{1e6 * machine.launch_s:.1f} us to start an operation, {machine.bandwidth / 1e9:.2f} GB/s and {1e6 * machine.latency_s:.0f} us between processes"
    )
    print(f"one process: {1e3 * raw.seconds:.0f} ms predicted from these, {1e3 * one:.0f} ms measured; compute is scaled by {factor:.2f}")
    scaled = replace(machine, flops=machine.flops / factor, memory_bandwidth=machine.memory_bandwidth / factor)
    head = ("split", "computing: predicted", "CPU", "error", "step: predicted", "wall", "error", "sent")
    print(" | ".join(head))
    for text in splits:
        parallel = Parallel.parse(text, world=2)
        if parallel.pipeline > 1:
            parallel = replace(parallel, microbatches=8)
        predicted = planner.split(parallel, size, scaled, 8)
        if isinstance(predicted, str):
            print(f"{text:10} {predicted}")
            continue
        found = spawned(kind, parallel, steps, folder)
        wall, cpu = min(w for w, _ in found), statistics.median(c for _, c in found)
        sent = sum(predicted.sent_bytes.values())
        computing, step = predicted.compute_seconds, predicted.seconds
        row = [text, f"{1e3 * computing:.0f} ms", f"{1e3 * cpu:.0f} ms", f"{computing / cpu - 1:+.0%}"]
        row += [f"{1e3 * step:.0f} ms", f"{1e3 * wall:.0f} ms", f"{step / wall - 1:+.0%}", f"{sent / 1e3:.0f} KB"]
        print(" | ".join(row), flush=True)


def curve(kind: str, picture: Path | None, least: int, most: int, folder: Path) -> None:
    if kind == "vit":
        from torchvision.models import vit_b_16

        model = vit_b_16()
    else:
        from torchvision.models import mobilenet_v2

        model = mobilenet_v2()
    planner = Planner(model, (torch.randn(2, 3, 224, 224),))
    print(f"{kind}: strong, {STRONG} samples a step in all; weak, {WEAK} for each process; simulated, {CLUSTER}")
    print("processes | strong: split | ms | efficiency | weak: split | ms | efficiency")
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"curve-{kind}.json"  # so that it can be made piece by piece
    points: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {"strong": {}, "weak": {}}
    for world in [2**k for k in range(11) if least <= 2**k <= most]:
        cells = [str(world)]
        for name, batch in (("strong", STRONG), ("weak", WEAK * world)):
            plan = planner.plan(world=world, batch_size=batch, machine=CLUSTER)
            best = plan.best
            if best is None:
                cells += ["does not fit", "", ""]
                continue
            points[name][str(world)] = best.efficiency
            cells += [degrees(best), f"{1e3 * best.seconds:.3g}", f"{best.efficiency:.1%}"]
        print(" | ".join(cells), flush=True)
    kept.write_text(json.dumps(points))
    if picture is not None:
        draw(kind, points, picture)


def draw(kind: str, points: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.14, 0.87, 0.72))
    for (name, line), colour in zip(points.items(), ("#c2410c", "#0f766e"), strict=True):
        xs = sorted(map(int, line))
        ys = [100 * line[str(x)] for x in xs]
        axes.plot(xs, ys, color=colour, lw=2, marker="o", ms=4)
        label = f"{STRONG} samples a step in all" if name == "strong" else f"{WEAK} samples for each process"
        at, move = (ys.index(max(ys)), (8, 4)) if name == "strong" else (len(xs) - 1, (-130, 30))
        axes.annotate(label, (xs[at], ys[at]), xytext=move, textcoords="offset points", color=colour, fontsize=9)
    axes.set_xscale("log", base=2)
    ticks = sorted({int(x) for line in points.values() for x in line})
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
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
    other.add_argument("--least", type=int, default=1)
    other.add_argument("--most", type=int, default=1024)
    other.add_argument("--folder", type=Path, default=Path("parallel-bench"))
    given = parser.parse_args()
    if given.command == "measure":
        measure(given.network, given.splits, given.steps, given.folder)
    else:
        curve(given.network, given.picture, given.least, given.most, given.folder)


if __name__ == "__main__":
    main()
