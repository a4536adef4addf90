"""A quantised network in the operations that ExecuTorch's XNNPACK partitioner takes: the same steps, zero points and codes, as int8.

XNNPACK runs a layer in integers where its input, its weight and its output are rounded. Where the output is float, it rounds the input itself, by each
sample's range; where the input is float, the layer is float.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gossamer.errors import ExportError
from gossamer.quantization import layer_ops, ops
from gossamer.quantization.build import clip_range
from gossamer.quantization.graph import CLIP, LINEAR, is_float, op_name, put_tensor, tensor_at, weighted_nodes
from gossamer.quantization.points import source
from gossamer.trace.capture import quiet

_ROUND = torch.ops.gossamer.quantize_dequantize.default
_BACK = torch.ops.gossamer.dequantize.default


@dataclass(frozen=True)
class _Rounding:
    """How an activation is rounded to int8."""

    step: float
    zero: int


def xnnpack_form(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Write a quantised network with the quantise and dequantise operations of ``quantized_decomposed``.

    Args:
        model: what `gossamer.quantize` gave, or a network that holds such graphs; it is not changed.

    Returns:
        A copy that computes the same, and one line for each thing that ExecuTorch will compute otherwise.

    Raises:
        ExportError: it holds an operation on integers that has no form there.
    """
    with quiet():
        import torch.ao.quantization.fx._decomposed
    assert ops.limits(8, True) == (-128, 127) and layer_ops.table  # the operators are registered
    model = copy.deepcopy(model)
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            with torch.no_grad():
                _rewrite(module, found)
    return model, tuple(f"{line} ({n})" for line, n in found.items())


def _rewrite(module: fx.GraphModule, found: Counter[str]) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.gossamer.dynamic_lstm.default:
            raise ExportError("an LSTM on integers has no form in ExecuTorch: export the float network, or give format 'onnx'")
        if node.target is torch.ops.gossamer.dynamic_linear.default:
            _dynamic_linear(module, node)
        elif node.target in (torch.ops.gossamer.grouped_linear.default, torch.ops.gossamer.table.default):
            _by_value(module, node, found)
    _plain_clips(graph)
    rounded = _round_activations(module, found)
    for layer in list(weighted_nodes(graph)):
        _weight(module, layer, rounded, found)
    for node in list(graph.nodes):
        if node.target is _BACK:  # of a bias, or of a weight that is left in float
            node.replace_all_uses_with(_constant(module, node, _value(module, node)))
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    from gossamer.quantization.canonical import drop_unused

    drop_unused(module)


def _round_activations(module: fx.GraphModule, found: Counter[str]) -> dict[fx.Node, _Rounding]:
    """Write each rounding, and one behind each operation that only moves rounded values; return how each dequantised value is rounded."""
    graph = module.graph
    how: dict[fx.Node, _Rounding] = {}
    for node in list(graph.nodes):
        if node.target is _ROUND:
            rounding = _rounding(module, node)
            if rounding is None:
                found["activations of 16 bits are float there"] += 1
                step, zero = (tensor_at(module, str(a.target)) for a in node.args[1:3])
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_held(graph, node, float(step), int(zero), *node.args[3:5]))
            else:
                how[node] = rounding
    moved = [(n, how[s]) for n in graph.nodes if n not in how and n.op == "call_function" and is_float(n) and (s := source(n)) in how]
    made: dict[fx.Node, _Rounding] = {}
    for node, rounding in [*how.items(), *moved]:
        value: Any = node.args[0] if node in how else node
        users = list(node.users)
        with graph.inserting_before(node.next):
            if node in how:
                value = _limited(graph, node, rounding, value)
            marked = graph.call_function(_decomposed("quantize_per_tensor"), (value, rounding.step, rounding.zero, -128, 127, torch.int8))
        marked.meta["val"] = node.meta["val"].to(torch.int8)
        for user in users:  # one for each reader: the partitioner takes them into the reader's kernel
            with graph.inserting_before(user):
                back = graph.call_function(
                    _decomposed("dequantize_per_tensor"), (marked, rounding.step, rounding.zero, -128, 127, torch.int8)
                )
            back.meta["val"] = node.meta["val"]
            user.replace_input_with(node, back)
            made[back] = rounding
    for node in reversed(how):
        graph.erase_node(node)
    _round_parts(graph, made)
    _joins_apart(graph, made, found)
    return made


