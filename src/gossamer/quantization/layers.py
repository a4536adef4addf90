"""Edits that change whole layers of a canonical graph: inputs rounded when they run, steps by group, integer tables."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gossamer.errors import PlanError, near
from gossamer.plan import QuantizeGroups, QuantizeInput, QuantizeWeight
from gossamer.quantization import layer_ops
from gossamer.quantization.graph import LINEAR, bias_node, op_name, put_tensor, tensor_at, weight_name, weighted_nodes
from gossamer.quantization.grouped import group_codes, unpack_steps
from gossamer.quantization.ops import along, limits

assert layer_ops.table  # the operators are registered


def tables(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Embeddings by the name of their weight."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if op_name(node) == "embedding" and isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr":
            found.setdefault(str(node.args[0].target), []).append(node)
    return found


def store_layers(module: fx.GraphModule, edits: Sequence[Any]) -> set[str]:
    """Carry out what concerns whole layers and must come before weights are stored; the names of the weights that are done."""
    weights = {e.tensor: e for e in edits if isinstance(e, QuantizeWeight)}
    done: set[str] = set()
    linear = {n: [x for x in weighted_nodes(module.graph) if weight_name(x) == n] for n in map(weight_name, weighted_nodes(module.graph))}
    for edit in (e for e in edits if isinstance(e, QuantizeGroups)):
        nodes = linear.get(edit.tensor, [])
        if not nodes or any(op_name(n) not in LINEAR for n in nodes):
            raise PlanError(f"the network has no linear weight {edit.tensor!r}{near(edit.tensor, filter(None, linear))}")
        _store_groups(module, nodes, edit)
    dynamic = [e.tensor for e in edits if isinstance(e, QuantizeInput)]
    _smooth(module, {e.tensor: e for e in edits if isinstance(e, QuantizeInput) and e.factors}, linear)
    for node in [n for n in module.graph.nodes if op_name(n) == "lstm"]:
        names = [str(w.target) for w in node.args[2]]
        if names[0] in dynamic:
            _store_lstm(module, node, weights)
            done.update(n for n in names if n in weights)
    missing = [n for n in dynamic if n not in done and n not in linear]
    if missing:
        raise PlanError(f"the network has no linear or recurrent weight {missing[0]!r}{near(missing[0], filter(None, linear))}")
    return done


def fuse_layers(module: fx.GraphModule, edits: Sequence[Any]) -> None:
    """Carry out what follows when weights are stored: linear layers that round their input, rows taken from integer tables."""
    dynamic = {e.tensor for e in edits if isinstance(e, QuantizeInput)}
    graph = module.graph
    for node in list(graph.nodes):
        position = {"linear": 1, "embedding": 0}.get(op_name(node))
        back = node.args[position] if position is not None else None
        if not isinstance(back, fx.Node) or back.target is not torch.ops.gossamer.dequantize.default:
            continue
        q, step, zero, _ = back.args
        assert isinstance(q, fx.Node)
        if position == 0:
            new: tuple[Any, ...] = (torch.ops.gossamer.table.default, (q, step, zero, node.args[1]))
        elif str(q.target) in dynamic:
            new = (torch.ops.gossamer.dynamic_linear.default, (node.args[0], q, step, zero, bias_node(node)))
        else:
            continue
        _replace(graph, node, *new)


def _smooth(module: fx.GraphModule, edits: dict[str, QuantizeInput], linear: dict[Any, list[fx.Node]]) -> None:
    """Divide inputs by factors, once for all layers that share input and factors, and multiply the weights by them."""
    made: dict[tuple[fx.Node, tuple[float, ...]], fx.Node] = {}
    for name, edit in edits.items():
        for node in linear.get(name, []):
            x = node.args[0]
            assert isinstance(x, fx.Node)
            w = tensor_at(module, name).detach()
            if len(edit.factors) != w.shape[1]:
                raise PlanError(f"{name} has {w.shape[1]} input features, the plan {len(edit.factors)} factors")
            if (x, edit.factors) not in made:
                inverse = (1 / torch.tensor(edit.factors, dtype=torch.float64)).to(w)
                put_tensor(module, name + "_factors", inverse, buffer=True)
                with module.graph.inserting_before(node):
                    by = module.graph.get_attr(name + "_factors")
                    made[x, edit.factors] = module.graph.call_function(torch.ops.aten.mul.Tensor, (x, by))
                made[x, edit.factors].meta.update({k: x.meta[k] for k in ("val", "tensor_meta") if k in x.meta})
            node.args = (made[x, edit.factors], *node.args[1:])
        if linear.get(name):
            put_tensor(module, name, smoothed(tensor_at(module, name).detach(), edit.factors), buffer=False)


def smoothed(w_NK: Tensor, factors: Sequence[float]) -> Tensor:
    """A weight whose input features are multiplied by factors, where there are some."""
    return w_NK * torch.tensor(factors, dtype=torch.float32).to(w_NK) if factors else w_NK


def _replace(graph: fx.Graph, node: fx.Node, call: Any, arguments: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(call, arguments)
    new.meta.update({k: node.meta[k] for k in ("val", "tensor_meta", "nn_module_stack") if k in node.meta})
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _store_groups(module: fx.GraphModule, nodes: list[fx.Node], edit: QuantizeGroups) -> None:
    w = tensor_at(module, edit.tensor)
    groups = -(-w.shape[1] // edit.group)
    step = unpack_steps(edit.steps, (w.shape[0], groups)).to(w.device)
    put_tensor(module, edit.tensor, group_codes(w.detach(), step, edit.bits, edit.group), buffer=True)
    put_tensor(module, edit.tensor + "_step", step, buffer=True)
    weight = nodes[0].args[1]
    assert isinstance(weight, fx.Node)
    with module.graph.inserting_after(weight):
        steps = module.graph.get_attr(edit.tensor + "_step")
    for node in nodes:
        arguments = (node.args[0], weight, steps, bias_node(node), edit.group, edit.bits)
        _replace(module.graph, node, torch.ops.gossamer.grouped_linear.default, arguments)


def _store_lstm(module: fx.GraphModule, node: fx.Node, weights: dict[str, QuantizeWeight]) -> None:
    """An LSTM as one operator for each of its layers, weights as ONNX lays them out."""
    x, hidden, parameters, has_biases, layers, _, _, bidirectional, batch_first = node.args
    assert isinstance(parameters, list | tuple) and isinstance(hidden, list | tuple)
    graph, directions = module.graph, 2 if bidirectional else 1
    per = 4 if has_biases else 2
    base = str(parameters[0].target).rpartition(".")[0]  # type: ignore[union-attr]
    call = graph.call_function
    aten = torch.ops.aten
    with graph.inserting_before(node):
        value = call(aten.transpose.int, (x, 0, 1)) if batch_first else x
        last_h, last_c = [], []
        for layer in range(int(layers)):  # type: ignore[arg-type]
            names = [
                [str(p.target) for p in parameters[(layer * directions + d) * per : (layer * directions + d + 1) * per]]  # type: ignore[union-attr]
                for d in range(directions)
            ]
            stored = _lstm_tensors(module, names, weights)
            prefix = f"{base}.layer_{layer}".lstrip(".")
            for key, tensor in stored.items():
                put_tensor(module, f"{prefix}.{key}", tensor, buffer=True)
            reads = [graph.get_attr(f"{prefix}.{key}") for key in ("weight", "recurrent", "weight_step", "recurrent_step", "bias")]
            first = _rows_of(graph, hidden, layer * directions, (layer + 1) * directions)
            zero = 0 if weights[names[0][0]].signed else 1 << (weights[names[0][0]].bits - 1)
            out = call(torch.ops.gossamer.dynamic_lstm.default, (value, *first, *reads, zero))
            value, h, c = (call(operator.getitem, (out, i)) for i in range(3))
            last_h.append(h)
            last_c.append(c)
        y = call(aten.transpose.int, (value, 0, 1)) if batch_first else value
        results = (y, _joined(graph, last_h), _joined(graph, last_c))
    for user in list(node.users):
        user.replace_all_uses_with(results[int(user.args[1])])  # type: ignore[arg-type]
        graph.erase_node(user)
    graph.erase_node(node)


def _rows_of(graph: fx.Graph, states: Sequence[Any], start: int, end: int) -> list[fx.Node]:
    """Rows of both initial states of an LSTM."""
    return [graph.call_function(torch.ops.aten.slice.Tensor, (s, 0, start, end)) for s in states]


def _joined(graph: fx.Graph, parts: list[fx.Node]) -> fx.Node:
    return parts[0] if len(parts) == 1 else graph.call_function(torch.ops.aten.cat.default, (parts, 0))


def _lstm_tensors(module: fx.GraphModule, names: list[list[str]], weights: dict[str, QuantizeWeight]) -> dict[str, Tensor]:
    """Codes, steps and biases of one layer, directions stacked, as ONNX Runtime takes them: (D, inputs, 4 H), gates i, o, f, c."""
    found: dict[str, list[Tensor]] = {"weight": [], "recurrent": [], "weight_step": [], "recurrent_step": [], "bias": []}
    for direction in names:
        for key, name in zip(("weight", "recurrent"), direction, strict=False):
            edit, w = weights[name], tensor_at(module, name).detach()
            step = torch.tensor(edit.steps, dtype=torch.float32, device=w.device)
            low, high = limits(edit.bits, True)
            codes = (w / along(step, w, 0)).round_().clamp_(low, high)
            codes = codes.to(torch.int8) if edit.signed else codes.sub_(low).to(torch.uint8)
            found[key].append(_onnx_gates(codes).t().contiguous())
            found[key + "_step"].append(_onnx_gates(step))
        biases = [tensor_at(module, n).detach() for n in direction[2:]] or [w.new_zeros(len(step)).float()] * 2
        found["bias"].append(torch.cat([_onnx_gates(b) for b in biases]))
    return {key: torch.stack(parts) for key, parts in found.items()}


def _onnx_gates(rows: Tensor) -> Tensor:
    """Rows by gate from torch's order i, f, c, o to ONNX's i, o, f, c."""
    i, f, c, o = rows.chunk(4)
    return torch.cat([i, o, f, c])
