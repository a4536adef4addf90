"""Fashion-MNIST: a small student of dense convolutions, taught by a ResNet with every loss, against plain training; three seeds.

    python benchmarks/distillation.py --out runs/distillation

Every run has the same data, epochs, learning rate and batch size; only the loss differs. Finished runs are kept in OUT and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import gossamer as gs
from gossamer.distillation import KD, Feature
from gossamer.models import resnet8
from gossamer.run_folder import load_weights, processor, save_weights


def student(width: int = 12) -> nn.Module:
    """Three convolutions, 1x28x28 in."""

    def block(i: int, o: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    w = width
    return nn.Sequential(
        block(1, w, 2), block(w, 2 * w, 2), block(2 * w, 4 * w, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10)
    )


def methods(teacher: nn.Module) -> dict[str, dict[str, object] | None]:
    """Name -> arguments of ``distill``; None is plain training."""
    last = [name for name, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d)][-1]
    return {
        "plain": None,
        "kd": {},
        "kd, alpha 0.5, tau 2": {"alpha": 0.5, "tau": 2.0},
        "kd, standardised logits": {"loss": "kd_standardized", "tau": 2.0},
        "dkd": {"loss": "dkd"},
        "dist": {"loss": "dist"},
        "nkd": {"loss": "nkd"},
        "self (no teacher)": {"loss": "self"},
        "kd + fitnet": {"loss": KD(), "features": [Feature("2", last, "fitnet", 0.1)]},
        "kd + attention": {"loss": KD(), "features": [Feature("2", last, "attention", 10.0)]},
        "kd + similarity": {"loss": KD(), "features": [Feature("2", last, "similarity", 100.0)]},
        "kd + rkd": {"loss": KD(), "features": [Feature("3", last, "rkd", 0.05)]},
    }


def tensors(dataset: object, n: int | None = None) -> TensorDataset:
    """Samples decoded once."""
    xs, ys = zip(*(dataset[i] for i in range(n or len(dataset))), strict=True)  # type: ignore[index,arg-type]
    return TensorDataset(torch.stack(xs), torch.tensor(ys))


def accuracy(model: nn.Module, data: DataLoader) -> float:
    """Top-1 in eval mode."""
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in data)
    return hits / len(data.dataset)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--teacher-epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="methods to run; default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    data = gs.load_data("fashion-mnist")
    assert data.train is not None
    train, held_out = tensors(data.train), tensors(data.val)
    val = DataLoader(held_out, batch_size=500)

    def loader() -> DataLoader:  # whole batches are indexed at once; fit seeds the order
        return DataLoader(train, sampler=BatchSampler(RandomSampler(train), 128, False), batch_size=None)

    torch.manual_seed(0)
    teacher = resnet8(in_channels=1)
    weights = options.out / "teacher.safetensors"
    if weights.exists():
        load_weights(teacher, weights)
    else:
        teacher = gs.fit(teacher, loader(), epochs=options.teacher_epochs, lr=1e-2).model
        save_weights(teacher, weights)
    results = options.out / "results.json"
    done = json.loads(results.read_text()) if results.exists() else {}
    done["teacher"] = [accuracy(teacher, val)]
    for seed in range(options.seeds):
        for name, how in methods(teacher).items():
            if len(done.get(name, [])) > seed or (options.only and name not in options.only):
                continue
            torch.manual_seed(seed)
            fresh = student()
            shared = {"epochs": options.epochs, "lr": 1e-2, "seed": seed}
            if how is None:
                trained = gs.fit(fresh, loader(), **shared)  # type: ignore[arg-type]
            else:
                cached = {} if how.get("features") or how.get("loss") == "self" else {"teacher_cache": options.out / "cache"}
                trained = gs.distill(fresh, teacher, loader(), **shared, **cached, **how)  # type: ignore[arg-type]
            done.setdefault(name, []).append(accuracy(trained.model, val))
            results.write_text(json.dumps(done, indent=1) + "\n")
            print(f"seed {seed}, {name}: {done[name][-1]:.2%}, {trained.seconds:.0f} s", flush=True)
    count = sum(p.numel() for p in student().parameters())
    print(f"\n{processor()}, 1 thread, torch {torch.__version__}; student {count} parameters, {options.epochs} epochs")
    print(f"teacher: {sum(p.numel() for p in teacher.parameters())} parameters, {done['teacher'][0]:.2%}\n")
    print("| training | top-1, mean | each seed | against plain |\n|---|---|---|---|")
    plain = statistics.mean(done["plain"])
    for name in methods(teacher):
        if name in done:
            mean = statistics.mean(done[name])
            print(f"| {name} | {mean:.2%} | {', '.join(f'{v:.2%}' for v in done[name])} | {100 * (mean - plain):+.2f} |")


if __name__ == "__main__":
    main()
