"""Memory of inference: torchvision's classification networks one by one, and a few side by side with other planners.

    memory.py zoo --results results.jsonl        every network: arena, bound, time to plan, difference to the original
    memory.py zoo --results results.jsonl --table    the table of docs/memory.md
    memory.py compare NETWORK ...                arena, eager, folded channels-last eager, ONNX Runtime, ExecuTorch

Random weights; 224 x 224, batch 1, one thread, float32. Seconds are CPU seconds. Bytes of eager runs are those of torch's allocator by its profiler, the input
included. ONNX Runtime's are what the process grows by while it runs, at most: its arena and its kernels' scratch, without weights. ExecuTorch's
are the planned buffers of its unlowered program: by its greedy planner, and with addresses from `gossamer.memory.executorch`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
HUGE = ("regnet_y_128gf", "vit_h_14")  # two and a half gigabytes of weights: tensors of one name and shape are one tensor in all blocks
PARTS = ("mobilenet_v2", "resnet50", "densenet121", "efficientnet_b0", "vit_b_16")


def regnet_y_128gf() -> nn.Module:
    """The network without weights; its block widths are computed with tensors, which need memory."""
    from torchvision.models.regnet import BlockParams, RegNet

    with torch.device("cpu"):
        params = BlockParams.from_init_params(depth=27, w_0=456, w_a=160.83, w_m=2.52, group_width=264, se_ratio=0.25)
    return RegNet(params, norm_layer=partial(nn.BatchNorm2d, eps=1e-05, momentum=0.1)).eval()


def filled(name: str, like: Tensor) -> Tensor:
    """Random values for a tensor without memory, such that signals neither vanish nor grow."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    if like.dim() > 1:
        value = torch.randn(like.shape) * (like.numel() // like.shape[0]) ** -0.5
    else:
        low, high = {"running_mean": (-0.1, 0.1), "running_var": (0.5, 2.0), "weight": (0.5, 1.5)}.get(name, (-0.2, 0.2))
        value = torch.empty(like.shape).uniform_(low, high)
    return nn.Parameter(value, requires_grad=False) if isinstance(like, nn.Parameter) else value


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A torchvision network whose norms and head do something, and an input."""
    import torchvision

    torch.manual_seed(0)
    if name in HUGE:
        with torch.device("meta"):
            net = regnet_y_128gf() if name == "regnet_y_128gf" else torchvision.models.get_model(name, weights=None).eval()
        shared: dict[Any, Any] = {}
        for m in net.modules():
            for store in (m._parameters, m._buffers):
                store.update({k: shared.setdefault((k, t.shape), t) for k, t in store.items() if t is not None})
        made = {id(t): filled(k, t) for (k, _), t in shared.items()}
        for m in net.modules():
            for store in (m._parameters, m._buffers):
                store.update({k: made[id(t)] for k, t in store.items() if t is not None})
        return net, torch.randn(1, 3, 224, 224)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    net = torchvision.models.get_model(name, weights=None, **options).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.uniform_(-0.2, 0.2)
    for p in net.parameters():
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.05)
    return net, torch.randn(1, 3, 224, 224)


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes from torch's allocator: the most at any moment, and all together."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        kept = run()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = total = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak, total = max(peak, live), total + max(0, event.nbytes())
    del kept
    return peak, total


def captured_here(net: nn.Module, x: Tensor) -> fx.GraphModule:
    """The network captured for this batch size only, which takes a third of the time."""
    from gossamer.trace import capture as capturing

    module: Any = capturing._export(copy.deepcopy(net), (x,), None).module(check_guards=False)
    graph = fx.GraphModule(module, module.graph)
    graph.meta.update(dynamic_batch=False, notes=())
    return graph


def one(name: str) -> dict[str, Any]:
    """One network planned, run and compared."""
    from gossamer.memory import plan as planning

    net, x = build(name)
    start = time.process_time()
    graph = captured_here(net, x)
    captured = time.process_time()
    plan = planning._plan(planning._Source(graph, None, True, True, None, None), [x])
    planned = time.process_time()
    with torch.no_grad():
        wanted = net(x)
    compiled = plan.compile()
    found, poisoned = compiled(x), compiled.run_poisoned(x)
    peak, total = allocated(lambda: compiled(x))
    ran = {"difference": float((found - wanted).abs().max() / wanted.abs().max()), "poison": bool(torch.equal(found, poisoned))}
    ran |= {"beside_peak": peak, "beside_total": total}
    return {
        "name": name,
        "arena": plan.arena_bytes,
        "bound": plan.lower_bound_bytes,
        "any_order": plan.any_order_bound_bytes,
        "given_order": plan.given_order_bytes,
        "no_reuse": plan.no_reuse_bytes,
        "optimal": plan.optimal,
        "method": plan.method,
        "steps": len(plan.program.steps),
        "outside": plan.outside,
        "capture_s": captured - start,
        "plan_s": planned - captured,
        **ran,
    }


def zoo(results: Path, names: list[str]) -> None:
    """Every network that is not in the results yet."""
    import torchvision

    done = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    for name in names or torchvision.models.list_models(module=torchvision.models):
        if name in done:
            continue
        try:
            row = one(name)
        except Exception as e:
            row = {"name": name, "error": f"{type(e).__name__}: {str(e).splitlines()[0]}"[:300]}
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def table(results: Path) -> str:
    """Results as Markdown."""
    rows = sorted((json.loads(line) for line in results.read_text().splitlines()), key=lambda r: r["name"])
    good = [r for r in rows if "error" not in r]
    ran = [r for r in good if "difference" in r]
    exact = sum(r["arena"] == r["bound"] for r in good)
    lines = [
        f"{len(good)} of {len(rows)} networks are planned, {len(ran)} of them run and agree; the arena equals the bound of its order on {exact} of them, and "
        f"{sum(r['bound'] <= r['any_order'] for r in good)} orders are proved the best. "
        f"Planning takes {statistics.median(r['plan_s'] for r in good):.2f} s at the median, {max(r['plan_s'] for r in good):.2f} s at most, after "
        f"capture ({statistics.median(r['capture_s'] for r in good):.1f} s at the median). Largest relative difference to the original "
        f"{max(r['difference'] for r in ran):.1e}; {sum(r['poison'] for r in ran)} of {len(ran)} poisoned runs give the same bytes. "
        f"Beside the arena a run takes {max(r['beside_peak'] for r in ran) / 1024:.0f} KiB at most.",
        "",
        "| network | no reuse | bound, any order | bound | arena | how | plan, s | difference | beside the arena, KiB at once / in all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['name']} | | | | | **{r['error']}** | | | |")
            continue
        mib = [f"{r[k] / MIB:.3f}" for k in ("no_reuse", "any_order", "bound", "arena")]
        if "difference" not in r:
            lines.append(f"| {r['name']} | {' | '.join(mib)} | {r['method']} | {r['plan_s']:.2f} | not run | |")
            continue
        beside = f"{r['beside_peak'] / 1024:.0f} / {r['beside_total'] / 1024:.0f}"
        lines.append(f"| {r['name']} | {' | '.join(mib)} | {r['method']} | {r['plan_s']:.2f} | {r['difference']:.0e} | {beside} |")
    return "\n".join(lines)


# --- side by side


def folded(net: nn.Module) -> nn.Module:
    """Batch norms folded by torch.fx, channels-last."""
    from torch.fx.experimental.optimization import fuse

    made = copy.deepcopy(net)
    with contextlib.suppress(Exception):  # no norm to fold where the network cannot be traced
        made = fuse(made)
    return made.to(memory_format=torch.channels_last)


ORT = """
import ctypes, re, sys
import numpy as np
import onnxruntime as ort

def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

o = ort.SessionOptions()
o.intra_op_num_threads = 1
s = ort.InferenceSession(sys.argv[1], o, providers=["CPUExecutionProvider"])
feed = {s.get_inputs()[0].name: np.random.randn(1, 3, 224, 224).astype(np.float32)}
ctypes.CDLL("libc.so.6").malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
for _ in range(3):
    s.run(None, feed)
print(resident("VmHWM") - before + next(iter(feed.values())).nbytes)
"""


def onnxruntime_bytes(net: nn.Module, x: Tensor) -> int | None:
    """What a process grows by in three runs of ONNX Runtime, and the input."""
    import gossamer as gs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        gs.export(net, path, example_inputs=(x,))
        done = subprocess.run([sys.executable, "-c", ORT, str(path)], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else None


def executorch_bytes(net: nn.Module, x: Tensor) -> dict[str, int]:
    """Planned buffers of an unlowered ExecuTorch program, by its own greedy planner and by this package's; empty where it is not installed."""
    try:
        from executorch.exir import ExecutorchBackendConfig, to_edge
        from executorch.exir.passes import MemoryPlanningPass
    except ImportError:
        return {}
    from gossamer.memory.executorch import executorch_memory

    found = {}
    for key, planning in (
        ("executorch_bytes", MemoryPlanningPass()),
        ("executorch_apart_bytes", executorch_memory(inplace=False)),
        ("executorch_ours_bytes", executorch_memory()),
    ):
        program = to_edge(torch.export.export(net, (x,))).to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
        found[key] = sum(program.executorch_program.execution_plan[0].non_const_buffer_sizes)
    return found


def compare(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Bytes and times side by side; times interleaved, as ratios of the folded channels-last run of the same round."""
    import gossamer as gs

    rows = []
    for name in names:
        net, x = build(name)
        plan = gs.plan_memory(net, (x,))
        compiled, last = plan.compile(), folded(net)
        y = x.to(memory_format=torch.channels_last)
        row: dict[str, Any] = {"name": name, "arena": plan.arena_bytes, "bound": plan.lower_bound_bytes}
        runs: dict[str, Callable[[], Any]] = {
            "eager": partial(net, x),
            "folded": partial(last, y),
            "arena": partial(compiled, x),
        }
        try:
            patched = gs.plan_memory(net, (x,), patches="auto")
            row |= {"patches": patched.arena_bytes, "grid": patched.patching.grid, "recomputed": patched.patching.recomputed}
            runs["patches"] = partial(patched.compile(), x)
        except gs.errors.NothingToDo as e:
            row["patches_error"] = str(e)
        with torch.no_grad():
            for key in ("eager", "folded"):
                runs[key]()
                row[f"{key}_bytes"] = allocated(runs[key])[0] + x.nbytes
            times: dict[str, list[float]] = {k: [] for k in runs}
            for _ in range(rounds):
                for key, run in runs.items():
                    start = time.process_time()
                    run()
                    times[key].append(time.process_time() - start)
        base = times["folded"]
        row["folded_ms"] = 1e3 * statistics.median(base)
        for key, values in times.items():
            ratios = sorted(v / b for v, b in zip(values, base, strict=True))
            row[f"{key}_time"] = [statistics.median(ratios), ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]]
        row["onnxruntime_bytes"] = onnxruntime_bytes(net, x)
        row |= executorch_bytes(net, x)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def compare_table(rows: list[dict[str, Any]]) -> str:
    """The comparison as Markdown."""
    lines = [
        "| network | arena | in patches (grid, more MACs) | eager | folded, channels-last | ONNX Runtime | ExecuTorch | ExecuTorch with our plan | time: eager | arena | in patches |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:

        def mib(key: str, r: dict[str, Any] = r) -> str:
            return f"{r[key] / MIB:.2f}" if r.get(key) else "–"

        def ratio(key: str, r: dict[str, Any] = r) -> str:
            t = r.get(f"{key}_time")
            return f"{t[0]:.2f} ({t[1]:.2f} to {t[2]:.2f})" if t else "–"

        patches = f"{mib('patches')} ({r['grid'][0]} x {r['grid'][1]}, {r['recomputed']:.1%})" if "patches" in r else "–"
        cells = [
            r["name"],
            mib("arena"),
            patches,
            *(mib(k) for k in ("eager_bytes", "folded_bytes", "onnxruntime_bytes", "executorch_bytes", "executorch_ours_bytes")),
        ]
        lines.append("| " + " | ".join([*cells, ratio("eager"), ratio("arena"), ratio("patches")]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["zoo", "compare"])
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--results", type=Path, default=Path("memory.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of what is in --results")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.table:
        print(table(args.results) if args.what == "zoo" else compare_table([json.loads(s) for s in args.results.read_text().splitlines()]))
    elif args.what == "zoo":
        zoo(args.results, args.networks)
    else:
        print(compare_table(compare(args.networks or list(PARTS), args.rounds)))


if __name__ == "__main__":
    main()
