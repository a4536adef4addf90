"""Zeros, shared weights and the bytes they save: accuracy against sparsity while training, without training, and Deep Compression.

python benchmarks/sparsity.py schedules --out runs/sparsity            # Fashion-MNIST: one-shot, gradual, regrown; finished runs are kept
python benchmarks/sparsity.py deep-compression --out runs/sparsity     # Fashion-MNIST: prune, share, code, fine-tuning between
python benchmarks/sparsity.py photographs                              # pretrained MobileNetV2, no training, half of the weights
python benchmarks/sparsity.py projections                              # ten million weights
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import gossamer as gs
from distillation import accuracy, tensors
from gossamer.models.blocks import BasicResidual, ConvBNAct, InvertedResidual
from gossamer.run_folder import load_weights, processor, save_weights
from gossamer.sparsity import l0_project, l1_project, train_sparse

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)


def resnet() -> nn.Module:
    """Residual blocks on 14x14, 7x7 and 4x4."""
    blocks = [BasicResidual(16, 32), BasicResidual(32, 64, stride=2), BasicResidual(64, 64, stride=2)]
    return nn.Sequential(ConvBNAct(1, 16, stride=2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mobilenet() -> nn.Module:
    """Inverted residuals on 14x14 and 7x7."""
    blocks = [
        InvertedResidual(16, 24, stride=1, expand=4),
        InvertedResidual(24, 24, stride=1, expand=4),
        InvertedResidual(24, 40, stride=2, expand=4),
        InvertedResidual(40, 40, stride=1, expand=4),
    ]
    head = [ConvBNAct(40, 160, kernel=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, 10)]
    return nn.Sequential(ConvBNAct(1, 16, stride=2), *blocks, *head)


def lenet() -> nn.Module:
    """LeNet-300-100, which the paper on Deep Compression begins with."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet": resnet, "mobilenet": mobilenet}
COMPRESSED: dict[str, Callable[[], nn.Module]] = {"lenet": lenet, "resnet": resnet}
METHODS: dict[str, dict[str, Any]] = {
    "one-shot": {"schedule": "one_shot"},
    "gradual": {"schedule": "cubic"},
    "regrown": {"schedule": "cubic", "regrow": "gradient"},
}


class Fashion:
    """The data, decoded once, and networks trained on it, kept in a folder."""

    def __init__(self, out: Path, samples: int | None = None) -> None:
        self.out, self.samples = out, samples
        out.mkdir(parents=True, exist_ok=True)
        data = gs.load_data("fashion-mnist")
        assert data.train is not None
        self._train = tensors(data.train, samples)
        self.val = DataLoader(tensors(data.val), batch_size=500)

    def loader(self) -> DataLoader:
        return DataLoader(self._train, sampler=BatchSampler(RandomSampler(self._train), 128, False), batch_size=None)

    def trained(self, name: str, seed: int, epochs: int = 8) -> nn.Module:
        torch.manual_seed(seed)
        network, file = (NETWORKS | COMPRESSED)[name](), self.out / f"{name}-{seed}-{self.samples or 'all'}.safetensors"
        if file.exists():
            return load_weights(network, file)
        network = gs.fit(network, self.loader(), epochs=epochs, lr=1e-2, seed=seed).model
        save_weights(network, file)
        return network


def schedules(options: argparse.Namespace) -> None:
    """Accuracy against sparsity; every method trains as long as the others, from the same dense network."""
    fashion = Fashion(options.out, options.samples)
    results = options.out / "schedules.json"
    done = json.loads(results.read_text()) if results.exists() else {}
    for seed in range(options.seeds):
        for name in NETWORKS:
            dense = fashion.trained(name, seed)
            done.setdefault(f"{name} dense", {})[str(seed)] = accuracy(dense, fashion.val)
            for sparsity in SPARSITIES:
                for method, how in METHODS.items():
                    key = f"{name} {method} {sparsity}"
                    if str(seed) in done.get(key, {}):
                        continue
                    made = train_sparse(dense, fashion.loader(), sparsity=sparsity, epochs=options.epochs, lr=5e-3, seed=seed, **how)
                    done.setdefault(key, {})[str(seed)] = accuracy(made.model, fashion.val)
                    results.write_text(json.dumps(done, indent=1) + "\n")
                    print(f"seed {seed}, {key}: {done[key][str(seed)]:.2%}", flush=True)
    print(
        f"\n{processor()}, 1 thread, torch {torch.__version__}; "
        f"{options.samples or 60_000} training samples, {options.epochs} epochs after 8 dense ones, {options.seeds} seeds\n"
    )
    for name in NETWORKS:
        mean = statistics.mean(done[f"{name} dense"].values())
        print(f"{name}, {sum(p.numel() for p in NETWORKS[name]().parameters())} parameters, dense {mean:.2%}\n")
        print("| zeros | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS))
        for sparsity in SPARSITIES:
            cells = [list(done[f"{name} {m} {sparsity}"].values()) for m in METHODS]
            print(f"| {sparsity:.0%} | " + " | ".join(f"{statistics.mean(c):.2%} ({min(c):.2%} to {max(c):.2%})" for c in cells) + " |")
        print()


def deep_compression(options: argparse.Namespace) -> None:
    """Prune, share, code; the file against the float32 one, and the accuracy of what is loaded back."""
    fashion = Fashion(options.out, options.samples)
    for name in COMPRESSED:
        dense = fashion.trained(name, 0)
        plain = save_weights(dense, options.out / f"{name}-dense.safetensors").stat().st_size
        for sparsity, bits in ((0.85, 4), (0.9, 4), (0.95, 4)):
            how = {"scope": "global", "schedule": "cubic", "epochs": 2 * options.epochs, "lr": 2e-3}
            sparse = train_sparse(dense, fashion.loader(), sparsity=sparsity, example_inputs=(torch.zeros(1, 1, 28, 28),), **how)
            sparse = gs.distill(sparse, dense, fashion.loader(), epochs=options.epochs, lr=1e-3)
            shared = gs.distill(gs.cluster(sparse, bits=bits), dense, fashion.loader(), epochs=2, lr=5e-4)
            folder = options.out / f"{name}-{sparsity}-{bits}-{time.time_ns()}"
            shared.save(folder)
            back = gs.load(folder, dense)
            same = all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), shared.model.state_dict().values(), strict=True))
            size = (folder / "model.safetensors").stat().st_size
            drop = accuracy(dense, fashion.val) - accuracy(back, fashion.val)
            print(
                f"{name}: {accuracy(dense, fashion.val):.2%} dense, {sparsity:.0%} zeros, {bits} bits: {size} of {plain} bytes (1/{plain / size:.1f}), {100 * drop:+.2f} points lost, "
                f"loads bit for bit: {same}",
                flush=True,
            )


