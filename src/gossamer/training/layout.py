"""Memory layout: convolutions train faster on channels-last tensors, in networks that can take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from gossamer.sources.batches import Batch
from gossamer.training.objectives import Objective


def set_layout(model: nn.Module, channels_last: bool, *, optimizer: Optimizer | None = None) -> None:
    """Lay out all tensors of four dimensions, in place and without changing a value.

    Examples:
        >>> conv = nn.Conv2d(4, 8, 3)
        >>> set_layout(conv, True)
        >>> conv.weight.is_contiguous(memory_format=torch.channels_last)
        True

    Args:
        model: parameters and buffers are laid out.
        channels_last: otherwise contiguous.
        optimizer: its state is laid out like the parameters.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = lay_out(tensor.data, channels_last)
    if optimizer is not None:
        for state in optimizer.state.values():
            state.update({k: lay_out(v, channels_last) for k, v in state.items() if isinstance(v, Tensor)})


def lay_out(value: Any, channels_last: bool) -> Any:
    """Every tensor of four dimensions in a nest of tuples, lists and dicts, laid out anew; all else as it is."""
    wanted = torch.channels_last if channels_last else torch.contiguous_format

    def one(leaf: Any) -> Any:
        return leaf.contiguous(memory_format=wanted) if isinstance(leaf, Tensor) and leaf.dim() == 4 else leaf

    return pytree.tree_map(one, value)


def takes_channels_last(model: nn.Module, objective: Objective, batch: Batch) -> bool:
    """Whether the network has 2-d convolutions and its forward pass runs on channels-last tensors (``x.view`` may not).

    The pass is made in eval mode and without gradients; modes, layout, and random state are put back.
    """
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()) and not _graph_convolves(model):
        return False
    modes = [(m, m.training) for m in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    set_layout(model, True)
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            objective(model, Batch(*lay_out(tuple(batch), True)))
    except RuntimeError:
        return False
    finally:
        for module, mode in modes:
            module.training = mode
        set_layout(model, False)
    return True


def _graph_convolves(model: nn.Module) -> bool:
    """Whether a network is a graph of tensor operations with 2-d convolutions in it."""
    return isinstance(model, fx.GraphModule) and any(n.target is torch.ops.aten.conv2d.default for n in model.graph.nodes)
