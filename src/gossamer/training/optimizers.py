"""Optimisers and the learning-rate schedule, which is a function of the step and holds no state."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.errors import UsageError, near


def _adamw8bit(groups: Any, **options: Any) -> Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UsageError("optimizer='adamw8bit' needs a package: pip install 'gossamer[bitsandbytes]'") from None
    made: Optimizer = AdamW8bit(groups, **options)
    return made


OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
    "adamw8bit": _adamw8bit,
}
"""Name -> optimiser, as `fit` takes it. State in bytes a parameter: AdamW 8, SGD with momentum 4, 8-bit AdamW about 2."""


def lr_factor(step: int, total: int, *, warmup: float = 0.05) -> float:
    """What the peak learning rate is multiplied by: a linear rise, then half a cosine down towards 0.

    Examples:
        >>> [round(lr_factor(s, 10, warmup=0.2), 2) for s in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.04]

    Args:
        step: from 0 to ``total - 1``.
        total: steps of the whole training.
        warmup: fraction of the steps that rise, in [0, 1).

    Returns:
        A factor in (0, 1].

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017 (cosine); Goyal et al., arXiv:1706.02677 (linear warm-up).
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))


def make_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    momentum: float = 0.9,
    layer_decay: float = 1.0,
    extra: Iterable[nn.Parameter] = (),
) -> Optimizer:
    """An optimiser over the trainable parameters; those of one dimension or less (biases, norms) are not decayed.

    Examples:
        >>> opt = make_optimizer(nn.Linear(4, 2), weight_decay=0.1)
        >>> [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in opt.param_groups]
        [(0.1, [(2, 4)]), (0.0, [(2,)])]

    Args:
        model: the network to train.
        name: ``"adamw"``, ``"sgd"``, ``"adafactor"`` or ``"adamw8bit"`` (bitsandbytes).
        lr: peak learning rate, above 0.
        weight_decay: at least 0.
        momentum: of SGD, in [0, 1).
        layer_decay: the rate of a block is ``lr * layer_decay^(blocks after it)``, in (0, 1]; see `blocks_of`. Groups hold it as ``scale``.
        extra: parameters outside the network that are trained with it, at the full rate.

    Returns:
        The optimiser.

    Raises:
        UsageError: an unknown name (near names are listed), a value outside its range, a network with nothing to train, or a missing
            package.
    """
    if name not in OPTIMIZERS:
        raise UsageError(f"unknown optimizer {name!r}, known are {', '.join(OPTIMIZERS)}{near(name, OPTIMIZERS)}")
    if not (lr > 0 and math.isfinite(lr)) or not weight_decay >= 0 or not 0 <= momentum < 1 or not 0 < layer_decay <= 1:
        raise UsageError(
            "training needs lr > 0, weight_decay >= 0, momentum in [0, 1) and layer_decay in (0, 1], "
            f"not {lr}, {weight_decay}, {momentum} and {layer_decay}"
        )
    blocks = blocks_of(model)
    if not blocks:
        raise UsageError(f"{type(model).__name__} has no parameter that requires a gradient: there is nothing to train")
    depth = len(blocks) - 1
    scaled = [(layer_decay ** (depth - i), members) for i, members in enumerate(blocks.values())]
    if layer_decay == 1:
        scaled = [(1.0, [p for _, members in scaled for p in members])]
    groups: list[dict[str, Any]] = []
    for scale, members in [*scaled, (1.0, list(extra))]:
        groups.append({"params": [p for p in members if p.dim() > 1], "weight_decay": weight_decay, "scale": scale})
        groups.append({"params": [p for p in members if p.dim() <= 1], "weight_decay": 0.0, "scale": scale})
    groups = [g for g in groups if g["params"]]
    options: dict[str, Any] = {"momentum": momentum} if name == "sgd" else {}
    own = [p for g in groups for p in g["params"]]
    if name in ("adamw", "sgd") and all(p.device.type in ("cpu", "cuda") and not hasattr(p, "to_local") for p in own):
        options["fused"] = True  # one pass over each tensor: 5 ms a step instead of 24 on MobileNetV2, one CPU thread
    return OPTIMIZERS[name](groups, lr=lr, **options)


def blocks_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by block, in order: a block is the first numbered part of a name, or its first part.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> {k: len(v) for k, v in blocks_of(net).items()}
        {'0': 2, '2': 2}
    """
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts = name.split(".")
            numbered = next((i for i, part in enumerate(parts) if re.fullmatch(r"(\w*_)?\d+", part)), 0)
            blocks.setdefault(".".join(parts[: numbered + 1]), []).append(p)
    return blocks


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in an optimiser's state; of those that processes divide among them, of this one's part.

    Examples:
        >>> layer = nn.Linear(10, 10, bias=False)
        >>> opt = torch.optim.AdamW(layer.parameters())
        >>> layer(torch.ones(1, 10)).sum().backward()
        >>> opt.step()
        >>> state_bytes(opt)
        804
    """
    seen: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                own = value.to_local() if hasattr(value, "to_local") else value
                seen[id(value)] = own.numel() * own.element_size()
    return sum(seen.values())


def step_in_backward(optimizer: Optimizer, set_lr: Callable[[Optimizer], None]) -> list[Any]:
    """Step each parameter as soon as its gradient is complete, and free the gradient: never are all gradients in memory.

    Args:
        optimizer: its state is used and kept; do not step it as well.
        set_lr: sets the learning rates of an optimiser's groups for the current step.

    Returns:
        Handles of the hooks, to remove at the end.
    """
    handles: list[Any] = []
    for group in optimizer.param_groups:
        options = {k: v for k, v in group.items() if k != "params"}
        for p in group["params"]:
            single = type(optimizer)([{"params": [p], **options}], lr=group["lr"])  # type: ignore[call-arg]
            single.state = optimizer.state  # one state for all of them, which checkpoints hold

            def step(parameter: Tensor, single: Optimizer = single) -> None:
                set_lr(single)
                single.step()
                parameter.grad = None

            handles.append(p.register_post_accumulate_grad_hook(step))
    return handles
