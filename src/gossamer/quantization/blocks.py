"""Blocks of a network: the pieces between nodes that everything passes through."""

from __future__ import annotations

from torch import fx

from gossamer.quantization.graph import WEIGHTED, is_float, op_name


def block_ends(graph: fx.Graph, layers: int = 3) -> list[fx.Node]:
    """Nodes at which a captured graph can be cut so that only their value is passed on, each at least ``layers`` weighted layers after the one before.

    Inside a residual branch there is none, so that a residual block is never cut in two. What is not float (sizes, masks of integers) does not count.

    Example:
        >>> from torch import nn
        >>> from gossamer.trace.capture import capture
        >>> import torch
        >>> net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(7)])
        >>> [n.name for n in block_ends(capture(net, (torch.zeros(1, 4),)).graph)]
        ['linear_2', 'linear_5']

    Args:
        graph: a captured graph.
        layers: convolutions and linear layers that a block has at least.

    Returns:
        The last node of each block, in execution order; what comes after the last of them belongs to the outputs.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    last_use = {n: max((order[u] for u in n.users), default=order[n]) for n in order if n.op != "get_attr"}
    alive: set[fx.Node] = set()
    found, inside = list[fx.Node](), 0
    outputs = {a for n in graph.nodes if n.op == "output" for a in n.all_input_nodes}
    for node in graph.nodes:
        inside += op_name(node) in WEIGHTED
        alive = {n for n in alive if last_use[n] > order[node]}
        if node.op in ("placeholder", "call_function") and is_float(node):
            alive.add(node)
        if alive == {node} and inside >= layers and node.op == "call_function" and node not in outputs:
            found.append(node)
            inside = 0
    return found
