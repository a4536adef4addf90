"""A sentence encoder (MiniLM, six layers) without training data: dynamic int8, weight-only and calibrated, in ONNX Runtime.

    python benchmarks/minilm.py --sentences 200

The sentences are those of this repository's documentation; half of them calibrate, the others judge.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _minilm import Pieces, minilm

import gossamer as gs
from gossamer.exporting import runtime_ops
from gossamer.exporting.runtime import run, session
from gossamer.run_folder import processor

ROOT = Path(__file__).resolve().parents[1]


def sentences(most: int) -> list[str]:
    """Sentences of the documentation, without code and tables."""
    found: list[str] = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = re.sub(r"```.*?```", " ", page.read_text(), flags=re.DOTALL)
        lines = [s for s in text.splitlines() if s and s[0] not in "|:#-"]
        found += [s.strip() for s in re.split(r"(?<=[.:;])\s", " ".join(lines)) if 30 < len(s) < 200]
    return found[:most]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    net, pieces, texts = minilm(), Pieces(), sentences(options.sentences)
    ids, mask = pieces(texts)
    half = len(texts) // 2
    calibration: list[Any] = [(ids[i : i + 20], mask[i : i + 20]) for i in range(0, half, 20)]
    judged = [(ids[i : i + 1], mask[i : i + 1]) for i in range(half, len(texts))]
    with torch.no_grad():
        want = torch.cat([net(*x) for x in judged]).numpy()
    example = (ids[:1], mask[:1])
    ways: dict[str, Any] = {
        "float": None,
        "dynamic": {"dynamic": True},
        "dynamic, ranges measured": {"dynamic": True, "calibration": calibration},
        "calibrated (W8A8)": {"calibration": calibration},
        "weight-only, 8 bit, groups of 32": {"weight_only": True},
        "weight-only, 4 bit, groups of 32": {"weight_only": True, "weight_bits": 4},
        "weight-only, 4 bit, groups of 128": {"weight_only": True, "weight_bits": 4, "group_size": 128},
    }
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Any] = {}
        for name, how in ways.items():
            result = net if how is None else gs.quantize(net, example, **how)
            files[name] = gs.export(result, Path(folder) / f"{len(files)}.onnx", example_inputs=example, calibration=[judged[0]])
        times = gs.benchmark(*files.values(), example_inputs=example, seconds=options.seconds, names=list(files))
        print(f"{processor()}, torch {torch.__version__}, one thread, {len(judged)} sentences of up to 64 pieces, batch 1\n{times}\n")
        print("| | file, MB | of float | cosine to float: mean | least | kernels |\n|---|---|---|---|---|---|")
        for name, file in files.items():
            running = session(file.path)
            got = np.concatenate([run(running, {"ids_NT": i.numpy(), "mask_NT": m.numpy()})[0] for i, m in judged])
            cosine = (got * want).sum(1) / np.linalg.norm(got, axis=1)
            kernels = {k: n for k, n in runtime_ops(file.path).items() if "MatMul" in k or "Gemm" in k}
            print(
                f"| {name} | {file.size_bytes / 1e6:.1f} | 1/{files['float'].size_bytes / file.size_bytes:.2f} | {cosine.mean():.4f} | "
                f"{cosine.min():.4f} | {', '.join(f'{n} {k}' for k, n in sorted(kernels.items()))} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
