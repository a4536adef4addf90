"""What other tools make of a trained network at 8 bits: files where they write them, else networks that run in torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from _photographs import Task
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import Tensor, nn


class _Reader(CalibrationDataReader):
    """Calibration batches, one photograph at a time, as onnxruntime's quantiser asks for them."""

    def __init__(self, batches: list[Any]) -> None:
        self.items = iter([{"input": x[i : i + 1].numpy()} for x, _ in batches for i in range(len(x))])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.items, None)


def files(task: Task) -> dict[str, Callable[[Path, Path], str]]:
    """Peers that make a file of the float file."""
    found = {
        "onnxruntime": _onnxruntime(task),
        "onnxruntime 7 bit": _onnxruntime(task, reduce_range=True),
        "onnxruntime unsigned": _onnxruntime(task, weight_type=QuantType.QUInt8, activation_type=QuantType.QUInt8),
    }
    return found | ({"nncf": _nncf(task)} if importlib.util.find_spec("nncf") else {})


def networks(task: Task) -> dict[str, Callable[[], nn.Module]]:
    """Peers whose result runs in torch, rounding simulated; it is not a file, so that neither its size nor its latency compare."""
    known = {"torchao": _torchao, "neural_compressor": _neural_compressor}
    return {name: _of(make, task) for name, make in known.items() if importlib.util.find_spec(name)}


def _of(make: Callable[[Task], nn.Module], task: Task) -> Callable[[], nn.Module]:
    return lambda: make(task)


def _onnxruntime(task: Task, **options: Any) -> Callable[[Path, Path], str]:
    def write(plain: Path, path: Path) -> str:
        quantize_static(plain, path, _Reader(task.calibration), per_channel=True, **options)
        return ""

    return write


def _nncf(task: Task) -> Callable[[Path, Path], str]:
    """Mixed preset, bias correction on all calibration samples."""

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


def _torchao(task: Task) -> nn.Module:
    """Torchao's export quantisation with its quantiser for x86."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    example = (task.calibration[0][0][:20],)  # a fixed batch: the size that is evaluated with
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(task.model, example).module(), quantizer)
    with torch.no_grad():
        for x in _twenties(task):
            prepared(x)
    return _Fixed(convert_pt2e(prepared))


def _neural_compressor(task: Task) -> nn.Module:
    """Neural Compressor's static quantisation, its defaults for the CPU."""
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare

    prepared = prepare(export(task.model, (task.calibration[0][0][:20],)), StaticQuantConfig(w_granularity="per_channel"))
    with torch.no_grad():
        for x in _twenties(task):
            prepared(x)
    return _Fixed(convert(prepared))


def _twenties(task: Task) -> tuple[Tensor, ...]:
    return torch.cat([x for x, _ in task.calibration]).split(20)


class _Fixed(nn.Module):
    """An exported network, which has no eval mode of its own."""

    def __init__(self, exported: Any) -> None:
        super().__init__()
        self.run = [exported]
        weighted = [n for n in exported.graph.nodes if str(n.target).startswith(("aten.conv", "aten.linear", "aten.addmm"))]
        self.layers = len(weighted)
        self.rounded = sum(any("dequantize" in str(a.target) for a in n.all_input_nodes[1:]) for n in weighted)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.run[0](x)
        return out
