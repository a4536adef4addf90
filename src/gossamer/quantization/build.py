"""Edits -> quantised graph: the one path that quantising, loading and exporting share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from gossamer.errors import PlanError, near
from gossamer.plan import QuantizeActivation, QuantizeWeight
from gossamer.quantization.canonical import canonical, drop_unused
from gossamer.quantization.graph import (
    CLIP,
    CONVOLUTION,
    LINEAR,
    bias_node,
    op_name,
    point_names,
    put_tensor,
    set_bias,
    tensor_at,
    weight_name,
    weighted_nodes,
)  # fmt: skip
from gossamer.quantization.layers import fuse_layers, store_layers, tables
from gossamer.quantization.ops import limits
from gossamer.quantization.points import source
from gossamer.quantization.steps import codes
from gossamer.trace.capture import capture


def apply_edits(model: nn.Module, edits: Sequence[Any], example_inputs: Any) -> fx.GraphModule:
    """Rebuild a quantised network from its plan's edits.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False)).eval()
        >>> edit = QuantizeWeight(tensor="0.weight", bits=8, axis=0, signed=True, steps=(0.01,), zero_points=(0,))
        >>> quantised = apply_edits(net, [edit], (torch.zeros(1, 2),))
        >>> {n: t.dtype for n, t in quantised.state_dict().items()}
        {'0.weight': torch.int8, '0.weight_step': torch.float32}

    Args:
        model: the float network, structure edits applied.
        edits: `QuantizeWeight` and `QuantizeActivation`.
        example_inputs: inputs of the shapes it was quantised with; their values do not matter.

    Returns:
        A graph module in eval mode. Weights are integer buffers under the names of the weights, their steps beside them; biases
        are int32; steps of activations lie under ``activations``. ``load_state_dict`` of a saved one gives its outputs bit for bit.

    Raises:
        PlanError: an edit names a tensor or a point that the network does not have.
    """
    return quantized(canonical(capture(model, example_inputs)), edits)


def quantized(module: fx.GraphModule, edits: Sequence[Any]) -> fx.GraphModule:
    """Apply edits to a canonical graph module, in place, and return it."""
    weights = {e.tensor: e for e in edits if isinstance(e, QuantizeWeight)}
    with torch.no_grad():
        for tensor in store_layers(module, edits):
            del weights[tensor]
    points = {e.point: e for e in edits if isinstance(e, QuantizeActivation)}
    names = point_names(module.graph)
    by_weight: dict[str, list[fx.Node]] = {}
    for layer in weighted_nodes(module.graph):
        by_weight.setdefault(str(weight_name(layer)), []).append(layer)
    for tensor, nodes in tables(module.graph).items():
        by_weight[tensor] = [*by_weight.get(tensor, []), *nodes]
    _check(weights, by_weight, points, set(names.values()))
    with torch.no_grad():
        steps = {node: _round_after(module, node, points[name]) for node, name in names.items() if name in points}
        for tensor, edit in weights.items():
            _store_weight(module, by_weight[tensor], edit)
            if edit.axis is None or (edit.axis == 0 and all(op_name(n) in CONVOLUTION | LINEAR for n in by_weight[tensor])):
                for use, layer in enumerate(by_weight[tensor]):
                    _store_bias(module, layer, edit, use, steps)
        fuse_layers(module, edits)
    module.graph.eliminate_dead_code()
    drop_unused(module)
    module.graph.lint()
    module.recompile()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


def _check(weights: dict[str, Any], by_weight: dict[str, Any], points: dict[str, Any], names: set[str]) -> None:
    for tensor in weights:
        if tensor not in by_weight:
            raise PlanError(f"the network has no convolution, linear or embedding weight {tensor!r}{near(tensor, by_weight)}")
    for point in points:
        if point not in names:
            raise PlanError(f"the network has no point {point!r}{near(point, names)}")


def _round_after(module: fx.GraphModule, node: fx.Node, edit: QuantizeActivation) -> tuple[fx.Node, float]:
    """Insert a rounding after a node; where the node is a clip that the rounding does anyway, in its place."""
    graph = module.graph
    low, high = limits(edit.bits, edit.signed)
    base = "activations." + edit.point.replace(".", "_").replace(":", "__")
    kind = {(8, True): torch.int8, (8, False): torch.uint8, (16, True): torch.int16, (16, False): torch.uint16}[
        8 if edit.bits <= 8 else 16, edit.signed
    ]
    device = next((t.device for t in module.state_dict().values()), torch.device("cpu"))
    put_tensor(module, base + ".step", torch.tensor(edit.step, dtype=torch.float32, device=device), buffer=True)
    put_tensor(module, base + ".zero_point", torch.tensor(edit.zero_point, dtype=kind, device=device), buffer=True)
    users = list(node.users)
    bottom, top = (low - edit.zero_point) * edit.step, (high - edit.zero_point) * edit.step
    after = [n for n in graph.nodes if n.op == "placeholder"][-1] if node.op == "placeholder" else node
    with graph.inserting_after(after):
        zero = graph.get_attr(base + ".zero_point")
    with graph.inserting_after(after):
        step = graph.get_attr(base + ".step")
    with graph.inserting_after(zero):
        rounded = graph.call_function(torch.ops.gossamer.quantize_dequantize.default, (node, step, zero, low, high))
    rounded.meta.update({k: node.meta[k] for k in ("val", "tensor_meta", "nn_module_stack") if k in node.meta})
    for user in users:
        user.replace_input_with(node, rounded)
    while op_name(node) in CLIP and len(node.users) == 1 and _implied(node, bottom, top):
        before = node.args[0]
        assert isinstance(before, fx.Node)
        rounded.replace_input_with(node, before)
        graph.erase_node(node)
        node = before
    return rounded, edit.step


def _implied(clip: fx.Node, bottom: float, top: float) -> bool:
    """Whether a clip leaves every value in ``[bottom, top]``, up to rounding, as it is."""
    found = clip_range(clip)
    if found is None:
        return False
    floor, ceiling = found
    slack = 1e-6 * max(abs(bottom), abs(top))
    return (floor is None or bottom >= floor - slack) and (ceiling is None or top <= ceiling + slack)


def clip_range(clip: fx.Node) -> tuple[float | None, float | None] | None:
    """What a clip clips to, below and above (None: it does not); None where that is computed."""
    arguments = list(clip.args[1:]) + list(clip.kwargs.values())
    if any(isinstance(a, fx.Node) for a in arguments):
        return None
    match op_name(clip):
        case "relu":
            return 0.0, None
        case "relu6":
            return 0.0, 6.0
        case "hardtanh":
            return tuple((list(clip.args[1:]) + [-1.0, 1.0][len(clip.args) - 1 :])[:2])  # type: ignore[return-value]
    given = dict(zip(("min", "max"), clip.args[1:], strict=False)) | dict(clip.kwargs)
    return given.get("min"), given.get("max")  # type: ignore[return-value]


def _store_weight(module: fx.GraphModule, layers: list[fx.Node], edit: QuantizeWeight) -> None:
    graph = module.graph
    node = next(n for n in layers[0].all_input_nodes if n.op == "get_attr" and n.target == edit.tensor)
    w = tensor_at(module, edit.tensor)
    count = 1 if edit.axis is None else w.shape[edit.axis]
    if len(edit.steps) != count or len(edit.zero_points) != count:
        raise PlanError(f"{edit.tensor} has {count} channels along {edit.axis}, the plan {len(edit.steps)} steps")
    step = torch.tensor(edit.steps if edit.axis is not None else edit.steps[0], dtype=torch.float32, device=w.device)
    put_tensor(module, edit.tensor, codes(w, step, edit.bits, edit.axis, signed=edit.signed), buffer=True)
    put_tensor(module, edit.tensor + "_step", step, buffer=True)
    if not edit.signed:
        points = edit.zero_points if edit.axis is not None else edit.zero_points[0]
        put_tensor(module, edit.tensor + "_zero_point", torch.tensor(points, dtype=torch.uint8, device=w.device), buffer=True)
    with graph.inserting_after(node):
        zero = None if edit.signed else graph.get_attr(edit.tensor + "_zero_point")
    with graph.inserting_after(node):
        scale = graph.get_attr(edit.tensor + "_step")
    with graph.inserting_after(zero or scale):
        back = graph.call_function(torch.ops.gossamer.dequantize.default, (node, scale, zero, edit.axis))
    back.meta.update({k: node.meta[k] for k in ("val", "tensor_meta") if k in node.meta})
    for user in list(node.users):
        if user is not back:
            user.replace_input_with(node, back)


def _store_bias(
    module: fx.GraphModule, layer: fx.Node, edit: QuantizeWeight, use: int, steps: dict[fx.Node, tuple[fx.Node, float]]
) -> None:
    """Store the bias of one call as int32 codes of step ``input step * weight step``; a layer without one gets zeros."""
    rounding = dict(steps.values())
    assert isinstance(layer.args[0], fx.Node)
    origin = source(layer.args[0])
    if origin not in rounding:
        return
    old, w = bias_node(layer), tensor_at(module, edit.tensor)
    if old is not None and old.op != "get_attr":
        return
    b = torch.zeros(w.shape[0], device=w.device) if old is None else tensor_at(module, old.target).detach().float()
    step = torch.tensor(edit.steps, dtype=torch.float32, device=w.device) * rounding[origin]
    name = bias_name(edit.tensor) + (f"_{use}" if use else "")
    put_tensor(module, name, bias_codes(b, step), buffer=True)
    put_tensor(module, name + "_step", step.expand(w.shape[0]).contiguous(), buffer=True)
    graph = module.graph
    with graph.inserting_before(layer):
        q, s = graph.get_attr(name), graph.get_attr(name + "_step")
        back = graph.call_function(torch.ops.gossamer.dequantize.default, (q, s, None, 0))
    back.meta["val"] = layer.meta["val"].new_empty(w.shape[0])
    set_bias(layer, back)


def bias_name(weight: str) -> str:
    """Where the integer bias of a layer is stored, from the name of its weight.

    Examples:
        >>> bias_name("features.0.weight")
        'features.0.bias_codes'
    """
    return weight.removesuffix("weight").rstrip(".") + ".bias_codes" if weight.endswith(".weight") else weight + "_bias_codes"


def bias_codes(bias: Tensor, step: Tensor) -> Tensor:
    """A bias as int32 codes: ``round(bias / step)``.

    Examples:
        >>> bias_codes(torch.tensor([0.5, -1.0]), torch.tensor([0.25, 0.5]))
        tensor([ 2, -2], dtype=torch.int32)
    """
    return (bias.double() / step.double()).round_().clamp_(-(2**31) + 1, 2**31 - 1).to(torch.int32)


def least_steps(bias: Tensor, input_step: float) -> Tensor:
    """The smallest weight steps with which a bias still fits int32, a factor 2 to spare: ``|b| / (input_step 2^30)``."""
    return bias.abs().float() / (input_step * 2.0**30)
