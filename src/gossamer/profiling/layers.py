"""Latency of single layers in ONNX Runtime at several widths: a table that says what a pruned layer would cost before it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gossamer.profiling.runtime import options
from gossamer.result import LayerCost, Profile

WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Fractions of a layer's channels that are measured."""
UNIT = 8
"""Widths are multiples of this: the channels that one vector instruction handles."""
ROUNDS = 7
_SECONDS_A_ROUND = 0.002
_MOST_RUNS = 50


@dataclass(frozen=True)
class Shape:
    """What a layer's latency depends on, channels apart.

    Attributes:
        op: ``"conv"``, ``"depthwise"`` or ``"linear"``.
        kernel, stride, padding, dilation: of a convolution, per spatial dimension.
        groups: of a convolution that is neither dense nor depthwise.
        rows: batch, then input size per spatial dimension (convolution); or rows of the matrix (linear).
    """

    op: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class LayerTable:
    """Milliseconds of one layer at several widths.

    Attributes:
        ins: numbers of input channels, ascending.
        outs: numbers of output channels, ascending (those of ``ins`` for a depthwise convolution).
        ms: shape ``(ins, outs)``; ``(ins, 1)`` for a depthwise convolution.
    """

    ins: np.ndarray
    outs: np.ndarray
    ms: np.ndarray

    def __call__(self, ins: float, outs: float) -> float:
        """Milliseconds at a width, interpolated; below the smallest width that was measured, in proportion."""
        ins, outs = _up(ins), _up(outs)
        columns = np.array([np.interp(ins, self.ins, self.ms[:, j]) for j in range(self.ms.shape[1])])
        if ins < self.ins[0]:
            columns = columns * ins / self.ins[0]
        if len(columns) == 1:
            return float(columns[0])
        value = float(np.interp(outs, self.outs, columns))
        return value * outs / self.outs[0] if outs < self.outs[0] else value


def _up(channels: float) -> float:
    return float(-(-channels // UNIT) * UNIT) if channels > 3 else channels


def widths(channels: int) -> list[int]:
    """Widths of a layer that are measured, ascending.

    Examples:
        >>> widths(32), widths(3)
        ([8, 16, 24, 32], [3])
    """
    return sorted({min(channels, max(UNIT, round(channels * w / UNIT) * UNIT)) for w in WIDTHS} | {channels})


def layer_shapes(model: nn.Module, profile: Profile) -> dict[int, tuple[Shape, int, int]]:
    """Shape and channels of each layer that can be measured alone, by its place in ``profile.layers``.

    Args:
        model: the network.
        profile: of it.
    """
    modules = dict(model.named_modules())
    found = {}
    for i, layer in enumerate(profile.layers):
        module = modules.get((layer.weight or "").rpartition(".")[0])
        described = _describe(layer, module)
        if described is not None:
            found[i] = described
    return found


def _describe(layer: LayerCost, module: nn.Module | None) -> tuple[Shape, int, int] | None:
    if isinstance(module, nn.Linear):
        count = int(np.prod(layer.output_shape)) // module.out_features
        return Shape("linear", (), (), (), (), 1, (count,)), module.in_features, module.out_features
    if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd) or isinstance(module.padding, str):
        return None
    space = layer.output_shape[2:]
    kernel, stride, padding, dilation = module.kernel_size, module.stride, module.padding, module.dilation
    size = tuple((o - 1) * s + d * (k - 1) + 1 - 2 * p for o, s, d, k, p in zip(space, stride, dilation, kernel, padding, strict=True))
    depthwise = module.groups == module.in_channels == module.out_channels and module.groups > 1
    groups = 1 if depthwise else module.groups
    op = "depthwise" if depthwise else "conv"
    rows = (layer.output_shape[0], *size)
    return Shape(op, kernel, stride, padding, dilation, groups, rows), module.in_channels, module.out_channels


def measure_layers(
    layers: Sequence[tuple[Shape, int, int]], *, threads: int = 1, progress: Callable[[int, int], None] | None = None
) -> dict[tuple[Shape, int, int], LayerTable]:
    """Time layers at several widths, all of them in every round so that whatever else the machine does hits all alike.

    Args:
        layers: shape, input channels, output channels; equal ones are measured once.
        threads: of the runtime.
        progress: called with layers done and all.

    Returns:
        One `LayerTable` for each different layer.
    """
    different = list(dict.fromkeys(layers))
    grid: dict[tuple[Shape, int, int], list[tuple[int, int]]] = {}
    for shape, ins, outs in different:
        if shape.op == "depthwise":
            grid[shape, ins, outs] = [(w, w) for w in widths(ins)]
        else:
            step = shape.groups
            a, b = (sorted({max(step, w // step * step) for w in widths(c)}) for c in (ins, outs))
            grid[shape, ins, outs] = [(i, o) for i in a for o in b]
    times: dict[tuple[Shape, int, int], float] = {}
    wanted = list(dict.fromkeys((key[0], i, o) for key, points in grid.items() for i, o in points))
    for done, point in enumerate(wanted):
        times[point] = _time(*point, threads)
        if progress is not None:
            progress(done + 1, len(wanted))
    tables = {}
    for (shape, ins, outs), points in grid.items():
        a, b = sorted({i for i, _ in points}), sorted({o for _, o in points})
        if shape.op == "depthwise":
            ms = np.array([[times[shape, i, i]] for i in a])
        else:
            ms = np.array([[times[shape, i, o] for o in b] for i in a])
        tables[shape, ins, outs] = LayerTable(np.array(a, dtype=float), np.array(b, dtype=float), ms)
    return tables


def _time(shape: Shape, ins: int, outs: int, threads: int) -> float:
    """Milliseconds of one layer: the median of rounds, each of as many runs as fit."""
    import onnxruntime

    graph, feeds = _graph(shape, ins, outs)
    running = onnxruntime.InferenceSession(graph, options(threads), providers=["CPUExecutionProvider"])
    running.run(None, feeds)
    started = time.perf_counter()
    running.run(None, feeds)
    once = max(time.perf_counter() - started, 1e-6)
    runs = int(min(_MOST_RUNS, max(1, _SECONDS_A_ROUND / once)))
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(runs):
            running.run(None, feeds)
        found.append((time.perf_counter() - started) / runs)
    return float(np.median(found)) * 1e3


def _graph(shape: Shape, ins: int, outs: int) -> tuple[bytes, Mapping[str, Any]]:
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    attributes: dict[str, Any] = {}
    if shape.op == "linear":
        x, w = random.random((*shape.rows, ins), dtype=np.float32), random.random((ins, outs), dtype=np.float32)
        op = "MatMul"
    else:
        groups = ins if shape.op == "depthwise" else shape.groups
        x = random.random((shape.rows[0], ins, *shape.rows[1:]), dtype=np.float32)
        w = random.random((outs, ins // groups, *shape.kernel), dtype=np.float32)
        op = "Conv"
        attributes = {
            "kernel_shape": list(shape.kernel),
            "strides": list(shape.stride),
            "pads": [*shape.padding, *shape.padding],
            "dilations": list(shape.dilation),
            "group": groups,
        }
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], **attributes)],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString(), {"x": x}
