"""Parameters that are whole on every rank but meet split channels: each rank then knows only a part of their gradient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.adapters import free_attention
from gossamer.result import ExampleInputs
from gossamer.sources.batches import call
from gossamer.trace import plain_forward


class _Uses(TorchDispatchMode):
    """Notes, for each parameter, the shapes of what is computed from it and something else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        self._names: dict[int, set[str]] = {id(p): {n} for n, p in model.named_parameters()}
        self._alive: list[Tensor] = []  # an id says nothing once its tensor is gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        taken = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        names: set[str] = set().union(*(self._names.get(id(t), set()) for t in taken))
        if names:
            given = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
            if all(id(t) in self._names for t in taken):
                for t in given:
                    self._names[id(t)] = names
                    self._alive.append(t)
            else:
                for n in names:
                    self.shapes[n] += [tuple(t.shape) for t in given[:1]]
        return out


def partial_parameters(whole: nn.Module, share: nn.Module, split: Set[str], example_inputs: ExampleInputs) -> tuple[str, ...]:
    """Names of parameters that are not split and yet meet split channels, found by running both networks.

    Args:
        whole: the network.
        share: a rank's, before anything is summed.
        split: names of the split tensors.
        example_inputs: to run them on.
    """
    found = []
    for model in (whole, share):
        uses = _Uses(model)
        with plain_forward(model), free_attention(model), uses:
            call(model, example_inputs)
        found.append(uses.shapes)
    return tuple(n for n, p in share.named_parameters() if n not in split and p.requires_grad and found[0][n] != found[1][n])


def sum_gradients(model: nn.Module, names: tuple[str, ...], total: Any) -> None:
    """From now on the gradients of some parameters are sums over the ranks.

    Args:
        model: a rank's network, changed in place.
        names: of the parameters.
        total: a gradient to the sum over the ranks.
    """
    parameters = dict(model.named_parameters())
    for n in names:
        parameters[n].register_hook(total)
