"""One stage of a cut chain as a module: what it is given, what it hands on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gossamer.parallel.pipeline.chain import Chain
from gossamer.parallel.pipeline.cutting import Cut


@dataclass(frozen=True)
class Stage:
    """A part of a network.

    Attributes:
        index: from 0.
        module: takes what the stage before hands on (the first stage: its inputs), and the inputs it needs by name; returns a tuple.
        needed: positions among the network's flat inputs of those it needs.
        received: examples, without data, of what it takes by position.
        sent: the same of what it returns.
    """

    index: int
    module: fx.GraphModule = field(repr=False)
    needed: tuple[int, ...]
    received: tuple[Tensor, ...] = field(repr=False)
    sent: tuple[Tensor, ...] = field(repr=False)


def stage_of(chain: Chain, cut: Cut, index: int) -> Stage:
    """Take one stage out of a chain.

    Examples:
        >>> from torch import nn
        >>> from gossamer.parallel.pipeline import chain_of, cut_chain
        >>> chain = chain_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.zeros(3, 4),))
        >>> cut = cut_chain(chain, 2, [1.0, 0.1, 1.0], 1e9)
        >>> stages = [stage_of(chain, cut, i) for i in range(2)]
        >>> [[n for n, _ in s.module.named_parameters()] for s in stages], stages[1].module(stages[0].module(torch.ones(3, 4))[0])[0].shape
        ([['0.weight', '0.bias'], ['2.weight', '2.bias']], torch.Size([3, 2]))

    Args:
        chain: of the network.
        cut: of the chain.
        index: of the stage.
    """
    first, end = cut.positions[index], cut.positions[index + 1]
    operations, last = chain.operations[first:end], end == len(chain.operations)
    entering = () if index == 0 else chain.crossing[first]
    output = next(n for n in chain.graph.graph.nodes if n.op == "output")
    leaving: tuple[Any, ...] = tuple(pytree.tree_leaves(output.args[0])) if last else chain.crossing[end]
    used = {n for o in operations for n in o.all_input_nodes} | {n for n in leaving if isinstance(n, fx.Node)}
    needed = tuple(i for i, n in enumerate(chain.inputs) if n in used)
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for n in (*entering, *(chain.inputs[i] for i in needed)):
        made[n] = graph.placeholder(f"given_{n.name}")
    for n in chain.graph.graph.nodes:
        if n.op == "get_attr" and n in used:
            made[n] = graph.node_copy(n)
    for n in operations:
        made[n] = graph.node_copy(n, lambda x: made[x])
    handed = []
    for n in leaving:
        value = made[n] if isinstance(n, fx.Node) else n
        if not last:
            value = graph.call_function(torch.ops.aten.contiguous.default, (value,))  # as messages have to be
        handed.append(value)
    graph.output(tuple(handed))
    module = fx.GraphModule(chain.graph, graph, class_name=f"Stage{index}")
    return Stage(
        index,
        module,
        needed,
        tuple(_blank(n, learned=True) for n in entering) if index else tuple(_blank(chain.inputs[i], learned=False) for i in needed),
        tuple(_blank(n, learned=True) for n in leaving if isinstance(n, fx.Node)),
    )


def _blank(node: fx.Node, *, learned: bool) -> Tensor:
    value = node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device="meta", requires_grad=learned and value.is_floating_point())
