"""Bias absorption: what a channel never goes below moves past its ReLU, into the biases of the layers that read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from gossamer.quantization.equalization import Wire
from gossamer.quantization.graph import bias_node, op_name, tensor_at, weight_name
from gossamer.quantization.moments import geometry
from gossamer.quantization.observers import Channels

_WORTH = 0.99  # of the old range, above which biases are left alone
_DEVIATIONS = 3.0  # below a batch norm's mean, from where on values count as never seen


def absorb_biases(module: fx.GraphModule, wires: Iterable[Wire], seen: Mapping[fx.Node, Channels]) -> int:
    """Lower a layer's biases by ``c`` and raise its readers' by ``W c``, in place, where that narrows the range of what lies between.

    ``c`` is the least value of a channel on the calibration data and, where a batch norm made it, within three of its deviations below its mean. It takes a
    ReLU without a clip from above and readers that pad nothing.

    Args:
        module: a canonical graph.
        wires: of `gossamer.quantization.equalization.find_wires`.
        seen: statistics of the values that will be rounded; those of the wires that change are shifted too.

    Returns:
        How many wires changed.

    Source:
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1.3.
    """
    changed = 0
    for wire in wires:
        points = [seen[n] for n in wire.nodes if n in seen]
        if not points or not _possible(module, wire):
            continue
        giver = wire.givers[0]
        c = torch.stack([p.smallest for p in points]).amin(0).clamp(min=0)
        if "normal" in giver.meta:
            mean, deviation = giver.meta["normal"]
            c = torch.minimum(c, (mean - _DEVIATIONS * deviation).clamp(min=0))
        largest = torch.stack([p.largest for p in points]).amax(0)
        if float((largest - c).max()) >= _WORTH * float(largest.max()):
            continue
        _move(module, wire, c)
        for p in points:
            p.largest, p.smallest, p.mean = p.largest - c, p.smallest - c, p.mean - c.double()
        changed += 1
    return changed


def _possible(module: fx.GraphModule, wire: Wire) -> bool:
    layers = [*wire.givers, *wire.readers]
    if wire.frozen is not None or wire.cap is not None or len(wire.givers) != 1 or any(bias_node(n) is None for n in layers):
        return False
    between = {op_name(n) for n in wire.nodes if n not in wire.givers}
    shapes = [geometry(n, tensor_at(module, str(weight_name(n)))) for n in wire.readers]
    return "relu" in between and not between & {"pad", "leaky_relu"} and all(s is not None and not any(s.padding) for s in shapes)


def _move(module: fx.GraphModule, wire: Wire, c: Tensor) -> None:
    with torch.no_grad():
        giver = wire.givers[0]
        tensor_at(module, str(bias_node(giver).target)).sub_(c)
        if "normal" in giver.meta:
            mean, deviation = giver.meta["normal"]
            giver.meta["normal"] = (mean - c, deviation)
        for layer in wire.readers:
            w = tensor_at(module, str(weight_name(layer)))
            shape = geometry(layer, w)
            assert shape is not None
            by_input = shape.rows(w).reshape(shape.groups, shape.outputs, c.numel() // shape.groups, -1).sum(3)
            shift = (by_input * c.view(shape.groups, 1, -1)).sum(2).reshape(-1)
            tensor_at(module, str(bias_node(layer).target)).add_(shift)