def _round_parts(graph: fx.Graph, made: dict[fx.Node, _Rounding]) -> None:
    """Round what a concatenation joins as its result is rounded, which changes nothing: XNNPACK joins codes of one step only."""
    for node in [n for n in graph.nodes if op_name(n) == "cat"]:
        users = list(node.users)
        if len(users) != 1 or users[0].target is not _decomposed("quantize_per_tensor"):
            continue
        rounding = _Rounding(*users[0].args[1:3])
        for part in [p for p in node.all_input_nodes if made.get(p, rounding) != rounding]:
            with graph.inserting_before(node):
                _, back = _both(graph, part, rounding)
            node.replace_input_with(part, back)
            made[back] = rounding


def _both(graph: fx.Graph, x: fx.Node, rounding: _Rounding) -> tuple[fx.Node, fx.Node]:
    how = (rounding.step, rounding.zero, -128, 127, torch.int8)
    codes = graph.call_function(_decomposed("quantize_per_tensor"), (x, *how))
    back = graph.call_function(_decomposed("dequantize_per_tensor"), (codes, *how))
    codes.meta["val"], back.meta["val"] = x.meta["val"].to(torch.int8), x.meta["val"]
    return codes, back


def _rounding(module: fx.GraphModule, node: fx.Node) -> _Rounding | None:
    """None where the codes have 16 bits."""
    step, zero = (tensor_at(module, str(a.target)) for a in node.args[1:3])  # type: ignore[union-attr]
    low, high = int(node.args[3]), int(node.args[4])  # type: ignore[arg-type]
    if high - low > 255:
        return None
    return _Rounding(float(step), int(zero) - (128 if low >= 0 else 0))


def _limited(graph: fx.Graph, node: fx.Node, rounding: _Rounding, value: Any) -> Any:
    """A value held to the range of codes of fewer than 8 bits."""
    low, high = (int(a) - (128 if int(node.args[3]) >= 0 else 0) for a in node.args[3:5])  # type: ignore[arg-type]
    return value if (low, high) == (-128, 127) else _held(graph, node, rounding.step, rounding.zero, low, high)


def _held(graph: fx.Graph, node: fx.Node, step: float, zero: int, low: Any, high: Any) -> fx.Node:
    """What a rounding node reads, held to the range of its codes: an activation before it may be done by that alone."""
    held = graph.call_function(torch.ops.aten.hardtanh.default, (node.args[0], (low - zero) * step, (high - zero) * step))
    held.meta["val"] = node.meta["val"]
    return held


def _weight(module: fx.GraphModule, layer: fx.Node, rounded: dict[fx.Node, _Rounding], found: Counter[str]) -> None:
    """A layer's weight as int8, with one step for each channel, where XNNPACK runs the layer in integers."""
    graph, back = module.graph, layer.args[1]
    if not isinstance(back, fx.Node) or back.target is not _BACK:
        return
    x = layer.args[0]
    after = _rounding_after(layer) if x in rounded else None
    static = after is not None and _near(rounded[x].step * tensor_at(module, str(back.args[1].target)) / after.step)  # type: ignore[index, union-attr]
    if not static and not (layer.args[0] in rounded and op_name(layer) in LINEAR):
        why = "input is float" if x not in rounded else "output is float" if after is None else "steps are too far apart for XNNPACK"
        found[f"layers whose {why} run in float there, weights included"] += 1
        return
    codes = _constant(module, back, _codes(module, back), "_codes")
    step, axis = tensor_at(module, str(back.args[1].target)), back.args[3]  # type: ignore[union-attr]
    with graph.inserting_before(layer):
        if axis is None and static:
            w = graph.call_function(_decomposed("dequantize_per_tensor"), (codes, float(step), 0, -128, 127, torch.int8))
        else:
            count = codes.meta["val"].shape[axis or 0]
            steps = _constant(module, back, step.expand(count).contiguous(), "_steps")
            zeros = _constant(module, back, torch.zeros(count, dtype=torch.int64), "_zeros")
            w = graph.call_function(_decomposed("dequantize_per_channel"), (codes, steps, zeros, axis or 0, -128, 127, torch.int8))
    w.meta["val"] = back.meta["val"]
    layer.update_arg(1, w)
    if not static:
        found["linear layers with a float output round their input once more, by each sample's range"] += 1
        layer.update_arg(0, _round_by_range(graph, layer, layer.args[0]))


