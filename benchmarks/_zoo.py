"""One network of a zoo: built, pruned by half, and checked; and the table of many such results."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

SUITES = ("torchvision", "segmentation", "detection", "video", "timm")
SECOND_SIZE = 2  # batch of the second run


def names(suite: str) -> list[str]:
    """Networks of a suite."""
    models = torchvision.models
    match suite:
        case "torchvision":
            return models.list_models(module=models)
        case "segmentation":
            return models.list_models(module=models.segmentation)
        case "video":
            return models.list_models(module=models.video)
        case "detection":
            return models.list_models(module=models.detection)
        case _:
            return timm_names()


def timm_names() -> list[str]:
    """Architectures of timm: of every module up to eleven of at most 20 million parameters, or its smallest."""
    return (Path(__file__).parent / "timm_names.txt").read_text().split()


def build(suite: str, name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network with random weights, and inputs of its own size."""
    torch.manual_seed(0)
    if suite == "timm":
        import timm

        net = timm.create_model(name, pretrained=False)
        size = net.default_cfg.get("test_input_size") if net.default_cfg.get("fixed_input_size") is None else None
        channels, *space = size or net.default_cfg["input_size"]
        return net.eval(), (torch.randn(1, channels, *space),)
    options: dict[str, Any] = {"weights": None}
    if suite == "segmentation" or suite == "detection":
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    if suite == "detection":
        net = torchvision.models.get_model(name, **options).backbone
        return net.eval(), (torch.randn(1, 3, 320, 320),)
    net = torchvision.models.get_model(name, **options)
    if suite == "video":
        frames = 16
        size = {"mvit_v1_b": 224, "mvit_v2_s": 224, "swin3d_t": 224, "swin3d_s": 224, "swin3d_b": 224, "s3d": 224}.get(name, 112)
        return net.eval(), (torch.randn(1, 3, frames, size, size),)
    size = {"inception_v3": 299}.get(name, 224)
    return net.eval(), (torch.randn(1, 3, size, size),)


def enliven(net: nn.Module) -> nn.Module:
    """Give every constant parameter and every batch norm's statistics values that differ, so that nothing is equal by chance."""
    with torch.no_grad():
        for p in net.parameters():
            if p.numel() > 1 and p.is_floating_point() and bool((p == p.flatten()[0]).all()):
                p.add_(torch.randn_like(p) * 0.1)
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
    return net


