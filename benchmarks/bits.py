"""The same bits everywhere against bits chosen layer by layer at the same average: Fashion-MNIST, exported files in ONNX Runtime."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import gossamer as gs
from gossamer.models import resnet8
from gossamer.profiling import evaluate
from gossamer.run_folder import load_weights, save_weights

EXAMPLE = (torch.zeros(1, 1, 28, 28),)


def tensors(dataset: Any, n: int) -> TensorDataset:
    """Leading samples, decoded once."""
    xs, ys = zip(*(dataset[i] for i in range(n)), strict=True)
    return TensorDataset(torch.stack(xs), torch.tensor(ys))


def main() -> None:
    """Print top-1 at each number of bits, uniform and chosen, rounded to nearest and by GPTQ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights", type=Path, default=Path("fashion-resnet8.safetensors"), help="of the float network; trained where absent"
    )
    parser.add_argument("--samples", type=int, default=15000, help="to train on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    options = parser.parse_args()
    data = gs.load_data("fashion-mnist")
    assert data.train is not None
    net = resnet8(in_channels=1)
    train, held_out = tensors(data.train, 512 if options.weights.exists() else options.samples), tensors(data.val, len(data.val))
    if options.weights.exists():
        load_weights(net, options.weights)
    else:
        loader = DataLoader(train, sampler=BatchSampler(RandomSampler(train), 128, False), batch_size=None)
        torch.manual_seed(0)
        net = gs.fit(net, loader, epochs=options.epochs, lr=1e-2, seed=0).model
        save_weights(net, options.weights)
    net.eval()
    calibration = [train.tensors[0][:512]]
    val = [(held_out.tensors[0][i : i + 500], held_out.tensors[1][i : i + 500]) for i in range(0, len(held_out), 500)]
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original.onnx"
        gs.export(net, original, example_inputs=EXAMPLE)
        float32 = evaluate(original, val).accuracy
        assert float32 is not None
        print(f"float32: {float32.value:.2%}, {original.stat().st_size} bytes", flush=True)
        for bits in options.bits:
            for rounding in ("nearest", "gptq"):
                for name, chosen in (("uniform", {"weight_bits": bits}), ("chosen", {"average_bits": bits})):
                    path = Path(folder) / "net.onnx"
                    result = gs.quantize(net, EXAMPLE, calibration=calibration, rounding=rounding, **chosen)
                    gs.export(result, path)
                    found = evaluate(path, val, reference=original)
                    assert found.accuracy is not None
                    widths = [e.bits for e in result.plan if e.kind == "quantize_weight"]
                    line = (
                        f"{found.accuracy.value:.2%}, agreement {found.agreement:.2%}, {found.sqnr_db:.1f} dB, {path.stat().st_size} bytes"
                    )
                    print(f"{bits} bits {rounding:8} {name:8} {line}, bits {widths}", flush=True)


if __name__ == "__main__":
    main()
