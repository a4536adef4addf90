"""Latency of layers in a row in ONNX Runtime, against that of the one layer they replace: what a factorised layer is worth there."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gossamer.adapters import ChannelOrder, ChannelRepeat
from gossamer.profiling.runtime import options

ROUNDS = 11
"""The fastest counts: whatever else the machine does only ever makes one slower."""
_SECONDS_A_ROUND = 0.002
_MOST_RUNS = 50


@dataclass(frozen=True)
class Node:
    """One convolution, linear layer or movement of channels, as ONNX Runtime sees it.

    Attributes:
        op: ``"conv"``, ``"transposed"``, ``"linear"``, ``"order"`` (channels in another order) or ``"repeat"`` (several times over).
        ins, outs: channels or features.
        kernel, stride, dilation, output_padding: per spatial dimension.
        pads: before each spatial dimension, then after each.
        groups: of a convolution.
        bias: whether there is one.
    """

    op: str
    ins: int
    outs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = True


Chain = tuple[Node, ...]
_KNOWN: dict[tuple[tuple[Chain, ...], tuple[int, ...], int], tuple[float, ...]] = {}


def chain(layers: Iterable[nn.Module]) -> Chain:
    """Linear layers, convolutions and movements of channels in a row as nodes; padding of any mode counts as zeros.

    Examples:
        >>> [(n.op, n.ins, n.outs) for n in chain([nn.Linear(4, 2, bias=False), nn.Linear(2, 8)])]
        [('linear', 4, 2), ('linear', 2, 8)]
    """
    row = list(layers)
    return tuple(_repeat(a, b) if isinstance(a, ChannelRepeat) else _node(a) for a, b in zip(row, [*row[1:], None], strict=True))


def _repeat(layer: ChannelRepeat, following: nn.Module | None) -> Node:
    assert isinstance(following, _ConvNd)
    return Node("repeat", following.in_channels // layer.times, following.in_channels, kernel=(1,) * (-layer.dim - 1), bias=False)


def _node(layer: nn.Module) -> Node:
    if isinstance(layer, nn.Linear):
        return Node("linear", layer.in_features, layer.out_features, bias=layer.bias is not None)
    if isinstance(layer, ChannelOrder):
        return Node("order", layer.channels, layer.channels, kernel=(1,) * (-layer.dim - 1), bias=False)
    assert isinstance(layer, _ConvNd)
    before: list[int]
    if isinstance(layer.padding, str):
        both = [d * (k - 1) if layer.padding == "same" else 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        before = [b // 2 for b in both]
        pads = (*before, *(b - f for b, f in zip(both, before, strict=True)))
    else:
        pads = (*layer.padding, *layer.padding)
    return Node(
        "transposed" if isinstance(layer, _ConvTransposeNd) else "conv",
        layer.in_channels,
        layer.out_channels,
        tuple(layer.kernel_size),
        tuple(layer.stride),
        tuple(layer.dilation),
        pads,
        tuple(layer.output_padding),
        layer.groups,
        layer.bias is not None,
    )


def time_chains(chains: Sequence[Chain], shape: Sequence[int], *, threads: int = 1) -> list[float]:
    """Milliseconds of each of some chains on inputs of one shape, all of them in every round, in shuffled order.

    What was measured is remembered for the life of the process, so that a question asked twice has one answer.

    Examples:
        >>> one, two = chain([nn.Linear(256, 256)]), chain([nn.Linear(256, 8), nn.Linear(8, 256)])
        >>> len(time_chains([one, two], (1, 256)))
        2

    Args:
        chains: from `chain`; all take the same input.
        shape: of the input, batch included.
        threads: of the runtime.
    """
    key = (tuple(chains), tuple(shape), threads)
    if key not in _KNOWN:
        _KNOWN[key] = tuple(_time(key[0], key[1], threads))
    return list(_KNOWN[key])


def _time(chains: Sequence[Chain], shape: tuple[int, ...], threads: int) -> list[float]:
    import onnxruntime

    runs: list[tuple[Callable[[], object], int]] = []
    for nodes in chains:
        graph, feeds = _graph(nodes, shape)
        running = onnxruntime.InferenceSession(graph, options(threads), providers=["CPUExecutionProvider"])

        run: Callable[[], object] = partial(running.run, None, feeds)
        run()
        started = time.perf_counter()
        run()
        once = max(time.perf_counter() - started, 1e-6)
        runs.append((run, int(min(_MOST_RUNS, max(1, _SECONDS_A_ROUND / once)))))
    order, shuffle = list(range(len(runs))), random.Random(0).shuffle
    found = np.zeros((ROUNDS, len(runs)))
    for i in range(ROUNDS):
        shuffle(order)
        for j in order:
            timed, times = runs[j]
            started = time.perf_counter()
            for _ in range(times):
                timed()
            found[i, j] = (time.perf_counter() - started) / times
    return [float(v) * 1e3 for v in np.min(found, axis=0)]


def _graph(nodes: Chain, shape: tuple[int, ...]) -> tuple[bytes, dict[str, Any]]:
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)

    def noise(*size: int) -> Any:
        return generator.standard_normal(size, dtype=np.float32)

    made, weights, value = [], [], "x"
    for i, n in enumerate(nodes):
        after = f"y{i}"
        if n.op == "linear":
            weights.append(numpy_helper.from_array(noise(n.ins, n.outs), f"w{i}"))
            made.append(helper.make_node("MatMul", [value, f"w{i}"], [f"{after}m" if n.bias else after]))
            if n.bias:
                weights.append(numpy_helper.from_array(noise(n.outs), f"b{i}"))
                made.append(helper.make_node("Add", [f"{after}m", f"b{i}"], [after]))
        elif n.op == "order":
            weights.append(numpy_helper.from_array(generator.permutation(n.ins), f"w{i}"))
            made.append(helper.make_node("Gather", [value, f"w{i}"], [after], axis=len(shape) - len(n.kernel) - 1))
        elif n.op == "repeat":
            made.append(helper.make_node("Concat", [value] * (n.outs // n.ins), [after], axis=len(shape) - len(n.kernel) - 1))
        else:
            transposed = n.op == "transposed"
            size = (n.ins, n.outs // n.groups) if transposed else (n.outs, n.ins // n.groups)
            weights.append(numpy_helper.from_array(noise(*size, *n.kernel), f"w{i}"))
            inputs = [value, f"w{i}"]
            if n.bias:
                weights.append(numpy_helper.from_array(noise(n.outs), f"b{i}"))
                inputs.append(f"b{i}")
            attributes: dict[str, Any] = {
                "kernel_shape": list(n.kernel),
                "strides": list(n.stride),
                "pads": list(n.pads),
                "dilations": list(n.dilation),
                "group": n.groups,
            }
            if transposed:
                attributes["output_padding"] = list(n.output_padding)
            made.append(helper.make_node("ConvTranspose" if transposed else "Conv", inputs, [after], **attributes))
        value = after
    graph = helper.make_graph(
        made,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString(), {"x": noise(*shape)}
