"""Compute blocks a second time in the backward pass, with statistics, random numbers and gradients of the plain run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Mode = Literal["full", "selective"]

DEAR = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}
"""Operations whose outputs ``selective`` keeps: they cost most of the time."""


@contextmanager
def recomputing(model: nn.Module, modes: Mapping[str, Mode]) -> Iterator[None]:
    """Blocks named in ``modes`` are computed twice while this is open; parameter names, hooks and state dicts stay as they are.

    Examples:
        >>> net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))
        >>> with recomputing(net, {"0": "full"}):
        ...     net(torch.ones(1, 4)).sum().backward()
        >>> net[0][0].weight.grad is not None, "forward" in net[0].__dict__
        (True, False)

    Args:
        model: the network; only its blocks' ``forward`` is replaced, on the instances.
        modes: block name -> ``"full"`` (keeps the input only) or ``"selective"`` (also the outputs of convolutions and matrix products).
    """
    modules = dict(model.named_modules())
    try:
        for name, mode in modes.items():
            block = modules[name]
            block.forward = _twice(block, block.forward, mode)
        yield
    finally:
        for name in modes:
            modules[name].__dict__.pop("forward", None)


def _twice(block: nn.Module, forward: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, again = create_selective_checkpoint_contexts(_policy) if mode == "selective" else (nullcontext(), nullcontext())
        return first, _both(again, buffers_as_before(block))

    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


def _policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(second)
        stack.enter_context(first)
        yield


def buffers_as_before(block: nn.Module) -> AbstractContextManager[None]:
    """A context in which a block works on copies of its buffers: running statistics are not updated a second time.

    Small buffers are copied now, before the forward pass, so that what depends on their old values (spectral norm) is the same again.
    """
    owners = [(m, name, b) for m in block.modules() for name, b in m._buffers.items() if isinstance(b, Tensor)]
    copies = [b.detach().clone() if b.numel() <= 65536 else b for _, _, b in owners]

    @contextmanager
    def swapped() -> Iterator[None]:
        for (module, name, _), other in zip(owners, copies, strict=True):
            module._buffers[name] = other
        try:
            yield
        finally:
            for module, name, original in owners:
                module._buffers[name] = original

    return swapped()