def _rounding_after(layer: fx.Node) -> _Rounding | None:
    """How what a layer gives is rounded, past one activation that XNNPACK takes into the layer; None where it is float."""
    users = list(layer.users)
    if len(users) == 1 and op_name(users[0]) in ("relu", "hardtanh"):
        users = list(users[0].users)
    alone = len(users) == 1 and users[0].target is _decomposed("quantize_per_tensor")
    return _Rounding(*users[0].args[1:3]) if alone else None  # type: ignore[arg-type]


def _near(ratios: Tensor) -> bool:
    """Whether XNNPACK's kernels for integers can get from the step of products to that of the output."""
    return bool((ratios < 256).all())


def _joins_apart(graph: fx.Graph, made: dict[fx.Node, _Rounding], found: Counter[str]) -> None:
    """Sums and products of steps too far apart for XNNPACK in float: a clip that changes nothing keeps its partitioner from taking them."""
    for node in [n for n in graph.nodes if op_name(n) in ("add", "sub", "mul")]:
        parts, after = [made[p].step for p in node.all_input_nodes if p in made], _rounding_after(node)
        if after is None or not parts:
            continue
        product = op_name(node) == "mul"
        ratios = [math.prod(parts if len(parts) > 1 else parts * 2) / after.step] if product else [p / after.step for p in parts]
        if 2.0 ** (-16 if product else -10) <= min(ratios) and max(ratios) < 256:
            continue
        (codes,) = node.users
        with graph.inserting_before(codes):
            held = graph.call_function(
                torch.ops.aten.hardtanh.default, (node, (-128 - after.zero) * after.step, (127 - after.zero) * after.step)
            )
        held.meta["val"] = node.meta["val"]
        codes.replace_input_with(node, held)
        found["sums and products of steps too far apart for XNNPACK are float there"] += 1


def _round_by_range(graph: fx.Graph, layer: fx.Node, x: Any) -> fx.Node:
    """The input of a layer, rounded when it runs."""
    with graph.inserting_before(layer):
        chosen = graph.call_function(_decomposed("choose_qparams", "tensor"), (x, -128, 127, 1e-9, torch.int8))
        step = graph.call_function(operator.getitem, (chosen, 0))
        zero = graph.call_function(operator.getitem, (chosen, 1))
        codes = graph.call_function(_decomposed("quantize_per_tensor", "tensor"), (x, step, zero, -128, 127, torch.int8))
        back = graph.call_function(_decomposed("dequantize_per_tensor", "tensor"), (codes, step, zero, -128, 127, torch.int8))
    back.meta["val"] = x.meta["val"]
    return back


def _dynamic_linear(module: fx.GraphModule, node: fx.Node) -> None:
    """A linear layer on an input that is rounded when it runs."""
    graph = module.graph
    x, q, step, zero, bias = node.args
    codes, steps = (tensor_at(module, str(a.target)) for a in (q, step))  # type: ignore[union-attr]
    if zero is not None:
        codes = codes.to(torch.int16) - ops.along(tensor_at(module, str(zero.target)), codes, 0).to(torch.int16)  # type: ignore[union-attr]
    count = codes.shape[0]
    held = (_constant(module, q, codes.to(torch.int8), "_codes"), _constant(module, q, steps.expand(count).contiguous(), "_steps"))
    with graph.inserting_before(node):
        zeros = _constant(module, q, torch.zeros(count, dtype=torch.int64), "_zeros")
        w = graph.call_function(_decomposed("dequantize_per_channel"), (*held, zeros, 0, -128, 127, torch.int8))
        linear = graph.call_function(torch.ops.aten.linear.default, (x, w, bias))
    linear.meta["val"] = node.meta["val"]
    linear.update_arg(0, _round_by_range(graph, linear, x))
    node.replace_all_uses_with(linear)
    graph.erase_node(node)


