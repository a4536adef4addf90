"""Losses on logits as pure functions, in log space throughout.

Shape letters: N batch, C classes, R rows (samples, times positions of a dense prediction), O the C - 1 other classes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.distillation.losses._checks import (
    check_alpha,
    check_pair,
    check_temperature,
    check_weights,
    labels_of,
    rows_of,
    wide,
)
from gossamer.errors import UsageError


def standardize_logits(logits: Tensor, *, eps: float = 1e-7) -> Tensor:
    """``(z - mean(z)) / (std(z) + eps)`` over the classes, with the population's standard deviation.

    Examples:
        >>> standardize_logits(torch.tensor([[1.0, 3.0]]))
        tensor([[-1.0000,  1.0000]])

    Args:
        logits: (N, C) or (N, C, ...).
        eps: added to the deviation; equal logits become 0.

    Returns:
        The same shape.

    Source: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
    """
    z = wide(logits)
    centred = z - z.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    return centred / (variance.clamp_min(torch.finfo(z.dtype).tiny).sqrt() + eps)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 0.9,
    tau: float = 4.0,
    standardize: bool = False,
) -> Tensor:
    """``(1 - alpha) * CE(student, labels) + alpha * tau^2 * KL(teacher || student)``, both softmaxes of the KL at temperature tau.

    The mean runs over the batch, and over positions where there are any; the sum over classes. The gradient with respect to the student's
    logits is ``((1 - alpha) * (softmax(z_S) - y) + alpha * tau * (softmax(z_S / tau) - softmax(z_T / tau))) / N``.

    Examples:
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
        standardize: take the KL of `standardize_logits` of both, so that the student need not match the teacher's scale.

    Returns:
        The loss, a tensor without dimensions; float32 for logits in half precision.

    Raises:
        UsageError: shapes differ, labels are missing, or an argument is outside its range.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """
    check_alpha(alpha)
    check_temperature(tau)
    check_pair(student_logits, teacher_logits)
    if labels is None and alpha < 1:
        raise UsageError(f"alpha={alpha:g} needs labels: without labels, use alpha=1")
    z_S, z_T = wide(student_logits), wide(teacher_logits.detach())
    loss = z_S.new_zeros(())
    if alpha > 0:
        a, b = (standardize_logits(z_S), standardize_logits(z_T)) if standardize else (z_S, z_T)
        loss = loss + alpha * tau**2 * kl(F.log_softmax(b / tau, dim=1), F.log_softmax(a / tau, dim=1))
    if alpha < 1:
        assert labels is not None
        loss = loss + (1 - alpha) * _cross_entropy(z_S, labels)
    return loss


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    tau: float = 4.0,
    ce: float = 1.0,
) -> Tensor:
    """Decoupled KD: ``ce * CE + tau^2 * (alpha * TCKD + beta * NCKD)``.

    TCKD is the KL between the pairs (target, all others) ``[p_t, 1 - p_t]``, NCKD the KL between the softmaxes over the classes without the
    target, all at temperature tau. Plain KD is ``TCKD + (1 - p_t) * NCKD``, p_t of the teacher. ``log(1 - p_t)`` is the logarithm of a sum
    over the others, so that no student is too confident for it.

    Examples:
        >>> z = torch.tensor([[2.0, 0.0, -1.0]])
        >>> round(dkd_loss(z, z, torch.tensor([0]), ce=0.0).item(), 4)
        0.0

    Args:
        student_logits: (N, C) or (N, C, ...), at least two classes.
        teacher_logits: the same shape; no gradient reaches them.
        labels: class indices (N) or (N, ...).
        alpha, beta: weights of TCKD and NCKD, at least 0.
        tau: temperature, above 0.
        ce: weight of the cross-entropy with the labels, at least 0.

    Returns:
        The loss, a tensor without dimensions; the mean over rows.

    Raises:
        UsageError: shapes differ, labels are no class indices, or an argument is outside its range.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022.
    """
    check_temperature(tau)
    check_weights(alpha=alpha, beta=beta, ce=ce)
    check_pair(student_logits, teacher_logits)
    y_R = labels_of(student_logits, labels, "dkd")
    z_S, z_T = rows_of(wide(student_logits)), rows_of(wide(teacher_logits.detach()))
    (log_s_R2, log_s_RO), (log_t_R2, log_t_RO) = (_decouple(z / tau, y_R) for z in (z_S, z_T))
    loss = tau**2 * (alpha * kl(log_t_R2, log_s_R2) + beta * kl(log_t_RO, log_s_RO))
    return loss + ce * F.cross_entropy(z_S, y_R) if ce else loss


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    gamma: float = 1.5,
    tau: float = 1.0,
    ce: float = 1.0,
) -> Tensor:
    """Normalised KD: ``-(ce + T_t) * log S_t - gamma * tau^2 * sum_i N(T_i) log N(S_i)`` over the classes i other than the target t.

    S and T are the softmaxes of student and teacher at temperature 1, N their softmaxes over the other classes at temperature tau.

    Examples:
        >>> z = torch.tensor([[2.0, 0.0, -1.0]])
        >>> round(nkd_loss(z, z, torch.tensor([0])).item(), 4)
        1.1865

    Args:
        student_logits: (N, C) or (N, C, ...), at least two classes.
        teacher_logits: the same shape; no gradient reaches them.
        labels: class indices (N) or (N, ...).
        gamma: weight of the other classes, at least 0.
        tau: temperature, above 0.
        ce: weight of the cross-entropy with the labels, at least 0.

    Returns:
        The loss, a tensor without dimensions; the mean over rows.

    Raises:
        UsageError: shapes differ, labels are no class indices, or an argument is outside its range.

    Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
        Customized Soft Labels", ICCV 2023.
    """
    check_temperature(tau)
    check_weights(gamma=gamma, ce=ce)
    check_pair(student_logits, teacher_logits)
    y_R = labels_of(student_logits, labels, "nkd")
    z_S, z_T = rows_of(wide(student_logits)), rows_of(wide(teacher_logits.detach()))
    log_target_R = F.log_softmax(z_S, 1).gather(1, y_R[:, None])[:, 0]
    target_R = F.softmax(z_T, 1).gather(1, y_R[:, None])[:, 0]
    others_S, others_T = (F.log_softmax(_others(z, y_R) / tau, 1) for z in (z_S, z_T))
    cross_R = (others_T.exp() * others_S).sum(1)
    return -((ce + target_R) * log_target_R + gamma * tau**2 * cross_R).mean()


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    ce: float = 1.0,
) -> Tensor:
    """DIST: ``ce * CE + tau^2 * (beta * inter + gamma * intra)``, one minus Pearson's correlation of probabilities.

    ``inter`` is the mean over samples of ``1 - corr(s_r, t_r)`` of their rows of probabilities, ``intra`` the mean over classes of
    ``1 - corr(s_c, t_c)`` of their columns, both softmaxes at temperature tau. A row or column without variance correlates with nothing.

    Examples:
        >>> z = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.5, 3.0]])
        >>> abs(dist_loss(z, z, ce=0.0).item()) < 1e-6, round(dist_loss(z, z.flip(0), ce=0.0).item(), 2)
        (True, 3.7)

    Args:
        student_logits: (N, C) or (N, C, ...).
        teacher_logits: the same shape; no gradient reaches them.
        labels: class indices or probabilities as in `kd_loss`. None only with ``ce=0``.
        beta, gamma: weights of the relations between and within classes, at least 0.
        tau: temperature, above 0.
        ce: weight of the cross-entropy with the labels, at least 0.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        UsageError: shapes differ, labels are missing, or an argument is outside its range.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.
    """
    check_temperature(tau)
    check_weights(beta=beta, gamma=gamma, ce=ce)
    check_pair(student_logits, teacher_logits)
    if ce and labels is None:
        raise UsageError(f"dist with ce={ce:g} needs labels: without labels, use ce=0")
    s_RC, t_RC = (F.softmax(rows_of(wide(z)) / tau, 1) for z in (student_logits, teacher_logits.detach()))
    loss = tau**2 * (beta * (1 - _pearson(s_RC, t_RC)).mean() + gamma * (1 - _pearson(s_RC.T, t_RC.T)).mean())
    if ce:
        assert labels is not None
        loss = loss + ce * _cross_entropy(wide(student_logits), labels)
    return loss


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities along dimension 1: the sum over it, the mean over all else."""
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * (log_p.shape[1] / max(1, log_p.numel()))


def _cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z, labels.to(z.dtype) if labels.is_floating_point() else labels)


def _others(z_RC: Tensor, y_R: Tensor) -> Tensor:
    """The logits of all classes but the row's own, (R, C - 1)."""
    if z_RC.shape[1] < 2:
        raise UsageError("this loss needs at least two classes: with one output, use regression_kd_loss")
    index_O = torch.arange(z_RC.shape[1] - 1, device=z_RC.device)
    return z_RC.gather(1, index_O + (index_O >= y_R[:, None]))


def _decouple(z_RC: Tensor, y_R: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, all others), and of the others among themselves."""
    others_RO = _others(z_RC, y_R)
    pair_R2 = torch.stack([z_RC.gather(1, y_R[:, None])[:, 0], others_RO.logsumexp(1)], 1)
    return F.log_softmax(pair_R2, 1), F.log_softmax(others_RO, 1)


def _pearson(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation of the rows of two matrices; 0 where one has no variance."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=eps)
