"""Losses of distillation as pure functions, in log space throughout.

Shape letters: N batch, C classes; further dimensions are positions (H, W of a dense prediction).
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from gossamer.errors import UsageError


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *, alpha: float = 0.9, tau: float = 4.0
) -> Tensor:
    """``(1 - alpha) * CE(student, labels) + alpha * tau^2 * KL(teacher || student)``, both softmaxes of the KL at temperature tau.

    The mean runs over the batch, and over positions where there are any; the sum over classes. The gradient with respect to the student's
    logits is ``((1 - alpha) * (softmax(z_S) - y) + alpha * tau * (softmax(z_S / tau) - softmax(z_T / tau))) / N``.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0, -1.0]])
        >>> kd_loss(z, z, alpha=1.0).item()
        0.0
        >>> round(kd_loss(z, z.flip(1), torch.tensor([0]), alpha=0.5, tau=2.0).item(), 4)
        1.5498

    Args:
        student_logits: (N, C) or (N, C, ...).
        teacher_logits: the same shape; no gradient reaches them.
        labels: class indices (N) or (N, ...), or probabilities of the shape of the logits. None only with ``alpha=1``.
        alpha: weight of the teacher against the labels, in [0, 1].
        tau: temperature, above 0.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        UsageError: shapes differ, labels are missing, or an argument is outside its range.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """
    if not 0 <= alpha <= 1 or not (tau > 0 and math.isfinite(tau)):
        raise UsageError(f"distillation needs alpha in [0, 1] and tau > 0, not {alpha} and {tau}")
    if student_logits.shape != teacher_logits.shape or student_logits.dim() < 2:
        raise UsageError(
            f"student and teacher must give logits (N, C) or (N, C, ...) of one shape, not {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
    if labels is None and alpha < 1:
        raise UsageError(f"alpha={alpha:g} needs labels: without labels, use alpha=1")
    loss = student_logits.new_zeros(())
    if alpha > 0:
        log_q_NC = F.log_softmax(student_logits / tau, dim=1)
        log_p_NC = F.log_softmax(teacher_logits.detach() / tau, dim=1)
        rows = student_logits.numel() / student_logits.shape[1]
        loss = loss + alpha * tau**2 / rows * F.kl_div(log_q_NC, log_p_NC, reduction="sum", log_target=True)
    if alpha < 1:
        assert labels is not None
        loss = loss + (1 - alpha) * F.cross_entropy(student_logits, labels)
    return loss
