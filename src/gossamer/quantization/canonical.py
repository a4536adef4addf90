"""The captured graph in the form that is quantised: weights constant, batch norm folded, no dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from gossamer.quantization.graph import (
    BATCH_NORM,
    DROPOUT,
    LINEAR,
    TRANSPOSED,
    bias_node,
    is_part,
    op_name,
    put_tensor,
    set_bias,
    tensor_at,
    value,
    weight_name,
    weighted_nodes,
)  # fmt: skip


def canonical(captured: fx.GraphModule) -> fx.GraphModule:
    """Rewrite a captured graph in place: compute constant weights, fold batch norm into what feeds it, drop dropout.

    Examples:
        >>> from gossamer.trace.capture import capture
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Dropout(0.5)).eval()
        >>> graph = canonical(capture(net, (torch.zeros(2, 3, 8, 8),)))
        >>> sorted(graph.state_dict()), bool(torch.allclose(graph(torch.ones(1, 3, 8, 8)), net(torch.ones(1, 3, 8, 8)), atol=1e-6))
        (['0.bias', '0.weight'], True)

    Args:
        captured: what `gossamer.trace.capture.capture` returned.

    Returns:
        The same graph module. A folded convolution has its bias under ``<path>.bias``; ``meta["folded"]`` names the weights that a
        norm was folded into.
    """
    graph = captured.graph
    _one_node_per_tensor(graph)
    for node in list(graph.nodes):
        if op_name(node) in DROPOUT:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    with torch.no_grad():
        _compute_weights(captured)
        _fold_batch_norms(captured)
    graph.eliminate_dead_code()
    drop_unused(captured)
    graph.lint()
    captured.recompile()
    return captured


def drop_unused(module: fx.GraphModule) -> None:
    """Remove every parameter, buffer and submodule that no node reads or calls."""
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    called = {m for n in module.graph.nodes if n.op == "call_module" for m in module.get_submodule(str(n.target)).modules()}
    for path, part in module.named_modules():
        if part in called:
            continue
        prefix = path + "." if path else ""
        for store in (part._parameters, part._buffers):
            for name in [n for n in store if prefix + n not in used]:
                del store[name]
                part._non_persistent_buffers_set.discard(name)
    kept = {name.rpartition(".")[0] for name in used} | {str(n.target) for n in module.graph.nodes if n.op in ("call_module", "get_attr")}
    for path in sorted((p for p, _ in module.named_modules() if p), key=lambda p: -p.count(".")):
        if not any(k == path or k.startswith(path + ".") for k in kept):
            parent, _, leaf = path.rpartition(".")
            delattr(module.get_submodule(parent), leaf)


def _one_node_per_tensor(graph: fx.Graph) -> None:
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            if str(node.target) in first:
                node.replace_all_uses_with(first[str(node.target)])
                graph.erase_node(node)
            else:
                first[str(node.target)] = node


def _compute_weights(module: fx.GraphModule) -> None:
    """Replace a weight or bias that is computed from parameters alone (standardised, parametrised) by its value."""
    graph = module.graph
    for layer in list(weighted_nodes(graph)):
        for argument in layer.args[1:3]:
            if not isinstance(argument, fx.Node) or argument.op == "get_attr":
                continue
            closure = _constant_closure(argument)
            if closure is None:
                continue
            sources = [n for n in closure if n.op == "get_attr"]
            own = [n for n in sources if all(u in closure for u in n.users)]
            name = str(own[0].target) if len(own) == 1 else f"{sources[0].target!s}_computed" if sources else f"{layer.name}_weight"
            put_tensor(module, name, _evaluate(module, argument, closure).detach().clone(), buffer=False)
            with graph.inserting_before(argument):
                constant = graph.get_attr(name)
            constant.meta.update({k: argument.meta[k] for k in ("val", "tensor_meta") if k in argument.meta})
            argument.replace_all_uses_with(constant)
    graph.eliminate_dead_code()
    _one_node_per_tensor(graph)


def _constant_closure(node: fx.Node) -> set[fx.Node] | None:
    """All nodes that a node depends on, itself included; None where an input of the network is among them."""
    closure: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n in closure:
            continue
        if (
            n.op not in ("get_attr", "call_function")
            or "rand" in str(n.target)
            or (value(n) is None and not isinstance(n.meta.get("val"), list | tuple))
        ):
            return None
        closure.add(n)
        stack += n.all_input_nodes
    return closure


def _evaluate(module: fx.GraphModule, node: fx.Node, closure: set[fx.Node]) -> Tensor:
    values: dict[fx.Node, Any] = {}
    for n in module.graph.nodes:
        if n not in closure:
            continue
        if n.op == "get_attr":
            values[n] = tensor_at(module, str(n.target))
        else:
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), values.__getitem__)
            assert callable(n.target)
            values[n] = n.target(*args, **kwargs)
    result = values[node]
    assert isinstance(result, Tensor)
    return result


def _fold_batch_norms(module: fx.GraphModule) -> None:
    """Fold each norm into the layer that feeds it: ``W' = W s``, ``b' = (b - mean) s + beta`` with ``s = gamma / sqrt(var + eps)``."""
    by_weight: dict[str, list[fx.Node]] = {}
    for layer in weighted_nodes(module.graph):
        if weight_name(layer):
            by_weight.setdefault(str(weight_name(layer)), []).append(layer)
    for name, layers in by_weight.items():
        weight = layers[0].args[1]
        assert isinstance(weight, fx.Node)
        norms = [_norm_after(layer) for layer in layers]
        same = {(_norm_key(n), str(bias_node(layer))) for n, layer in zip(norms, layers, strict=True) if n is not None}
        if set(weight.users) == set(layers) and None not in norms and len(same) == 1:
            _fold(module, name, layers, [n for n in norms if n is not None])


def _norm_after(layer: fx.Node) -> fx.Node | None:
    users = list(layer.users)
    if len(users) != 1 or op_name(users[0]) not in BATCH_NORM or users[0].args[0] is not layer:
        return None
    norm = users[0]
    constant = all(a is None or (isinstance(a, fx.Node) and a.op == "get_attr") for a in norm.args[1:5])
    bias = bias_node(layer)
    out = value(layer)
    flat = op_name(layer) not in LINEAR or (out is not None and out.dim() == 2)
    alone = all(is_part(u) and u.args[1] == 0 for u in norm.users) if str(norm.target).startswith("aten._native") else True
    plain = norm.args[5] is False if "aten.batch_norm" in str(norm.target) else True
    constant_bias = bias is None or (
        isinstance(bias, fx.Node) and bias.op == "get_attr" and all(u.args[1] is layer.args[1] for u in bias.users)
    )
    return norm if constant and flat and alone and plain and constant_bias and norm.args[3] is not None else None


def _norm_key(norm: fx.Node) -> tuple[str, ...]:
    return tuple(str(a) for a in norm.args[1:5]) + (str(norm.args[-1]), str(norm.args[-2]))


def _fold(module: fx.GraphModule, name: str, layers: list[fx.Node], norms: list[fx.Node]) -> None:
    graph, norm, layer = module.graph, norms[0], layers[0]
    gamma, beta, mean, var = (None if a is None else tensor_at(module, str(a.target)) for a in norm.args[1:5])  # type: ignore[union-attr]
    assert mean is not None and var is not None
    native = str(norm.target).startswith("aten._native")
    eps = norm.args[6] if native else norm.args[7]
    w = tensor_at(module, name)
    scale = (var.double() + eps).rsqrt() * (1.0 if gamma is None else gamma.double())  # type: ignore[operator]
    if op_name(layer) in TRANSPOSED:  # (in, out / groups, ...): output channel j of group g is scaled
        groups = int(layer.args[6]) if len(layer.args) > 6 else 1  # type: ignore[arg-type]
        by_group = w.double().unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *[1] * (w.dim() - 2))
        folded = by_group.flatten(0, 1)
    else:
        folded = w.double() * scale.view(-1, *[1] * (w.dim() - 1))
    old = bias_node(layer)
    b = 0.0 if old is None else tensor_at(module, str(old.target)).double()
    shift = (b - mean.double()) * scale + (0.0 if beta is None else beta.double())
    put_tensor(module, name, folded.to(w.dtype), buffer=False)
    bias = name.rpartition(".")[0] + ".bias" if old is None else str(old.target)
    bias = bias.lstrip(".")
    if old is None and any(n.op == "get_attr" and n.target == bias for n in graph.nodes):
        bias = name + "_bias"
    put_tensor(module, bias, shift.to(w.dtype), buffer=False)
    module.meta["folded"] = (*module.meta.get("folded", ()), name)
    with graph.inserting_before(layer):
        node = old if old is not None else graph.get_attr(bias)
    if old is None and norm.args[3] is not None:
        node.meta.update({k: v for k, v in norm.args[3].meta.items() if k in ("val", "tensor_meta")})  # type: ignore[union-attr]
    for each, its in zip(layers, norms, strict=True):
        set_bias(each, node)
        if gamma is not None and beta is not None:
            each.meta["normal"] = (beta.detach().clone(), gamma.detach().abs())
        for user in list(its.users) if native else [its]:
            user.replace_all_uses_with(each)
            graph.erase_node(user)
        if native:
            graph.erase_node(its)


def tensors_with_nan(module: nn.Module) -> list[str]:
    """Names of parameters and buffers that hold NaN or infinity."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return [n for n, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
