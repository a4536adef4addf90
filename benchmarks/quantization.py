"""Integer networks in ONNX Runtime: gossamer beside onnxruntime's own static quantiser and NNCF, in one run, on the files that ship."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from _photographs import Task, load, parser
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

import gossamer as gs
from gossamer.exporting import runtime_ops
from gossamer.profiling import evaluate

EXAMPLE = (torch.zeros(1, 3, 224, 224),)
ENDS = {"mobilenet_v2": ("features.0.0", "classifier.1"), "efficientnet_lite0": ("_conv_stem", "_fc")}
"""The first and the last layer, which keep 8 bits where the others have 4."""
INTEGER = ("QLinearConv", "QGemm", "MatMulInteger", "QLinearMatMul")


class Reader(CalibrationDataReader):
    """Calibration batches, one photograph at a time, as onnxruntime's quantiser asks for them."""

    def __init__(self, batches: list[Any]) -> None:
        self.items = iter([{"input": x[i : i + 1].numpy()} for x, _ in batches for i in range(len(x))])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.items, None)


def ours(task: Task, **options: Any) -> Callable[[Path, Path], str]:
    """Writes what gossamer makes of the network; gives what it says of the choices that it measured."""

    def write(_: Path, path: Path) -> str:
        result = gs.quantize(task.model, EXAMPLE, calibration=task.calibration, **options)
        gs.export(result, path)
        return "; ".join(n for n in result.notes if n.startswith(("equalised", "weights take", "measured")))

    return write


def onnxruntime(task: Task, **options: Any) -> Callable[[Path, Path], str]:
    """Writes what onnxruntime's quantiser makes of the float file."""

    def write(plain: Path, path: Path) -> str:
        quantize_static(plain, path, Reader(task.calibration), per_channel=True, **options)
        return ""

    return write


def nncf(task: Task) -> Callable[[Path, Path], str]:
    """Writes what NNCF makes of the float file: mixed preset, bias correction on all calibration samples."""

    def write(plain: Path, path: Path) -> str:
        import nncf

        images = [x[i : i + 1].numpy() for x, _ in task.calibration for i in range(len(x))]
        made = nncf.quantize(
            onnx.load(plain),
            nncf.Dataset(images, lambda x: {"input": x}),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
            fast_bias_correction=False,
        )
        onnx.save(made, path)
        return ""

    return write


def rows(task: Task) -> dict[str, Callable[[Path, Path], str]]:
    """Every row by name."""
    four = {**dict.fromkeys(ENDS[task.name], 8), "*": 4}
    found: dict[str, Callable[[Path, Path], str]] = {
        "w8a8 vnni": ours(task, target="vnni", rounding="gptq"),
        "w8a8 avx2": ours(task, target="avx2", rounding="gptq"),
        "w8a8 avx2 latency": ours(task, target="avx2", prefer="latency", rounding="gptq"),
        "w8a8 nearest": ours(task, target="vnni"),
        "w8a8 plain": ours(task, target="vnni", equalize=False),
        "w4a8 nearest": ours(task, target="vnni", weight_bits=four),
        "w4a8 gptq": ours(task, target="vnni", weight_bits=four, rounding="gptq"),
        "w4a8 adaround": ours(task, target="vnni", weight_bits=four, rounding="adaround"),
        "average 4": ours(task, target="vnni", average_bits=4, rounding="gptq"),
        "w8a16": ours(task, target="vnni", activation_bits=16, rounding="gptq"),
        "onnxruntime": onnxruntime(task),
        "onnxruntime 7 bit": onnxruntime(task, reduce_range=True),
        "onnxruntime unsigned": onnxruntime(task, weight_type=QuantType.QUInt8, activation_type=QuantType.QUInt8),
    }
    if importlib.util.find_spec("nncf"):
        found["nncf"] = nncf(task)
    return found


def main() -> None:
    """Print the table."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--rows", default="", help="names of rows, with commas; all where none is given")
    args = arguments.parse_args()
    task = load(args)
    possible = rows(task)
    chosen = [r for r in args.rows.split(",") if r] or list(possible)
    if unknown := [r for r in chosen if r not in possible]:
        raise argparse.ArgumentTypeError(f"unknown rows {unknown}, known are {list(possible)}")
    with tempfile.TemporaryDirectory() as folder:
        original, plain = Path(folder) / "original.onnx", Path(folder) / "plain.onnx"
        gs.export(task.model, original, example_inputs=EXAMPLE)
        stripped = onnx.load(original)
        stripped.graph.ClearField("value_info")
        onnx.save(stripped, plain)
        files = {"float32": original}
        print(
            f"{task.name}\n{'':22} {'top-1':>7} {'agreement':>10} {'SQNR dB':>8} {'bytes':>9} {'CPU s':>6}  integer and float kernels",
            flush=True,
        )
        for name in ["float32", *chosen]:
            seconds, said = 0.0, ""
            if name != "float32":
                files[name] = Path(folder) / f"{name.replace(' ', '-')}.onnx"
                started = time.process_time()
                try:
                    said = possible[name](plain, files[name])
                except Exception as e:  # a peer that fails is a row of its own
                    print(f"{name:22} fails: {str(e).splitlines()[0][:100]}", flush=True)
                    del files[name]
                    continue
                seconds = time.process_time() - started
            found, ops = evaluate(files[name], task.evaluation, reference=original), runtime_ops(files[name])
            assert found.accuracy is not None
            assert found.agreement is not None
            kernels = (
                f"{sum(ops[o] for o in INTEGER)} and {ops['Conv'] + ops['FusedConv'] + ops['Gemm'] + ops['MatMul'] + ops['NhwcFusedConv']}"
            )
            line = f"{found.accuracy.value:7.2%} {found.agreement:10.1%} {found.sqnr_db or 0:8.1f} {files[name].stat().st_size:9} {seconds:6.0f}"
            print(f"{name:22} {line}  {kernels}" + (f"  [{said}]" if said else ""), flush=True)
        print(gs.benchmark(*files.values(), example_inputs=EXAMPLE, seconds=2, names=list(files)))


if __name__ == "__main__":
    main()
