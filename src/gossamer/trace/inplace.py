"""In-place operations of an exported graph as ordinary ones, where nothing else can see what they overwrite.

torch's own pass is right for every graph, but runs each in-place operator through Python; what it finds already done it does not do again.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

_FRESH = frozenset(
    """add sub mul div cat stack linear matmul bmm addmm conv1d conv2d conv3d convolution batch_norm layer_norm group_norm mean relu relu6 hardtanh
    hardswish hardsigmoid silu sigmoid tanh gelu elu leaky_relu max_pool2d avg_pool2d adaptive_avg_pool2d""".split()
)
"""Operators whose result never shares memory with an input."""


def without_inplace(graph: fx.Graph) -> int:
    """Rewrite in place; how many operations. One is left alone whose value may be seen under another name, or changes type.

    Examples:
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return (x + 1).relu_().view(-1).mul_(2)
        >>> graph = torch.export.export(Net(), (torch.zeros(2, 3),)).graph
        >>> without_inplace(graph), [n.target.__name__ for n in graph.nodes if n.op == "call_function"]
        (1, ['add.Tensor', 'relu.default', 'view.default', 'mul_.Tensor'])
    """
    place, changed = {n: i for i, n in enumerate(graph.nodes)}, 0
    for node in graph.nodes:
        ordinary = _ordinary(node)
        if ordinary is None:
            continue
        x = node.args[0]
        users = list(x.users)
        if any(place[n] < place[node] and not _is_fresh(n) for n in users):
            continue  # a view of it, perhaps
        node.target = ordinary
        for user in users:
            if place[user] > place[node]:
                user.replace_input_with(x, node)
        changed += 1
    return changed


def _ordinary(node: fx.Node) -> torch._ops.OpOverload | None:
    """What computes the same without writing, where the value that is written is the result of an operator that gives new memory."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten" or not op._schema.is_mutable:
        return None
    name, x = op._schema.name.removeprefix("aten::"), node.args[0] if node.args else None
    written = [a for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not name.endswith("_") or len(written) != 1 or not isinstance(x, fx.Node) or not _is_fresh(x):
        return None
    tensors = [n.meta.get("val") for n in node.all_input_nodes]
    kinds = {t.dtype for t in tensors if isinstance(t, Tensor)}
    if len(kinds) != 1 or not next(iter(kinds)).is_floating_point:
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, op._overloadname, None) if name[:-1] in _FRESH else None


def _is_fresh(node: fx.Node) -> bool:
    """Whether a node's result is new memory."""
    op = node.target
    return isinstance(op, torch._ops.OpOverload) and op.namespace == "aten" and op._schema.name.removeprefix("aten::") in _FRESH