def clock(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives and how many seconds it took."""
    started = time.perf_counter()
    out = work()
    return out, time.perf_counter() - started


def peak_mb() -> float:
    """Largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def runs(net: nn.Module, inputs: tuple[Tensor, ...], *, training: bool) -> str:
    """Empty where a network runs in a mode, else the error."""
    net.train(training)
    try:
        with torch.no_grad():
            net(*(t.repeat(SECOND_SIZE, *[1] * (t.dim() - 1)) for t in inputs))
    except Exception as e:
        return f"{'train' if training else 'eval'} mode: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    return ""


def with_gossamer(net: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Half the channels, no configuration."""
    import gossamer as gs
    from gossamer.surgery import cut_once
    from gossamer.trace import trace

    traced, trace_s = clock(lambda: trace(net, inputs))
    removed = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    for g in traced.channels.groups:
        removed[g.classes[: len(g.classes) // 2]] = True
    _, surgery_s = clock(lambda: cut_once(net, traced, removed))
    result, prune_s = clock(lambda: gs.prune(net, inputs, ratio=0.5))
    proof = result.proof
    reasons: dict[str, int] = {}
    for g in traced.channels.frozen:
        reasons[g.frozen or ""] = reasons.get(g.frozen or "", 0) + 1
    return {
        "trace_s": trace_s,
        "surgery_s": surgery_s,
        "prune_s": prune_s,
        "groups": len(traced.channels.groups),
        "frozen": reasons,
        "inexact": len(proof.inexact),
        "proof": proof.difference,
        "notes": list(result.notes),
        "macs_before": result.before.macs,
        "macs_after": result.after.macs,
        "params_before": result.before.params,
        "params_after": result.after.params,
        "error": runs(result.model, inputs, training=False) or runs(result.model, inputs, training=True),
    }


def with_torch_pruning(net: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """The same with torch-pruning, which needs to be told which layer is the last."""
    import torch_pruning as tp

    from gossamer.trace import costs

    classes = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d) and 1000 in (m.weight.shape[0],)]
    target = copy.deepcopy(net)
    pairs = dict(zip(net.modules(), target.modules(), strict=True))

    def work() -> None:
        pruner = tp.pruner.MagnitudePruner(
            target, inputs, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=[pairs[m] for m in classes]
        )
        pruner.step()

    before = costs(net, inputs)
    _, prune_s = clock(work)
    after = costs(target.eval(), inputs)
    return {
        "prune_s": prune_s,
        "macs_before": before.macs,
        "macs_after": after.macs,
        "params_before": before.params,
        "params_after": after.params,
        "error": runs(target, inputs, training=False) or runs(target, inputs, training=True),
    }


def main(suite: str, name: str, tool: str) -> None:
    """One network; a line of JSON."""
    torch.set_num_threads(1)
    out: dict[str, Any] = {"suite": suite, "name": name, "tool": tool}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, inputs = build(suite, name)
        enliven(net)
        if tool == "gossamer":  # what importing takes is not counted
            import gossamer.pruning.prune
        else:
            import torch_pruning  # noqa: F401

            import gossamer.trace  # noqa: F401
        start = peak_mb()
        with torch.no_grad():
            times = [clock(lambda: net(*inputs))[1] for _ in range(3)]
        forward_mb = peak_mb() - start
        refused = runs(copy.deepcopy(net), inputs, training=True)
        out |= {"forward_s": statistics.median(times), "forward_mb": forward_mb}
        try:
            out |= (with_gossamer if tool == "gossamer" else with_torch_pruning)(net, inputs)
            if out["error"] and refused:  # the original does not train on this input either
                out["error"] = ""
            out["status"] = "works" if not out["error"] else "fails"
        except Exception as e:
            out |= {"status": "fails", "error": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:300]}
            with contextlib.suppress(Exception):
                from gossamer.trace import trace

                if tool == "gossamer":
                    out["frozen"] = {}
                    for g in trace(net, inputs).channels.frozen:
                        out["frozen"][g.frozen or ""] = out["frozen"].get(g.frozen or "", 0) + 1
        out["peak_mb"] = peak_mb() - start
    print(json.dumps(out))


OBVIOUS = ("the network's output", "reads the network's input", "a single class", "no layer produces", "no layer with weights")


def table(results: list[dict[str, Any]]) -> str:
    """Results as Markdown: a summary of each suite and tool, then a line for each network."""
    lines = [
        "# Model zoos",
        "",
        "Half of the channels of every network, `gs.prune(model, inputs, ratio=0.5)`, no configuration, random weights, each network at its own",
        "input size, one thread, in a process of its own. Generated by `benchmarks/pruning_zoo.py`; read `docs/how-it-works.md` for the terms.",
        "",
        "*Works* means that it ran in eval and in train mode at another batch size. *Proof* is the largest relative difference to the original",
        "whose removed channels have no outgoing weights, over the groups that are exact. *Trace* and *prune* are multiples of one forward pass of",
        "the same network in the same process; *prune* is everything, the proof included. *Memory* is the growth of the process over what it held",
        "with the network loaded, in MB, beside that of a plain forward pass. Collected on a shared machine of two cores, in several runs: ratios are",
        "of one process each, seconds are not to be compared between networks. torch-pruning ran on the same networks in the same runs, one after the",
        "other; a timeout is 100 to 300 s.",
        "",
    ]
    for suite in SUITES:
        for tool in ("gossamer", "torch-pruning"):
            rows = [r for r in results if r["suite"] == suite and r["tool"] == tool]
            if rows:
                lines += [*_summary(suite, tool, rows), ""]
    lines += [*_side_by_side(results), ""]
    for suite in SUITES:
        rows = [r for r in results if r["suite"] == suite and r["tool"] == "gossamer"]
        if rows:
            lines += [
                f"## {suite}",
                "",
                "| network | groups | frozen | inexact | MACs left | proof | trace | prune | memory | what is frozen, or why it fails |",
            ]
            lines += ["|---|---|---|---|---|---|---|---|---|---|", *map(_line, sorted(rows, key=lambda r: r["name"])), ""]
    return "\n".join(lines)


def _summary(suite: str, tool: str, rows: list[dict[str, Any]]) -> list[str]:
    works = [r for r in rows if r["status"] == "works"]
    left = [r["macs_after"] / r["macs_before"] for r in works]
    times = sorted(r["prune_s"] / r["forward_s"] for r in works)
    parts = [
        f"**{suite}, {tool}**: {len(works)} of {len(rows)} work, {sum(x <= 0.6 for x in left)} of them lose at least 40% of the MACs"
        f" (median left {statistics.median(left):.2f})",
        f"prune takes {statistics.median(times):.0f} forward passes at the median ({statistics.median(r['prune_s'] for r in works):.1f} s), {times[-1]:.0f} at most",
        f"memory grows by {statistics.median(r['peak_mb'] for r in works):.0f} MB at the median",
    ]
    if tool == "gossamer":
        traced = sorted(r["trace_s"] / r["forward_s"] for r in works)
        proofs = [r["proof"] for r in works if r["proof"] is not None]
        both = sorted((r["trace_s"] + r["surgery_s"]) / r["forward_s"] for r in works if "surgery_s" in r)
        if both:
            parts.insert(
                1, f"trace and surgery together take {statistics.median(both):.1f} forward passes at the median, {both[-1]:.1f} at most"
            )
        parts.insert(
            1,
            f"largest proof {max(proofs):.1e} over {len(proofs)} networks; trace takes {statistics.median(traced):.1f} forward passes, {traced[-1]:.1f} at most",
        )
    return ["; ".join(parts) + "."]


def _side_by_side(results: list[dict[str, Any]]) -> list[str]:
    """Time and memory of gossamer as multiples of torch-pruning's, over the networks that both can do."""
    works = {(r["suite"], r["name"], r["tool"]): r for r in results if r["status"] == "works"}
    pairs = [(r, works[s, n, "torch-pruning"]) for (s, n, t), r in works.items() if t == "gossamer" and (s, n, "torch-pruning") in works]
    pairs = [(mine, theirs) for mine, theirs in pairs if "surgery_s" in mine]
    if not pairs:
        return []
    cut = [(mine["trace_s"] + mine["surgery_s"]) / theirs["prune_s"] for mine, theirs in pairs]
    whole = [mine["prune_s"] / theirs["prune_s"] for mine, theirs in pairs]
    memory = [mine["peak_mb"] / theirs["peak_mb"] for mine, theirs in pairs if theirs["peak_mb"]]
    return [
        f"**Side by side**, {len(pairs)} networks that both tools can do, torch-pruning = 1: trace and surgery take {statistics.median(cut):.2f} of its time at the"
        f" median ({min(cut):.2f} to {max(cut):.1f}), everything with the proof {statistics.median(whole):.1f}; memory grows by {statistics.median(memory):.2f} of its growth."
    ]


def _line(r: dict[str, Any]) -> str:
    if r["status"] != "works":
        return f"| {r['name']} | | | | | | | | | **{r['status']}**: {r['error']} |"
    reasons = [(n, reason) for reason, n in r["frozen"].items() if not reason.startswith(OBVIOUS)]
    said = [f"{n} x {reason}" if n > 1 else reason for n, reason in reasons[:2]] + [n for n in r["notes"] if n.startswith("left in")][:1]
    more = f" (+{len(reasons) - 2} more)" if len(reasons) > 2 else ""
    proof = "nothing exact" if r["proof"] is None else f"{r['proof']:.0e}"
    return (
        f"| {r['name']} | {r['groups']} | {sum(r['frozen'].values())} | {r['inexact']} | {r['macs_after'] / r['macs_before']:.2f} | {proof} | "
        f"{r['trace_s'] / r['forward_s']:.1f} | {r['prune_s'] / r['forward_s']:.0f} | {r['peak_mb']:.0f} / {r['forward_mb']:.0f} | {'; '.join(said)}{more} |"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
