"""What every loss asks of its arguments, and the precision it computes in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.errors import UsageError


def wide(x: Tensor) -> Tensor:
    """Half precision as float32: a sum over classes needs the mantissa, and tau^2 the range."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_temperature(tau: float) -> None:
    """UsageError where the temperature is not above 0."""
    if not (tau > 0 and math.isfinite(tau)):
        raise UsageError(f"distillation needs tau > 0, not {tau}")


def check_alpha(alpha: float) -> None:
    """UsageError where the weight of the teacher is not in [0, 1]."""
    if not 0 <= alpha <= 1:
        raise UsageError(f"distillation needs alpha in [0, 1], not {alpha}")


def check_weights(**weights: float) -> None:
    """UsageError that names the first weight that is negative or not finite."""
    for name, weight in weights.items():
        if not (weight >= 0 and math.isfinite(weight)):
            raise UsageError(f"{name}={weight}: a weight of a loss is at least 0")


def check_pair(student: Tensor, teacher: Tensor, *, least: int = 2) -> None:
    """UsageError where two sets of logits are not of one shape (N, C, ...)."""
    if student.shape != teacher.shape or student.dim() < least:
        raise UsageError(
            f"student and teacher must give logits (N, C) or (N, C, ...) of one shape, not {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def rows_of(z: Tensor) -> Tensor:
    """Logits (N, C, ...) as rows (R, C): one for each sample and position."""
    return z if z.dim() == 2 else z.movedim(1, -1).reshape(-1, z.shape[1])


def labels_of(z: Tensor, labels: Tensor | None, loss: str) -> Tensor:
    """Class indices of the rows of ``z``; UsageError where there are none."""
    if labels is None or labels.is_floating_point() or labels.shape != (z.shape[0], *z.shape[2:]):
        found = "none" if labels is None else f"{tuple(labels.shape)} of {labels.dtype}"
        raise UsageError(f"{loss} needs class indices of shape {(z.shape[0], *z.shape[2:])}, not {found}")
    return labels.reshape(-1)
