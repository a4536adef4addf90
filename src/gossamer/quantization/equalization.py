"""Cross-layer equalisation: channels between two layers rescaled, which changes nothing in float and much on an integer grid.

Between a layer that gives channel c and the layers that read it, c can be multiplied by any ``s_c > 0``: the giver's row by ``s_c``, the readers' columns
by ``1 / s_c``. Sums need the same scales on both sides, and a clip at 6 lets a channel grow up to 6 but no further.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from gossamer.quantization.graph import (
    AVERAGE,
    CONVOLUTION,
    LINEAR,
    MAXIMUM,
    bias_node,
    is_float,
    op_name,
    tensor_at,
    value,
    weight_name,
    weighted_nodes,
)  # fmt: skip
from gossamer.quantization.moments import Geometry, geometry
from gossamer.quantization.observers import Channels
from gossamer.quantization.steps import fake_quantize, mse_steps

_THROUGH = AVERAGE | MAXIMUM | {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "leaky_relu"}
_WORTH = 0.99  # of the noise without, above which scales are left alone
_WEIGHTS_COUNT = 0.5  # of the weights' noise by rounding to nearest that is left after bias correction and better rounding
_ROOM = 1.25  # what is left between a channel's range and a clip: other data go further than calibration did
_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
_BETAS = (0.0, 0.5)


@dataclass
class Wire:
    """Channels that are rescaled together.

    Attributes:
        channels: how many.
        givers: layers whose output rows they are.
        readers: layers whose input columns they are.
        nodes: every value in between.
        cap: where a clip from above lies in between.
        frozen: why they cannot be rescaled; None where they can.
    """

    channels: int
    givers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    cap: float | None = None
    frozen: str | None = None


def find_wires(module: fx.GraphModule) -> list[Wire]:
    """Which channels of a canonical graph are scaled together, and which not at all, with the reason."""
    at: dict[fx.Node, Wire] = {}
    uses: dict[str, int] = {}
    for layer in weighted_nodes(module.graph):
        uses[str(weight_name(layer))] = uses.get(str(weight_name(layer)), 0) + 1

    def freeze(nodes: Iterable[Any], why: str) -> None:
        for n in nodes:
            if n in at and at[n].frozen is None:
                at[n].frozen = why

    def merge(a: Wire, b: Wire) -> Wire:
        if a is b:
            return a
        for n in b.nodes:
            at[n] = a
        a.givers, a.readers, a.nodes = a.givers + b.givers, a.readers + b.readers, a.nodes + b.nodes
        a.cap = min((c for c in (a.cap, b.cap) if c is not None), default=None)
        a.frozen = a.frozen or b.frozen or (None if a.channels == b.channels else "sums of different widths")
        return a

    for node in module.graph.nodes:
        op, first = op_name(node), node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if op in CONVOLUTION | LINEAR and weight_name(node) and uses[str(weight_name(node))] == 1 and _channels_at_1(node):
            shape = geometry(node, tensor_at(module, str(weight_name(node))))
            plain_bias = bias_node(node) is None or (bias_node(node).op == "get_attr" and len(bias_node(node).users) == 1)
            if shape is None or not plain_bias or len(node.args[1].users) != 1:
                freeze(node.all_input_nodes, f"read by {op}")
                continue
            if first in at:
                at[first].readers.append(node)
                if at[first].channels != shape.groups * shape.inputs // _area(shape):
                    at[first].frozen = f"read by {op} in another width"
            wire = at[node] = Wire(shape.groups * shape.outputs, givers=[node], nodes=[node])
        elif op in _THROUGH and first in at and _same_channels(node, first):
            bottom, top = clip_of(node)
            wire = at[first]
            if bottom not in (None, 0.0) or (top is not None and top <= 0):
                wire.frozen = f"clipped by {op}"
            if top is not None:
                wire.cap = min(top, wire.cap) if wire.cap is not None else top
            at[node] = wire
            wire.nodes.append(node)
        elif first in at and _keeps_channels(node, first):
            at[node] = at[first]
            at[first].nodes.append(node)
        elif (
            op == "add"
            and not node.kwargs
            and len(node.args) == 2
            and all(isinstance(a, fx.Node) and a in at and _same_shape(a, node) for a in node.args)
        ):
            wire = at[node] = merge(at[node.args[0]], at[node.args[1]])
            wire.nodes.append(node)
        else:
            freeze(node.all_input_nodes, f"read by {op or node.op}")
    found = {id(w): w for w in at.values()}
    for w in found.values():
        if not w.readers:
            w.frozen = w.frozen or "read by no layer"
        if w.cap is not None and len(w.givers) > 1:
            w.frozen = w.frozen or "a clip and a sum"
    return list(found.values())


def equalize(
    module: fx.GraphModule,
    wires: Iterable[Wire],
    seen: Mapping[fx.Node, Channels],
    bits: Mapping[str, int],
    activation_bits: int = 8,
) -> int:
    """Rescale channels in place where that lowers the noise expected in the layers that read them.

    That noise is the activation's, whose one step follows the largest channel, and the weights', whose step follows the largest column. Scales
    ``range^-alpha * pull^beta`` are tried on a grid, ``pull`` being the norm of the readers' columns; under a clip only ``(cap / range)^alpha``,
    and channels that reach the clip stay.

    Args:
        module: a canonical graph.
        wires: of `find_wires`.
        seen: statistics of at least one value of each wire, after its clip where it has one.
        bits: width of each weight; weights that are left out stay float.
        activation_bits: of the activations.

    Returns:
        How many wires were rescaled.

    Source:
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1, for the invariance; and
        Xiao et al., "SmoothQuant", ICML 2023, equation 4, for trading activations against weights.
    """
    changed = 0
    for wire in wires:
        points = [seen[n] for n in wire.nodes if n in seen]
        if wire.frozen is not None or not points:
            continue
        range_C = torch.stack([p.largest for p in points]).amax(0)
        variance_C = torch.stack([p.variance() for p in points]).amax(0)
        scales_C, noise = _scales(module, wire, range_C, variance_C, bits, activation_bits)
        if noise < _WORTH:
            _rescale(module, wire, scales_C)
            changed += 1
    return changed


def _scales(
    module: fx.GraphModule, wire: Wire, range_C: Tensor, variance_C: Tensor, bits: Mapping[str, int], activation_bits: int
) -> tuple[Tensor, float]:
    """The best scales, and the noise they leave as a fraction of what there is without."""
    readers = []
    for layer in wire.readers:
        w_GRIA = _by_channel(module, layer)
        readers.append((w_GRIA, bits.get(str(weight_name(layer)), 32)))
    top = float(range_C.max())
    range_C = torch.where(range_C > 1e-6 * top, range_C, top)
    pull_C = torch.stack([w.square().sum((1, 3)).reshape(-1) for w, _ in readers]).sum(0)
    norm_C = pull_C.sqrt().clamp(min=1e-12 + 1e-3 * float(pull_C.max().sqrt()))

    def noise(s_C: Tensor) -> float:
        reach = float((s_C * range_C).max())
        step = (reach if wire.cap is None else min(wire.cap, reach)) / (2**activation_bits - 1)
        total = float((pull_C * (step / s_C) ** 2).sum()) / 12
        for w_GRIA, width in readers:
            if width > 8 or w_GRIA.shape[2] == 1:  # float, or one channel for each output: its step follows
                continue
            flat = (w_GRIA / s_C.view(w_GRIA.shape[0], 1, -1, 1)).flatten(0, 1).flatten(1)
            error = fake_quantize(flat, mse_steps(flat, width, 0, candidates=16), width, 0).sub_(flat).view_as(w_GRIA)
            total += _WEIGHTS_COUNT * float((error.square().sum((1, 3)).reshape(-1) * s_C**2 * variance_C).sum())
        return total

    one = torch.ones_like(range_C)
    base, best, scales = noise(one), 1.0, one
    for alpha in _ALPHAS:
        for beta in _BETAS if wire.cap is None else (0.0,):
            if wire.cap is None:
                s_C = (range_C / top) ** -alpha * (norm_C / norm_C.max()) ** beta
                s_C = s_C * top / (s_C * range_C).max()
            else:
                s_C = (wire.cap / (_ROOM * range_C)).clamp(min=1.0) ** alpha
            s_C = s_C.clamp(1e-3, 1e3)
            share = noise(s_C) / max(base, 1e-30)
            if share < best:
                best, scales = share, s_C
    return scales, best


def _rescale(module: fx.GraphModule, wire: Wire, s_C: Tensor) -> None:
    with torch.no_grad():
        for layer in wire.givers:
            w = tensor_at(module, str(weight_name(layer)))
            w.mul_(s_C.view(-1, *[1] * (w.dim() - 1)))
            if bias_node(layer) is not None:
                tensor_at(module, str(bias_node(layer).target)).mul_(s_C)
            if "normal" in layer.meta:
                layer.meta["normal"] = tuple(t * s_C for t in layer.meta["normal"])
        for layer in wire.readers:
            w_GRIA = _by_channel(module, layer)
            w = tensor_at(module, str(weight_name(layer)))
            w.copy_((w_GRIA / s_C.view(w_GRIA.shape[0], 1, -1, 1)).reshape(w.shape))


def _by_channel(module: fx.GraphModule, layer: fx.Node) -> Tensor:
    """A weight as (groups, outputs of a group, input channels of a group, kernel)."""
    w = tensor_at(module, str(weight_name(layer))).detach()
    shape = geometry(layer, w)
    assert shape is not None
    return shape.rows(w).reshape(shape.groups, shape.outputs, -1, _area(shape))


def _area(shape: Geometry) -> int:
    size = 1
    for k in shape.kernel:
        size *= k
    return size


def _channels_at_1(node: fx.Node) -> bool:
    out, given = value(node), value(node.args[0])
    return out is not None and given is not None and (op_name(node) in CONVOLUTION or out.dim() == 2) and is_float(node)


def _same_channels(node: fx.Node, before: fx.Node) -> bool:
    a, b = value(node), value(before)
    return a is not None and b is not None and a.dim() >= 2 and b.dim() >= 2 and a.shape[1] == b.shape[1]


def _same_shape(node: fx.Node, like: fx.Node) -> bool:
    a, b = value(node), value(like)
    return a is not None and b is not None and a.shape == b.shape and a.dim() >= 2


def _keeps_channels(node: fx.Node, before: fx.Node) -> bool:
    """Whether a node pads with zeros, or is a view that only drops positions of size 1."""
    if op_name(node) == "pad":
        return _same_channels(node, before) and (len(node.args) < 4 or node.args[3] in (None, 0, 0.0))
    if op_name(node) not in ("view", "flatten", "reshape", "squeeze"):
        return False
    a, b = value(node), value(before)
    return (
        a is not None and b is not None and b.dim() > 2 and a.dim() == 2 and a.shape[1] == b.shape[1] and all(n == 1 for n in b.shape[2:])
    )


def clip_of(node: fx.Node) -> tuple[float | None, float | None]:
    """What an activation clips to, below and above; None where it does not."""
    match op_name(node):
        case "relu":
            return 0.0, None
        case "relu6":
            return 0.0, 6.0
        case "hardtanh":
            low, high = (list(node.args[1:]) + [-1.0, 1.0][len(node.args) - 1 :])[:2]
            return float(low), float(high)  # type: ignore[arg-type]
        case "clamp" | "clamp_min":
            given = dict(zip(("min", "max"), node.args[1:], strict=False)) | dict(node.kwargs)
            return tuple(None if given.get(k) is None else float(given[k]) for k in ("min", "max"))  # type: ignore[arg-type,return-value]
    return None, None
