"""Self-distillation: a teacher that need not be trained. Shape letters: R rows (samples, times positions), C classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.distillation.losses._checks import check_alpha, check_pair, check_temperature, labels_of, rows_of, wide
from gossamer.distillation.losses.logits import kl
from gossamer.errors import UsageError


def self_distillation_loss(
    student_logits: Tensor, labels: Tensor | None = None, *, alpha: float = 0.5, tau: float = 4.0, correct: float = 0.9
) -> Tensor:
    """Teacher-free: ``(1 - alpha) * CE + alpha * tau^2 * KL(virtual || student)``, the student's softmax at temperature tau.

    The virtual teacher gives ``correct`` to the true class and the rest evenly to the others, softened at temperature tau
    (its probabilities to the power of 1 / tau, normalised).

    Examples:
        >>> z = torch.tensor([[0.9, 0.05, 0.05]]).log()
        >>> round(self_distillation_loss(z, torch.tensor([0]), alpha=1.0).item(), 4)
        0.0

    Args:
        student_logits: (N, C) or (N, C, ...), at least two classes.
        labels: class indices (N) or (N, ...).
        alpha: weight of the virtual teacher against the labels, in [0, 1].
        tau: temperature, above 0.
        correct: probability of the true class, between 1 / C and 1.

    Returns:
        The loss, a tensor without dimensions; the mean over rows.

    Raises:
        UsageError: labels are no class indices, or an argument is outside its range.

    Source: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR 2020.
    """
    check_alpha(alpha)
    check_temperature(tau)
    check_pair(student_logits, student_logits)
    classes = student_logits.shape[1]
    if classes < 2 or not 1 / classes < correct < 1:
        raise UsageError(f"self-distillation over {classes} classes needs correct between {1 / max(classes, 1):g} and 1, not {correct}")
    y_R = labels_of(student_logits, labels, "self-distillation")
    z_RC = rows_of(wide(student_logits))
    virtual_RC = torch.full_like(z_RC, math.log((1 - correct) / (classes - 1)))
    virtual_RC.scatter_(1, y_R[:, None], math.log(correct))
    loss = alpha * tau**2 * kl(F.log_softmax(virtual_RC / tau, 1), F.log_softmax(z_RC / tau, 1))
    return loss + (1 - alpha) * F.cross_entropy(z_RC, y_R)
