"""Derivatives of a network's outputs by values inside it, of random combinations of the outputs.

With ``J`` the outputs' derivative by a value and ``v`` random signs, the mean of ``(v' J e)^2`` is ``|J e|^2``, whatever the error ``e``: one backward pass
from ``v' y`` stands for all outputs. Each output counts by its mean square.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gossamer.quantization.calibration import parts
from gossamer.quantization.graph import sample_bytes

_AT_ONCE, _BYTES = 8, 1 << 30  # samples whose derivatives are held at once, and bytes of values, which bound them too


def derivatives(
    module: fx.GraphModule, watched: Iterable[fx.Node], leaves: list[Any]
) -> Iterator[tuple[int, list[tuple[fx.Node, Tensor, Tensor]]]]:
    """Some samples at a time: how many, and each watched node, its value and the derivative by it; without what no output depends on.

    Args:
        module: a float graph.
        watched: nodes of it.
        leaves: flat inputs.

    Raises:
        RuntimeError: an operator has no derivative, or works in place.
    """
    generator, watched = torch.Generator().manual_seed(0), set(watched)
    for part in parts(module, leaves, _at_once(module)):
        samples = next((x.shape[0] for x in part if isinstance(x, Tensor) and x.dim()), 1)
        with torch.enable_grad():
            found = _of(module, watched, part, samples, generator)
        yield samples, found


def _of(
    module: fx.GraphModule, watched: set[fx.Node], leaves: list[Any], samples: int, generator: torch.Generator
) -> list[tuple[fx.Node, Tensor, Tensor]]:
    runner = _Recording(module, watched)
    out, combined = runner.run(*leaves, enable_io_processing=False), list[Tensor]()
    for t in pytree.tree_leaves(out):
        if isinstance(t, Tensor) and t.requires_grad:
            signs = (torch.randint(0, 2, t.shape, generator=generator) * 2 - 1).to(t)
            combined.append((t * signs).sum() / (t.detach().square().sum() / samples).sqrt().clamp(min=1e-30))
    if not combined:
        return []
    nodes = list(runner.values)
    gradients = torch.autograd.grad(sum(combined[1:], combined[0]), [runner.values[n] for n in nodes], allow_unused=True)
    return [(n, runner.values[n].detach(), g) for n, g in zip(nodes, gradients, strict=True) if g is not None and g.dim()]


class _Recording(fx.Interpreter):
    """Keeps the values of some nodes, with derivatives from there on."""

    def __init__(self, module: fx.GraphModule, watched: set[fx.Node]) -> None:
        super().__init__(module)
        self.watched, self.values = watched, dict[fx.Node, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.watched:
            result = self.values[n] = result if result.requires_grad else result.detach().requires_grad_()
        return result


def _at_once(module: fx.GraphModule) -> int:
    return int(max(1, min(_AT_ONCE, _BYTES // max(1.0, 3 * sum(sample_bytes(module))))))
