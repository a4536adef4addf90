"""A quantised network in the operations that ExecuTorch's XNNPACK partitioner takes: the same steps, zero points and codes, as int8.

XNNPACK runs a layer in integers where its input, its weight and its output are rounded. Where the output is float, it rounds the input itself, by each
sample's range; where the input is float, the layer is float.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from gossamer.errors import ExportError
from gossamer.exporting.executorch_rounding import Rounding, decomposed, round_activations, rounding_after
from gossamer.quantization import layer_ops, ops
from gossamer.quantization.build import clip_range
from gossamer.quantization.graph import CLIP, LINEAR, op_name, put_tensor, tensor_at, weighted_nodes
from gossamer.trace.capture import quiet

_BACK = torch.ops.gossamer.dequantize.default


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
    rounded = round_activations(module, found)
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


def _weight(module: fx.GraphModule, layer: fx.Node, rounded: dict[fx.Node, Rounding], found: Counter[str]) -> None:
    """A layer's weight as int8, with one step for each channel, where XNNPACK runs the layer in integers."""
    graph, back = module.graph, layer.args[1]
    if not isinstance(back, fx.Node) or back.target is not _BACK:
        return
    x = layer.args[0]
    after = rounding_after(layer) if x in rounded else None
    static = after is not None and _near(rounded[x].step * tensor_at(module, str(back.args[1].target)) / after.step)  # type: ignore[index, union-attr]
    if not static and not (layer.args[0] in rounded and op_name(layer) in LINEAR):
        why = "input is float" if x not in rounded else "output is float" if after is None else "steps are too far apart for XNNPACK"
        found[f"layers whose {why} run in float there, weights included"] += 1
        return
    codes = _constant(module, back, _codes(module, back), "_codes")
    step, axis = tensor_at(module, str(back.args[1].target)), back.args[3]  # type: ignore[union-attr]
    with graph.inserting_before(layer):
        if axis is None and static:
            w = graph.call_function(decomposed("dequantize_per_tensor"), (codes, float(step), 0, -128, 127, torch.int8))
        else:
            count = codes.meta["val"].shape[axis or 0]
            steps = _constant(module, back, step.expand(count).contiguous(), "_steps")
            zeros = _constant(module, back, torch.zeros(count, dtype=torch.int64), "_zeros")
            w = graph.call_function(decomposed("dequantize_per_channel"), (codes, steps, zeros, axis or 0, -128, 127, torch.int8))
    w.meta["val"] = back.meta["val"]
    layer.update_arg(1, w)
    if not static:
        found["linear layers with a float output round their input once more, by each sample's range"] += 1
        layer.update_arg(0, _round_by_range(graph, layer, layer.args[0]))


def _near(ratios: Tensor) -> bool:
    """Whether XNNPACK's kernels for integers can get from the step of products to that of the output."""
    return bool((ratios < 256).all())


def _round_by_range(graph: fx.Graph, layer: fx.Node, x: Any) -> fx.Node:
    """The input of a layer, rounded when it runs."""
    with graph.inserting_before(layer):
        chosen = graph.call_function(decomposed("choose_qparams", "tensor"), (x, -128, 127, 1e-9, torch.int8))
        step = graph.call_function(operator.getitem, (chosen, 0))
        zero = graph.call_function(operator.getitem, (chosen, 1))
        codes = graph.call_function(decomposed("quantize_per_tensor", "tensor"), (x, step, zero, -128, 127, torch.int8))
        back = graph.call_function(decomposed("dequantize_per_tensor", "tensor"), (codes, step, zero, -128, 127, torch.int8))
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
        w = graph.call_function(decomposed("dequantize_per_channel"), (*held, zeros, 0, -128, 127, torch.int8))
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
