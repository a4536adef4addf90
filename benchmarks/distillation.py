"""Fashion-MNIST: a small student of dense convolutions, taught by a ResNet with every loss, against plain training; three seeds.

    python benchmarks/distillation.py --out runs/distillation

Every run has the same data, epochs, learning rate and batch size; only the loss differs. Alpha and tau of one row are chosen on 5,000 training pictures that its
trials do not train on; no other row's are. Finished runs are kept in OUT and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

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


HELD_BACK = 5000
TRIED = [(0.9, 4.0), (0.5, 4.0), (0.9, 2.0), (0.5, 2.0)]
"""Alpha and tau of the row whose are chosen."""


def methods(teacher: nn.Module, chosen: tuple[float, float]) -> dict[str, dict[str, object] | None]:
    """Name -> arguments of ``distill``; None is plain training."""
    last = [name for name, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d)][-1]
    return {
        "plain": None,
        "kd": {},
        "kd, chosen": {"alpha": chosen[0], "tau": chosen[1]},
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

    def loader(part: Any = train) -> DataLoader:  # whole batches are indexed at once; fit seeds the order
        return DataLoader(part, sampler=BatchSampler(RandomSampler(part), 128, False), batch_size=None)

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

    def run(how: dict[str, object] | None, seed: int, batches: DataLoader) -> nn.Module:
        torch.manual_seed(seed)
        fresh, shared = student(), {"epochs": options.epochs, "lr": 1e-2, "seed": seed}
        if how is None:
            return gs.fit(fresh, batches, **shared).model  # type: ignore[arg-type]
        cached = {} if how.get("features") or how.get("loss") == "self" else {"teacher_cache": options.out / "cache"}
        return gs.distill(fresh, teacher, batches, **shared, **cached, **how).model  # type: ignore[arg-type]

    def record(name: str, value: float) -> None:
        done.setdefault(name, []).append(value)
        results.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{name}: {value:.2%}", flush=True)

    back = DataLoader(TensorDataset(*(t[-HELD_BACK:] for t in train.tensors)), batch_size=500)
    trials = {f"trial, alpha {a}, tau {t}": {"alpha": a, "tau": t} for a, t in TRIED}
    for name, how in trials.items():
        if name not in done:
            record(name, accuracy(run(how, options.seeds, loader(TensorDataset(*(t[:-HELD_BACK] for t in train.tensors)))), back))
    chosen = max(TRIED, key=lambda pair: done[f"trial, alpha {pair[0]}, tau {pair[1]}"][0])
    for seed in range(options.seeds):
        for name, how in methods(teacher, chosen).items():
            if len(done.get(name, [])) <= seed and (not options.only or name in options.only):
                record(name, accuracy(run(how, seed, loader()), val))
    count = sum(p.numel() for p in student().parameters())
    print(f"\n{processor()}, 1 thread, torch {torch.__version__}; student {count} parameters, {options.epochs} epochs")
    print(
        f"teacher: {sum(p.numel() for p in teacher.parameters())} parameters, {done['teacher'][0]:.2%}; chosen alpha {chosen[0]}, tau {chosen[1]}\n"
    )
    print("| training | top-1, mean | each seed | against plain |\n|---|---|---|---|")
    plain = statistics.mean(done["plain"])
    for name in methods(teacher, chosen):
        if name in done:
            mean = statistics.mean(done[name])
            print(f"| {name} | {mean:.2%} | {', '.join(f'{v:.2%}' for v in done[name])} | {100 * (mean - plain):+.2f} |")


if __name__ == "__main__":
    main()
