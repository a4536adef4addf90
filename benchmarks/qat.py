"""Quantisation-aware training: accuracy on Fashion-MNIST in ONNX Runtime at few bits (`accuracy`), and what a step costs (`step`).

    python benchmarks/qat.py accuracy --out runs/qat --seeds 2
    python benchmarks/qat.py step

Finished runs are kept in OUT and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import gossamer as gs
from gossamer.distillation.objective import Distillation
from gossamer.models import resnet8
from gossamer.profiling import evaluate
from gossamer.quantization.training.norms import output_statistics
from gossamer.quantization.training.prepare import trainable
from gossamer.run_folder import load_weights, processor, save_weights
from gossamer.training.objectives import as_objective
from gossamer.training.optimizers import make_optimizer
from gossamer.training.stepping import Stepper

EXAMPLE = (torch.zeros(1, 1, 28, 28),)
SETTINGS = [(8, 8), (4, 8), (3, 8), (2, 8), (4, 4), (3, 3), (2, 2)]


def tensors(dataset: Any, n: int) -> TensorDataset:
    """Leading samples, decoded once."""
    xs, ys = zip(*(dataset[i] for i in range(n)), strict=True)
    return TensorDataset(torch.stack(xs), torch.tensor(ys))


def accuracy(options: argparse.Namespace) -> None:
    """Float, calibrated and trained networks, as exported files in ONNX Runtime."""
    options.out.mkdir(parents=True, exist_ok=True)
    data = gs.load_data("fashion-mnist")
    assert data.train is not None
    train, held_out = tensors(data.train, options.samples), tensors(data.val, len(data.val))
    val = [(held_out.tensors[0][i : i + 500], held_out.tensors[1][i : i + 500]) for i in range(0, len(held_out), 500)]
    kept = options.out / "results.json"
    settings = [(int(s.partition(",")[0]), int(s.partition(",")[2])) for s in options.bits] or SETTINGS
    done: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}

    def loader() -> DataLoader[Any]:  # whole batches are indexed at once; fit seeds the order
        return DataLoader(train, sampler=BatchSampler(RandomSampler(train), 128, False), batch_size=None)

    def record(name: str, seed: int, result: Any, seconds: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = gs.export(result, Path(folder) / "net.onnx", example_inputs=EXAMPLE, calibration=[val[0]])
            found = evaluate(file.path, val).accuracy
        assert found is not None
        done.setdefault(name, {})[str(seed)] = found.value
        kept.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{name:24} seed {seed}: {found.value:.2%} ({seconds:.0f} s)", flush=True)

    for seed in range(options.seeds):
        torch.manual_seed(seed)
        net, weights = resnet8(in_channels=1), options.out / f"float-{seed}.safetensors"
        if weights.exists():
            load_weights(net, weights)
        else:
            started = time.process_time()
            net = gs.fit(net, loader(), epochs=options.float_epochs, lr=1e-2, seed=seed).model
            save_weights(net, weights)
            record("float", seed, net.eval(), time.process_time() - started)
        net.eval()
        calibration = [train.tensors[0][:512]]
        for w, a in settings:
            if str(seed) not in done.get(f"W{w}A{a} calibrated", {}):
                started = time.process_time()
                result = gs.quantize(net, EXAMPLE, calibration=calibration, weight_bits=w, activation_bits=a)
                record(f"W{w}A{a} calibrated", seed, result, time.process_time() - started)
            if str(seed) not in done.get(f"W{w}A{a} gptq", {}):
                started = time.process_time()
                result = gs.quantize(net, EXAMPLE, calibration=calibration, weight_bits=w, activation_bits=a, rounding="gptq")
                record(f"W{w}A{a} gptq", seed, result, time.process_time() - started)
            if str(seed) not in done.get(f"W{w}A{a} trained", {}):
                started = time.process_time()
                result = gs.qat(
                    net,
                    loader(),
                    example_inputs=EXAMPLE,
                    calibration=calibration,
                    weight_bits=w,
                    activation_bits=a,
                    epochs=options.epochs,
                    lr=options.lr,
                    seed=seed,
                )
                record(f"W{w}A{a} trained", seed, result, time.process_time() - started)
    print(f"\n{processor()}, torch {torch.__version__}, {options.samples} samples, {options.epochs} epochs at lr {options.lr}")
    print("| weights, activations | calibrated | calibrated, gptq | trained |\n|---|---|---|---|")
    for name in ["float", *(f"W{w}A{a}" for w, a in settings)]:
        cells = [done.get(n, {}) for n in ((name,) if name == "float" else (f"{name} {k}" for k in ("calibrated", "gptq", "trained")))]
        print(f"| {name} | " + " | ".join(" ".join(f"{v:.2%}" for v in c.values()) for c in cells) + " |")


def step(options: argparse.Namespace) -> None:
    """CPU seconds of one training step, interleaved: float, quantised, quantised and taught."""
    cases: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "resnet8, 28, batch 128": (resnet8(in_channels=1), (128, 1, 28, 28)),
        "MobileNetV2, 96, batch 16": (torchvision.models.mobilenet_v2(num_classes=10), (16, 3, 96, 96)),
        "ResNet18, 96, batch 16": (torchvision.models.resnet18(num_classes=10), (16, 3, 96, 96)),
    }
    print(f"{processor()}, torch {torch.__version__}, one thread, {options.rounds} rounds")
    print("| network | float step, ms | quantised (10th to 90th percentile) | quantised, statistics frozen | quantised and taught |")
    print("|---|---|---|---|---|")
    for name, (net, shape) in cases.items():
        torch.manual_seed(0)
        batch = (torch.randn(shape), torch.randint(0, 10, (shape[0],)))
        result = gs.quantize(net.eval(), (batch[0][:2],), calibration=[batch[0]])
        graph: Any = result.floating
        quantised = trainable(graph, result.plan.edits, output_statistics(graph, [[batch[0]]]))
        frozen = trainable(graph, result.plan.edits, output_statistics(graph, [[batch[0]]]))
        for module in frozen.modules():
            if hasattr(module, "frozen"):
                module.frozen.fill_(True)
        taught = trainable(graph, result.plan.edits, output_statistics(graph, [[batch[0]]]))
        steppers = [_stepper(net.train(), None), _stepper(quantised, None), _stepper(frozen, None), _stepper(taught, Distillation(graph))]
        times: list[list[float]] = [[] for _ in steppers]
        for i in range(options.rounds + 2):
            for stepper, found in zip(steppers, times, strict=True):
                started = time.process_time()
                stepper.step([batch], i, str)
                if i >= 2:
                    found.append(time.process_time() - started)
        ratios = [sorted(b / a for a, b in zip(times[0], each, strict=True)) for each in times[1:]]
        n = len(ratios[0])
        cells = [f"{statistics.median(r):.2f} ({r[n // 10]:.2f} to {r[-1 - n // 10]:.2f})" for r in ratios]
        print(f"| {name} | {1e3 * statistics.median(times[0]):.0f} | " + " | ".join(cells) + " |", flush=True)


def _stepper(network: nn.Module, objective: Any) -> Stepper:
    return Stepper(
        model=network,
        optimizer=make_optimizer(network),
        objective=as_objective(objective),
        example_inputs=None,
        device=torch.device("cpu"),
        lr=1e-4,
        warmup=0.0,
        clip=None,
        penalty=None,
        total=10**6,
        channels_last=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["accuracy", "step"])
    parser.add_argument("--out", type=Path, default=Path("runs/qat"))
    parser.add_argument("--bits", nargs="*", default=[], help="of weights and activations, such as 3,8 2,2; default: all")
    parser.add_argument("--samples", type=int, default=15000)
    parser.add_argument("--float-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"accuracy": accuracy, "step": step}[options.what](options)


if __name__ == "__main__":
    main()
