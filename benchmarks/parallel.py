"""Data parallel training against one process: step time, bytes sent, memory of a process, and how far the weights are apart at the end.

    python benchmarks/parallel.py --steps 20 --ranks 2

Each process has one thread; two processes share the machine's cores with whatever else runs. Wall and CPU milliseconds are medians over the steps after the
first three, CPU of the first process. Bytes are what the loopback device sent, per process and step (gloo): run it under ``unshare -n`` with ``ip link set lo up``
where other programs use that device. Memory is the
allocator's peak of one process in those steps: weights, gradients, optimiser state and activations. "apart" is the largest difference of any parameter or
buffer from one process; the row "weights 1e-7 apart" is one process that began so, as a measure of what rounding alone does to this network.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import gossamer as gs
from gossamer.run_folder import processor
from gossamer.training.rematerialization.allocations import record

WARM = 3
KINDS = {"one process": None, "weights 1e-7 apart": None, "ddp": False, "fsdp": True}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        from torchvision.models import VisionTransformer

        return VisionTransformer(image_size=32, patch_size=4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10)
    from gossamer.models import mobilenet_v2

    return mobilenet_v2(num_classes=10, small=True, dropout=0.0)


def sent_bytes() -> int:
    """By the loopback device, since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    return 0


def train(name: str, kind: str, ranks: int, steps: int, batch: int, profiled: bool) -> dict[str, Any]:
    """One training on random images, in this process and, where ``kind`` says so, others."""
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(batch, 3, 32, 32, generator=g), torch.randint(10, (batch,), generator=g)) for _ in range(steps)]
    model = network(name)
    if "apart" in kind:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-7 * torch.randn(p.shape, generator=g))
    shard = KINDS[kind]
    parallel = gs.Parallel(data=ranks, shard=shard) if shard is not None else None
    marks: list[tuple[int, float, float, int]] = []

    def progress(_done: int, _total: int) -> None:
        marks.append((time.time_ns(), time.perf_counter(), time.process_time(), sent_bytes()))

    found: dict[str, Any] = {}

    def work() -> None:
        result = gs.fit(model, data, lr=1e-3, optimizer="sgd", parallel=parallel, progress=progress, channels_last=False)
        found["state"] = result.model.state_dict()

    if profiled:
        timeline = record(work, torch.device("cpu"))
        if marks:
            found["peak_mb"] = timeline.highest(marks[WARM][0], marks[-1][0]) / 1e6
        return found
    work()
    if marks:
        pairs = list(zip(marks[WARM:], marks[WARM + 1 :], strict=False))
        found["wall_ms"] = [1e3 * (b[1] - a[1]) for a, b in pairs]
        found["cpu_ms"] = [1e3 * (b[2] - a[2]) for a, b in pairs]
        found["sent_mb"] = statistics.median(b[3] - a[3] for a, b in pairs) / 1e6 / ranks
    return found


def child(rank: int, ranks: int, store: str, out: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    found = train(*arguments)
    if rank == 0:
        torch.save(found, out)
    if ranks > 1:
        dist.destroy_process_group()


def launch(ranks: int, *arguments: Any) -> dict[str, Any]:
    """What the first of several processes found."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out")
        processes = [spawn.Process(target=child, args=(r, ranks, str(Path(folder) / "store"), out, arguments)) for r in range(ranks)]
        for p in processes:
            p.start()
        for p in processes:
            p.join()
        assert all(p.exitcode == 0 for p in processes)
        found: dict[str, Any] = torch.load(out)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v2", "vit"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each kind, interleaved")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, batch {options.batch} in all, {options.ranks} processes")
    rows = []
    for name in options.networks:
        size = sum(p.numel() for p in network(name).parameters()) * 4 / 1e6
        kinds = {kind: KINDS[kind] for kind in KINDS if kind in options.kinds or kind == "one process"}
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind, shard in kinds.items():
                ranks = 1 if shard is None else options.ranks
                runs[kind].append(launch(ranks, name, kind, ranks, options.steps, options.batch, False))
        reference = runs["one process"][0]["state"]
        for kind, shard in kinds.items():
            ranks = 1 if shard is None else options.ranks
            apart = max(float((t.double() - reference[n].double()).abs().max()) for n, t in runs[kind][0]["state"].items())
            memory = launch(ranks, name, kind, ranks, 6, options.batch, True)["peak_mb"]
            wall = sorted(x for r in runs[kind] for x in r["wall_ms"])
            cpu = sorted(x for r in runs[kind] for x in r["cpu_ms"])
            rows.append(
                {
                    "network": f"{name} ({size:.1f} MB)",
                    "kind": kind,
                    "processes": ranks,
                    "wall_ms": statistics.median(wall),
                    "wall_p10_p90_ms": [wall[len(wall) // 10], wall[-1 - len(wall) // 10]],
                    "cpu_ms": statistics.median(cpu),
                    "sent_mb": statistics.median(r["sent_mb"] for r in runs[kind]) if ranks > 1 else 0.0,
                    "peak_mb": memory,
                    "apart": apart,
                }
            )
            r = rows[-1]
            low, high = r["wall_p10_p90_ms"]
            print(
                f"{r['network']:24} {kind:20} {ranks} wall {r['wall_ms']:7.1f} ms ({low:.0f} to {high:.0f})  cpu {r['cpu_ms']:7.1f} ms  "
                f"sent {r['sent_mb']:6.2f} MB  peak {memory:7.1f} MB  apart {apart:.1e}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
