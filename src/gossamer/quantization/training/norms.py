"""Batch norm around a layer whose norm was folded: statistics of the batch at first, those that will be folded later."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gossamer.quantization.graph import CONVOLUTION, LINEAR, TRANSPOSED, op_name, tensor_at, weight_name, weighted_nodes
from gossamer.quantization.training.rounding import LearnedStep

EPSILON = 1e-5


class FoldedNorm(nn.Module):
    """The norm of a layer that the deployed kernel has folded into its weight and bias.

    It starts as what the folded layer computes. In training it normalises by the batch until it is frozen; from then on, and in
    eval mode, by the running statistics, so that with one step per output channel it is exactly a scaled weight and a bias.

    Args:
        weight: name of the layer's weight.
        mean, var: of the layer's outputs without bias, shape (C,).
        bias: of the folded layer, shape (C,).

    Source: Jacob et al., "Quantization and Training of Neural Networks", CVPR 2018, section 3.2; frozen statistics after a part of
    the training: Krishnamoorthi, arXiv:1806.08342, section 3.2.2.
    """

    mean: Tensor
    var: Tensor
    frozen: Tensor

    def __init__(self, weight: str, mean: Tensor, var: Tensor, bias: Tensor, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight, self.momentum = weight, momentum
        self.register_buffer("mean", mean.clone())
        self.register_buffer("var", var.clone())
        self.register_buffer("frozen", torch.tensor(False, device=mean.device))
        self.scale = nn.Parameter((var + EPSILON).sqrt())
        self.bias = nn.Parameter(bias + mean)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised values (N, C, ...)."""
        by_batch = self.training and not bool(self.frozen)
        return F.batch_norm(x, self.mean, self.var, self.scale.abs(), self.bias, by_batch, self.momentum, EPSILON)

    def factor(self) -> Tensor:
        """What the weight of each channel is multiplied by when it is folded, at least 0, shape (C,)."""
        return (self.scale.detach().abs().double() * (self.var.double() + EPSILON).rsqrt()).float()

    def shift(self) -> Tensor:
        """The bias when it is folded, shape (C,)."""
        return (self.bias.detach().double() - self.mean.double() * self.factor().double()).float()


class FreezeNorms(nn.Module):
    """A hook for after each training step: freezes the norms of a network after some steps, and holds its steps in their range.

    Args:
        after: optimiser steps that are made with statistics of the batch.
        then: called afterwards, or None.
    """

    count: Tensor

    def __init__(self, after: int, then: Any = None) -> None:
        super().__init__()
        self.after, self.then = after, then
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, model: nn.Module) -> None:
        """Called with the network in training, under ``no_grad``."""
        self.count += 1
        for module in model.modules():
            if isinstance(module, LearnedStep):
                module.hold()
        if int(self.count) == self.after:
            self.freeze(model)
        if self.then is not None:
            self.then(model)

    def freeze(self, model: nn.Module) -> None:
        """Freeze the norms now."""
        for module in model.modules():
            if isinstance(module, FoldedNorm):
                module.frozen.fill_(True)


def layers_with_norm(floating: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Layers whose batch norm `canonical` folded and can be told apart again by output channel, by the name of their weight."""
    folded = set(floating.meta.get("folded", ()))
    found: dict[str, list[fx.Node]] = {}
    for layer in weighted_nodes(floating.graph):
        groups = layer.args[6] if op_name(layer) in TRANSPOSED and len(layer.args) > 6 else 1
        if weight_name(layer) in folded and groups == 1:
            found.setdefault(str(weight_name(layer)), []).append(layer)
    return found


def output_statistics(floating: fx.GraphModule, batches: Iterable[list[Any]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance by output channel of each layer whose norm was folded, without its bias, over flat inputs.

    Returns:
        Weight name -> mean (C,), variance (C,), float32.
    """
    reading = _Moments(floating)
    with torch.no_grad():
        for leaves in batches:
            reading.run(*leaves, enable_io_processing=False)
    out = {}
    for name, (count, total, square) in reading.sums.items():
        mean = total / count
        var = (square / count - mean.square()).clamp(min=0)
        out[name] = (mean.float(), var.float())
    return out


class _Moments(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.layers = {layer: name for name, layers in layers_with_norm(module).items() for layer in layers}
        self.sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.layers:
            assert isinstance(self.module, fx.GraphModule)
            x = result if n.args[2] is None else result - _bias_of(self.module, n, result)
            by_channel = (x.movedim(1, 0) if op_name(n) in CONVOLUTION | TRANSPOSED else x.movedim(-1, 0)).flatten(1).double()
            count, total, square = self.sums.get(self.layers[n], (0, 0.0, 0.0))
            self.sums[self.layers[n]] = (count + by_channel.shape[1], total + by_channel.sum(1), square + by_channel.square().sum(1))
        return result


def _bias_of(module: fx.GraphModule, layer: fx.Node, like: Tensor) -> Tensor:
    bias = layer.args[2]
    assert isinstance(bias, fx.Node)
    b = tensor_at(module, str(bias.target))
    return b if op_name(layer) in LINEAR else b.view(-1, *[1] * (like.dim() - 2))
