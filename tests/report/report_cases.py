"""Reports of made-up runs: one that went well, and changes to it."""

from __future__ import annotations

from typing import Any

from gossamer.profiling import wilson
from gossamer.report.schema import Accuracy, Frozen, Input, Latency, LayerRow, Measured, Parity, Report, StepReport, Target

NASTY = "<img src=x onerror=alert(1)>&\"'|`[b]"


def accuracy(correct: int, n: int) -> Accuracy:
    return Accuracy(value=correct / n, n=n, interval=wilson(correct, n))


def latency(median: float, **more: Any) -> Latency:
    return Latency(median=median, p10=median * 0.97, p90=median * 1.08, runtime="onnxruntime", threads=1, batch=1, runs=212, **more)


def artefact(**changes: Any) -> Measured:
    values: dict[str, Any] = {
        "params": 3_504_872,
        "macs": 300_774_272,
        "size_bytes": 13_989_000,
        "peak_activation_bytes": 9_630_000,
        "latency_ms": latency(12.4),
        "accuracy": accuracy(326, 400),
    }
    return Measured(**values | changes)


def small(**changes: Any) -> Measured:
    values: dict[str, Any] = {
        "params": 2_504_872,
        "macs": 210_540_000,
        "size_bytes": 3_870_123,
        "peak_activation_bytes": 2_410_000,
        "latency_ms": latency(6.9, ratio=0.556, ratio_p10=0.54, ratio_p90=0.58),
        "accuracy": accuracy(323, 400),
    }
    return Measured(**values | changes)


def run(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "gossamer": "0.1.0",
        "model": "torchvision:mobilenet_v2",
        "data": "imagefolder:val",
        "seed": 7,
        "created": "2026-07-01T12:00:00+00:00",
        "recipe": {"steps": [{"prune": {"macs": 0.7}}, {"quantize": {"weight_bits": 8}}]},
        "environment": {"processor": "A CPU (avx2)", "cores": 2, "versions": {"onnxruntime": "1.31.1", "torch": "2.14.1"}},
        "before": artefact(),
        "after": small(),
        "parity": Parity(before_difference=4.1e-7, sqnr_db=19.6, top1_agreement=0.965, simulation_sqnr_db=41.2, n=400),
        "steps": [
            StepReport(
                step="prune",
                options={"macs": 0.7, "ratio": None, "ignore": []},
                params=2_504_872,
                macs=210_540_000,
                seconds=14.2,
                proof="proof holds: relative difference 3.1e-07 <= 1e-04 on 34 groups",
                notes=["features.18.0 keeps its width"],
            ),
            StepReport(step="quantize", options={"weight_bits": 8}, params=2_504_872, macs=210_540_000, seconds=9.1),
        ],
        "layers": [
            LayerRow(
                name="features.0.0",
                op="convolution",
                shape_before=[1, 32, 112, 112],
                shape_after=[1, 24, 112, 112],
                macs_before=10_838_016,
                macs_after=8_128_512,
                params_before=864,
                params_after=648,
                bits=8,
            )
        ],
        "frozen": [Frozen(group="classifier.1", reason="graph output"), Frozen(group="head", reason="graph output")],
        "budget": [Target(name="size", limit=4e6, reached=3_870_123, unit="bytes", met=True)],
        "warnings": [],
        "inputs": [Input(name="input", shape=[1, 3, 224, 224], dtype="float32")],
    }
    return Report(**values | changes)