def _by_value(module: fx.GraphModule, node: fx.Node, found: Counter[str]) -> None:
    """A table, or a linear layer with steps for groups, with float weights."""
    given: list[Any] = [_held_at(module, a) for a in node.args]
    with module.graph.inserting_before(node):
        if node.target is torch.ops.gossamer.table.default:
            rows = layer_ops.table(*given[:3], torch.arange(given[0].shape[0]))
            made = module.graph.call_function(torch.ops.aten.embedding.default, (_constant(module, node.args[0], rows), node.args[3]))
            found["embeddings are float there"] += 1
        else:
            w = layer_ops.grouped_linear(torch.eye(given[1].shape[1]), given[1], given[2], None, *given[4:]).T.contiguous()
            arguments = (node.args[0], _constant(module, node.args[1], w), node.args[3])
            made = module.graph.call_function(torch.ops.aten.linear.default, arguments)
            found["linear layers with steps for groups are float there"] += 1
    made.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _held_at(module: fx.GraphModule, argument: Any) -> Any:
    """The tensor that a node stands for, where it is a constant."""
    constant = isinstance(argument, fx.Node) and argument.op == "get_attr"
    return tensor_at(module, str(argument.target)) if constant else argument


def _plain_clips(graph: fx.Graph) -> None:
    """Clamps as the activations that XNNPACK takes into a layer."""
    for node in list(graph.nodes):
        if op_name(node) not in CLIP - {"relu", "hardtanh"} or (limits := clip_range(node)) is None:
            continue
        low, high = limits
        with graph.inserting_before(node):
            if low == 0 and high is None:
                plain = graph.call_function(torch.ops.aten.relu.default, (node.args[0],))
            elif low is not None and high is not None:
                plain = graph.call_function(torch.ops.aten.hardtanh.default, (node.args[0], float(low), float(high)))
            else:
                continue
        plain.meta.update({k: node.meta[k] for k in ("val", "nn_module_stack") if k in node.meta})
        node.replace_all_uses_with(plain)
        graph.erase_node(node)


def _codes(module: fx.GraphModule, back: fx.Node) -> Tensor:
    """Integers around zero."""
    q = tensor_at(module, str(back.args[0].target))  # type: ignore[union-attr]
    if back.args[2] is None:
        return q
    zero = tensor_at(module, str(back.args[2].target))  # type: ignore[union-attr]
    return (q.to(torch.int16) - ops.along(zero, q, back.args[3]).to(torch.int16)).to(torch.int8)  # type: ignore[arg-type]


def _value(module: fx.GraphModule, back: fx.Node) -> Tensor:
    q, step, zero = (None if a is None else tensor_at(module, str(a.target)) for a in back.args[:3])  # type: ignore[union-attr]
    made: Tensor = ops.dequantize(q, step, zero, back.args[3])
    return made


def _constant(module: fx.GraphModule, like: Any, value: Tensor, tail: str = "_value") -> fx.Node:
    """A tensor held by the module, as a node; ``like`` gives the name, and is where the node goes."""
    origin = like if like.op == "get_attr" else like.args[0]
    name = str(origin.target) + tail
    put_tensor(module, name, value.detach().clone(), buffer=True)
    first = next(iter(module.graph.nodes))
    with module.graph.inserting_before(first):
        node = module.graph.get_attr(name)
    node.meta["val"] = value
    return node


def _decomposed(name: str, overload: str = "default") -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(getattr(torch.ops.quantized_decomposed, name), overload)
    return found
