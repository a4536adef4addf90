"""Losses for dense predictions and regression as pure functions. Shape letters: N batch, C channels, P positions.

Logit losses take dense predictions (N, C, ...) too: they average over positions.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gossamer.distillation.losses._checks import check_alpha, check_pair, check_temperature, wide
from gossamer.errors import UsageError


def channelwise_loss(student: Tensor, teacher: Tensor, *, tau: float = 4.0) -> Tensor:
    """``tau^2 / C * sum_c KL(softmax_P(t_c / tau) || softmax_P(s_c / tau))``, mean over the batch: where each channel looks.

    Examples:
        >>> import torch
        >>> x = torch.randn(2, 3, 4, 4)
        >>> abs(channelwise_loss(x + 5, x).item()) < 1e-5
        True

    Args:
        student: logits or features (N, C, ...) with positions.
        teacher: the same shape; no gradient reaches it.
        tau: temperature, above 0.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        UsageError: shapes differ or have no positions, or tau is not above 0.

    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.
    """
    check_temperature(tau)
    check_pair(student, teacher, least=3)
    log_s, log_t = (F.log_softmax(wide(z).flatten(2) / tau, 2) for z in (student, teacher.detach()))
    return tau**2 * F.kl_div(log_s, log_t, reduction="sum", log_target=True) / (student.shape[0] * student.shape[1])


def regression_kd_loss(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, *, alpha: float = 0.5, margin: float | None = None
) -> Tensor:
    """``(1 - alpha) * MSE(student, target) + alpha * MSE(student, teacher)``, means over all elements.

    With a margin, the teacher is an upper bound: samples on which the student is already better than the teacher by it,
    ``|student - target|^2 + margin <= |teacher - target|^2`` (mean over a sample's elements), do not count in the second term.

    Examples:
        >>> import torch
        >>> regression_kd_loss(torch.zeros(1, 2), torch.ones(1, 2), torch.full((1, 2), 2.0), alpha=0.25).item()
        3.25

    Args:
        student: predictions of any shape (N, ...).
        teacher: the same shape; no gradient reaches it.
        target: the same shape. None only with ``alpha=1`` and no margin.
        alpha: weight of the teacher against the target, in [0, 1].
        margin: None, or at least 0.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        UsageError: shapes differ, the target is missing, or an argument is outside its range.

    Source: Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017 (the bound).
    """
    check_alpha(alpha)
    if student.shape != teacher.shape or not student.dim() or (target is not None and target.shape != student.shape):
        shapes = [tuple(t.shape) for t in (student, teacher, target) if t is not None]
        raise UsageError(f"regression needs student, teacher and target of one shape, not {', '.join(map(str, shapes))}")
    if target is None and (alpha < 1 or margin is not None):
        raise UsageError(f"alpha={alpha:g}{'' if margin is None else ' with a margin'} needs a target: without one, use alpha=1")
    if margin is not None and not margin >= 0:
        raise UsageError(f"margin={margin}: must be at least 0")
    s, t = wide(student), wide(teacher.detach())
    gap = (s - t).square()
    if margin is not None:
        assert target is not None
        mine, theirs = ((x.detach() - target).square().reshape(s.shape[0], -1).mean(1) for x in (s, t))
        gap = gap * (mine + margin > theirs).to(gap.dtype).reshape(-1, *[1] * (gap.dim() - 1))
    loss = alpha * gap.mean()
    if alpha < 1:
        assert target is not None
        loss = loss + (1 - alpha) * F.mse_loss(s, target.to(s.dtype))
    return loss
