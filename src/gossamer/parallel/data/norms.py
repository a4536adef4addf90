"""Batch norm over all processes that share a batch: the statistics, the gradient and the running buffers of the whole batch.

Shape letters: N samples of this process, C channels; positions follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gossamer.errors import SourceError


class SynchronisedNorms(TorchFunctionMode):
    """While this is open, every batch norm in training works on the whole batch, of which each process of a group holds a part.

    It takes the place of `torch.nn.functional.batch_norm`, so modules stay as they are, whatever their class, and graphs of operations and
    norms of quantisation-aware training are synchronised as well. Open it around the forward pass. All processes end with the same bits in their
    running buffers. On the CPU and on GPUs alike.

    Args:
        group: the processes that share the batch.
        counts: whether this process's samples count: where a process has none of its own, another's stand in for them.
    """

    def __init__(self, group: dist.ProcessGroup, *, counts: bool = True) -> None:
        super().__init__()
        self.group, self.counts = group, counts
        self.buffers: set[int] = set()
        """Identities of the running buffers that were updated."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._functional(*args, **kwargs)
        if func is torch.ops.aten.batch_norm.default or func is torch.batch_norm:
            return self._operation(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _functional(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return self._normalise(input, running_mean, running_var, weight, bias, momentum, eps)

    def _operation(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool = True,
    ) -> Tensor:
        if not training:
            return func(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
        return self._normalise(input, running_mean, running_var, weight, bias, momentum, eps)

    def _normalise(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        mean, var, n = whole_statistics(x.detach(), self.group, counts=self.counts)
        if running_mean is not None and running_var is not None:
            self.buffers |= {id(running_mean), id(running_var)}
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * (n / (n - 1))).to(running_var.dtype), momentum)
        out: Tensor = _Normalise.apply(x, weight, bias, mean, var, n if self.counts else math.inf, eps, self.group)
        return out


def whole_statistics(x: Tensor, group: dist.ProcessGroup, *, counts: bool = True) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance by channel over all processes, and the number of values of a channel.

    Args:
        x: this process's part, (N, C, ...).
        group: the processes that share the batch.
        counts: whether this process's part is of the batch.

    Returns:
        Mean (C,), variance (C,), in float32, or float64 where ``x`` is; the same bits in every process.

    Raises:
        SourceError: a channel has one value in all processes together.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    n = x.numel() // x.shape[1] if counts else 0
    own = x.new_zeros(2 * x.shape[1] + 1, dtype=kind)
    if n:
        mean, var = torch.batch_norm_update_stats(x.to(kind), None, None, 0.0)
        own = torch.cat([mean, var, mean.new_tensor([float(n)])])
    parts = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather(list(parts), own, group=group)
    means, variances, n_of = parts[:, : x.shape[1]], parts[:, x.shape[1] : -1], parts[:, -1:]
    total = float(n_of.sum())
    if total < 2:
        raise SourceError(f"batch norm needs more than one value of a channel in a batch, and {tuple(x.shape)} is one: use larger batches")
    share = n_of / total
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), total


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, where mean and variance are of all processes and take part in the gradient.

    They do not depend on values that do not count: for those ``n`` is infinite.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        n: float,
        eps: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.n, ctx.eps, ctx.group, ctx.has_bias = n, eps, group, bias is not None
        out: Tensor = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        dy = grads[0].contiguous(memory_format=torch.channels_last) if _is_channels_last(x) else grads[0].contiguous()
        ones = weight if weight is not None else torch.ones_like(mean)
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, ones, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.cat([d_bias, d_weight]).to(mean.dtype)
        dist.all_reduce(sums, group=ctx.group)
        sum_dy, sum_dy_x = sums.chunk(2)
        inverse = (var + ctx.eps).rsqrt()
        scale = ones.to(mean.dtype) * inverse / -ctx.n
        # what goes back through the statistics, (x - mean) * weight + bias, in one pass of the same kernel
        back = torch.native_batch_norm(x, scale * inverse * sum_dy_x, scale * sum_dy, mean, torch.ones_like(var), False, 0.0, 0.0)[0]
        dx = dx.add_(back)
        return dx, d_weight if weight is not None else None, d_bias if ctx.has_bias else None, None, None, None, None, None


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
