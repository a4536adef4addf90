"""Vision transformers with random weights, in ONNX Runtime: how far each kind of quantisation is from the float outputs.

python benchmarks/vit.py --networks deit_tiny_patch16_224 vit_b_16
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import gossamer as gs
from gossamer.exporting import runtime_ops
from gossamer.profiling import evaluate
from gossamer.run_folder import processor


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=["deit_tiny_patch16_224", "vit_b_16"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{processor()}, torch {torch.__version__}, timm {timm.__version__}, one thread, random weights, {options.images} images of noise"
    )
    print("| network | | MB | of float | dB to float | same top-1 | latency, float = 1 | kernels |\n|---|---|---|---|---|---|---|---|")
    for network in options.networks:
        torch.manual_seed(0)
        net: Any = torchvision.models.vit_b_16() if network == "vit_b_16" else timm.create_model(network)
        if network == "vit_b_16":  # its head starts as zeros
            torch.nn.init.trunc_normal_(net.heads.head.weight, std=0.02)
        net.eval()
        images = torch.nn.functional.interpolate(torch.randn(2 * options.images, 3, 28, 28), size=224, mode="bilinear")
        calibration, judged = list(images[: options.images].split(4)), list(images[options.images :].split(1))
        example = (images[:1],)
        ways: dict[str, Any] = {
            "float": None,
            "dynamic": {"dynamic": True},
            "calibrated": {"calibration": calibration},
            "weight-only, 8 bit": {"weight_only": True},
            "weight-only, 4 bit": {"weight_only": True, "weight_bits": 4},
        }
        with tempfile.TemporaryDirectory() as folder:
            files: dict[str, Any] = {}
            for name, how in ways.items():
                result = net if how is None else gs.quantize(net, example, **how)
                files[name] = gs.export(result, Path(folder) / f"{len(files)}.onnx", example_inputs=example, calibration=[judged[0]])
            times = gs.benchmark(*files.values(), example_inputs=example, seconds=options.seconds, names=list(files))
            labelled = [(x, torch.zeros(len(x), dtype=torch.long)) for x in judged]
            for (name, file), row in zip(files.items(), times.rows, strict=True):
                found = evaluate(file.path, labelled, reference=files["float"].path)
                kernels = {k: n for k, n in runtime_ops(file.path).items() if "MatMul" in k or "Gemm" in k or "QLinear" in k}
                print(
                    f"| {network} | {name} | {file.size_bytes / 1e6:.1f} | 1/{files['float'].size_bytes / file.size_bytes:.2f} | "
                    f"{found.sqnr_db or 0:.1f} | {found.agreement or 0:.0%} | {row.ratio:.2f} ({row.ratio_p10:.2f} to {row.ratio_p90:.2f}) | "
                    f"{', '.join(f'{n} {k}' for k, n in sorted(kernels.items()))} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
