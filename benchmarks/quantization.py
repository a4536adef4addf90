"""Eight-bit MobileNetV2 in ONNX Runtime: gossamer's targets beside onnxruntime's own static quantiser, in one run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from _photographs import arguments, load
from onnxruntime.quantization import CalibrationDataReader, quantize_static

import gossamer as gs
from gossamer.profiling import evaluate


class Reader(CalibrationDataReader):
    """Calibration batches, one photograph at a time, as onnxruntime's quantiser asks for them."""

    def __init__(self, batches: list[Any]) -> None:
        self.items = iter([{"input": x[i : i + 1].numpy()} for x, _ in batches for i in range(len(x))])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.items, None)


def main() -> None:
    """Print the table."""
    task = load(arguments(__doc__ or ""))
    model, calibration, evaluation = task.model, task.calibration, task.evaluation
    example = (torch.zeros(1, 3, 224, 224),)
    with tempfile.TemporaryDirectory() as folder:
        files = {"original": Path(folder) / "original.onnx"}
        gs.export(model, files["original"], example_inputs=example)
        for target in ("vnni", "avx2"):
            files[f"gossamer, target {target}"] = Path(folder) / f"{target}.onnx"
            result = gs.quantize(model, example, calibration=calibration, target=target)
            gs.export(result, files[f"gossamer, target {target}"])
        files["onnxruntime quantize_static"] = Path(folder) / "peer.onnx"
        plain = onnx.load(files["original"])
        plain.graph.ClearField("value_info")
        onnx.save(plain, Path(folder) / "plain.onnx")
        quantize_static(Path(folder) / "plain.onnx", files["onnxruntime quantize_static"], Reader(calibration), per_channel=True)
        times = gs.benchmark(*files.values(), example_inputs=example, seconds=3, names=list(files))
        print(times)
        print(f"{'':28} {'top-1':>8} {'agreement':>10} {'SQNR':>8} {'bytes':>10}")
        for name, file in files.items():
            found = evaluate(file, evaluation, reference=files["original"])
            assert found.accuracy is not None
            assert found.agreement is not None
            print(
                f"{name:28} {found.accuracy.value:8.2%} {found.agreement:10.1%} {found.sqnr_db or 0:7.1f} {file.stat().st_size:10}",
                flush=True,
            )


if __name__ == "__main__":
    main()
