"""Inputs made up from the network alone: where it reads indices into tables, random rows of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gossamer.quantization.graph import op_name, tensor_at
from gossamer.quantization.points import source

_DRAWS = 24


def drawn_inputs(module: fx.GraphModule, example_inputs: Any, *, draws: int = _DRAWS, seed: int = 0) -> Iterator[list[Any]] | None:
    """Flat inputs in which every index that an embedding reads is drawn evenly from its rows; all other inputs are the example's.

    Random rows are rows that the network was trained on, other than random pixels, and show what later layers' features reach.

    Examples:
        >>> from torch import nn
        >>> from gossamer.trace.capture import capture
        >>> ids = torch.zeros(1, 4, dtype=torch.long)
        >>> graph = capture(nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 2)).eval(), (ids,))
        >>> [x] = next(drawn_inputs(graph, (ids,)))
        >>> x.shape, bool((x != 0).any()), int(x.max()) < 100
        (torch.Size([1, 4]), True, True)

    Args:
        module: a captured graph.
        example_inputs: what it was captured with.
        draws: batches of the example's size.
        seed: of the indices.

    Returns:
        The batches; None where no input is read as an index.
    """
    rows: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        if op_name(node) == "embedding" and isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr":
            index, size = source(node.args[1]), tensor_at(module, str(node.args[0].target)).shape[0]
            if index.op == "placeholder":
                rows[index] = min(size, rows.get(index, size))
    leaves = pytree.tree_leaves(((), example_inputs) if isinstance(example_inputs, dict) else (example_inputs, {}))
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    if not rows or min(rows.values()) < 1 or len(leaves) != len(inputs):
        return None
    return _draw(leaves, [rows.get(n) for n in inputs], draws, torch.Generator().manual_seed(seed))


def _draw(leaves: list[Any], rows: list[int | None], draws: int, generator: torch.Generator) -> Iterator[list[Any]]:
    for _ in range(draws):
        yield [
            torch.randint(r, x.shape, generator=generator, dtype=x.dtype).to(x.device) if r is not None and isinstance(x, Tensor) else x
            for x, r in zip(leaves, rows, strict=True)
        ]