def photographs(options: argparse.Namespace) -> None:
    """Half of a pretrained network's weights, without training: top-1 and agreement in torch."""
    import _photographs

    sys.argv = [sys.argv[0], "--limit", str(options.limit)]
    task = _photographs.load(_photographs.arguments(__doc__ or ""))
    inputs = task.evaluation[0][0][:1]
    with torch.no_grad():
        original = [(task.model(x).argmax(1), y) for x, y in task.evaluation]
    n = sum(len(y) for _, y in original)
    print(f"{processor()}; {n} photographs, {sum(len(b[0]) for b in task.calibration)} for calibration; half of the weights of each layer")
    print(
        f"\n| criterion | scope | batch norms | top-1 | agreement | took |\n|---|---|---|---|---|---|\n| dense | | | {top1(original):.1%} | | |"
    )
    for criterion, scope in (
        ("magnitude", "layer"),
        ("magnitude", "global"),
        ("taylor", "layer"),
        ("fisher", "layer"),
        ("snip", "layer"),
        ("wanda", "layer"),
        ("wanda", "row"),
        ("second_order", "layer"),
    ):  # gradients of 100 labels say nothing about the classifier's other rows: they are compared within layers
        for reestimated in (False, True):
            started = time.perf_counter()
            made = gs.sparsify(
                task.model,
                sparsity=options.sparsity,
                scope=scope,
                criterion=criterion,
                calibration=task.calibration,
                example_inputs=(inputs,),
                reestimate_bn=reestimated,
            ).model
            took = time.perf_counter() - started
            with torch.no_grad():
                got = [made(x).argmax(1) for x, _ in task.evaluation]
            same = sum(int((g == o).sum()) for g, (o, _) in zip(got, original, strict=True)) / n
            hits = top1([(g, y) for g, (_, y) in zip(got, original, strict=True)])
            said = "re-estimated" if reestimated else "as they were"
            print(f"| {criterion} | {scope} | {said} | {hits:.1%} | {same:.1%} | {took:.0f} s |", flush=True)


def top1(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return sum(int((p == y).sum()) for p, y in pairs) / sum(len(y) for _, y in pairs)


def projections(options: argparse.Namespace) -> None:
    """Seconds for ten million weights."""
    w = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    total = float(w.abs().sum())
    rows = w.reshape(2500, 4000)
    print(f"{processor()}, 1 thread, torch {torch.__version__}; ten million weights, best and worst of 5\n")
    for name, run in (
        ("L0, 10% stay", lambda: l0_project(w, 1_000_000)),
        ("L1, a tenth of the norm", lambda: l1_project(w, 0.1 * total)),
        ("L1, half of the norm", lambda: l1_project(w, 0.5 * total)),
        ("L0, 2,500 rows", lambda: l0_project(rows, 400, dim=0)),
        ("L1, 2,500 rows", lambda: l1_project(rows, 0.1 * total / 2500, dim=0)),
    ):
        times = []
        for _ in range(5):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        print(f"{name}: {min(times):.2f} to {max(times):.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["schedules", "deep-compression", "photographs", "projections"])
    parser.add_argument("--out", type=Path, default=Path("runs/sparsity"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, help="training samples; default: all 60,000")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=400, help="photographs")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of the photographs' part")
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"schedules": schedules, "deep-compression": deep_compression, "photographs": photographs, "projections": projections}[options.part](
        options
    )


if __name__ == "__main__":
    main()
