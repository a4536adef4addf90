"""What rounding one tensor does to the network's outputs, everything else in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

Change = Callable[[Any], Any]
"""What becomes of a node's value."""


class Sensitivity:
    """A float graph run once on some samples, and again from any node on with that node's value changed.

    Examples:
        >>> from gossamer.trace.capture import capture
        >>> graph = capture(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()), (torch.zeros(1, 2),))
        >>> runs = Sensitivity(graph, [torch.ones(3, 2)])
        >>> first = next(n for n in graph.graph.nodes if n.op == "call_function")
        >>> runs.loss(first, lambda value: value), runs.loss(first, lambda value: value + 1) > 0
        (0.0, True)
    """

    def __init__(self, module: fx.GraphModule, leaves: list[Any]) -> None:
        self._runner = _Keeping(module)
        with torch.no_grad():
            self._runner.run(*leaves, enable_io_processing=False)
        self.values = dict(self._runner.env)
        self._nodes = list(module.graph.nodes)
        self._outputs = _tensors(self.values[self._nodes[-1]])

    def loss(self, node: fx.Node, change: Change) -> float:
        """Mean Kullback-Leibler divergence of the outputs from the float ones, in nats, with this node's value changed.

        Outputs of shape (batch, classes) count as logits; others by their squared error over their mean square, halved, which is what the
        divergence of normal distributions of that variance would be.
        """
        with torch.no_grad():
            env = self._runner.env
            env.clear()
            env.update(self.values)
            env[node] = change(self.values[node])
            dirty = {node}
            for n in self._nodes[self._nodes.index(node) + 1 :]:
                if any(i in dirty for i in n.all_input_nodes):
                    env[n] = self._runner.run_node(n)
                    dirty.add(n)
            return divergence(self._outputs, _tensors(env[self._nodes[-1]]))

    def rerun(self, node: fx.Node, inputs: dict[fx.Node, Any]) -> Any:
        """The value of a node with other values of its inputs."""
        self._runner.env.clear()
        self._runner.env.update(self.values | inputs)
        with torch.no_grad():
            return self._runner.run_node(node)


class _Keeping(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)


def divergence(wanted: Iterable[Tensor], got: Iterable[Tensor]) -> float:
    """Mean over the outputs of what `Sensitivity.loss` describes; infinite where an output is not finite.

    Examples:
        >>> divergence([torch.tensor([[0.0, 0.0]])], [torch.tensor([[0.0, 0.0]])])
        0.0
    """
    losses = []
    for a, b in zip(wanted, got, strict=True):
        if a.dim() == 2 and a.shape[1] > 1:
            p, q = torch.log_softmax(a.double(), 1), torch.log_softmax(b.double(), 1)
            losses.append(float((p.exp() * (p - q)).sum(1).mean()))
        else:
            losses.append(0.5 * float((a.double() - b.double()).square().sum() / a.double().square().sum().clamp(min=1e-30)))
    found = sum(losses) / max(1, len(losses))
    return max(0.0, found) if math.isfinite(found) else math.inf


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]
