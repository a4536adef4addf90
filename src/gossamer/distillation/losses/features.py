"""Losses on feature maps and embeddings as pure functions. Shape letters: N batch, C channels, P positions, D features in all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.distillation.losses._checks import check_weights, wide
from gossamer.errors import UsageError


def fitnet_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean((student - teacher)^2)`` over all elements: hints. Where shapes differ, put an adapter before it (`FeatureTap` does).

    Examples:
        >>> fitnet_loss(torch.zeros(2, 3), torch.full((2, 3), 2.0)).item()
        4.0

    Args:
        student: features of any shape.
        teacher: the same shape; no gradient reaches it.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        UsageError: shapes differ.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015 (there half the sum of squares).
    """
    if student.shape != teacher.shape:
        raise UsageError(f"fitnet needs features of one shape, not {tuple(student.shape)} and {tuple(teacher.shape)}: use an adapter")
    return F.mse_loss(wide(student), wide(teacher.detach()))


def attention_map(features: Tensor, *, p: float = 2.0) -> Tensor:
    """``q / ||q||_2`` with ``q = sum_c |a_c|^p``, the positions flattened: where a layer looks.

    Examples:
        >>> attention_map(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]), p=1.0)
        tensor([[0.6000, 0.8000]])

    Args:
        features: (N, C, ...), with at least one dimension of positions.
        p: exponent, at least 1.

    Returns:
        (N, P), rows of norm 1 (0 where all features are 0).

    Raises:
        UsageError: there are no positions, or p is below 1.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017.
    """
    if features.dim() < 3 or not p >= 1:
        raise UsageError(f"an attention map needs features (N, C, positions...) and p >= 1, not {tuple(features.shape)} and p={p}")
    a = wide(features)
    q_NP = (a.square() if p == 2 else a.abs().pow(p)).sum(1).flatten(1)
    return F.normalize(q_NP, dim=1)


def attention_transfer_loss(student: Tensor, teacher: Tensor, *, p: float = 2.0) -> Tensor:
    """``||attention_map(student) - attention_map(teacher)||_2^2``, mean over the batch. Channels may differ, positions may not.

    Examples:
        >>> a = torch.tensor([[[1.0, 0.0]]])
        >>> attention_transfer_loss(a, a.flip(2)).item()
        2.0

    Args:
        student: (N, C_S, ...).
        teacher: (N, C_T, ...) with the same positions; no gradient reaches it.
        p: exponent of the map, at least 1.

    Returns:
        The loss, a tensor without dimensions, at most 2.

    Raises:
        UsageError: positions differ, or as `attention_map`.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017.
    """
    a_NP, b_NP = attention_map(student, p=p), attention_map(teacher.detach(), p=p)
    if a_NP.shape != b_NP.shape:
        raise UsageError(
            f"attention transfer needs the same batch and positions, not {tuple(student.shape)} and {tuple(teacher.shape)}: use an adapter"
        )
    return (a_NP - b_NP).square().sum(1).mean()


def similarity_preserving_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``||G_S - G_T||_F^2 / N^2``, with ``G = Q Q^T`` of the flattened features Q (N, D), each row of G scaled to norm 1.

    Examples:
        >>> similarity_preserving_loss(torch.eye(2), torch.ones(2, 2)).item()
        0.292893...

    Args:
        student: (N, ...).
        teacher: (N, ...), of any other shape; no gradient reaches it.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        UsageError: batches differ.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.
    """
    _check_batch(student, teacher, 1)
    grams = []
    for features in (student, teacher.detach()):
        q_ND = wide(features).flatten(1)
        grams.append(F.normalize(q_ND @ q_ND.T, dim=1))
    return (grams[0] - grams[1]).square().sum() / student.shape[0] ** 2


def rkd_loss(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Relational KD: ``distance * mean huber(d_S - d_T) + angle * mean huber(cos_S - cos_T)``.

    d is the distance of two embeddings over the mean distance of all pairs, cos the cosine of the angle that embeddings i and k span at j.
    The means run over ordered pairs and triplets of different samples. Memory grows with N^3.

    Examples:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> rkd_loss(3 * x, x).item() < 1e-6
        True

    Args:
        student: embeddings (N, ...), flattened; at least 3 for angles.
        teacher: embeddings (N, ...), of any other size; no gradient reaches them.
        distance, angle: weights, at least 0.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        UsageError: batches differ or are too small, or a weight is negative.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019.
    """
    check_weights(distance=distance, angle=angle)
    _check_batch(student, teacher, 3 if angle else 2)
    a_ND, b_ND = wide(student).flatten(1), wide(teacher.detach()).flatten(1)
    a_NN, b_NN, n = _distances(a_ND), _distances(b_ND), a_ND.shape[0]
    loss = a_ND.new_zeros(())
    if distance:
        gap_NN = F.huber_loss(_relative(a_NN), _relative(b_NN), reduction="sum")  # the diagonal is 0 in both
        loss = loss + distance * gap_NN / (n * (n - 1))
    if angle:
        gap = F.huber_loss(_cosines(a_NN), _cosines(b_NN), reduction="sum")  # 0 wherever two of the three are one sample
        loss = loss + angle * gap / (n * (n - 1) * (n - 2))
    return loss


def _distances(e_ND: Tensor) -> Tensor:
    """Distances of all pairs, one pair at a time: differences, (N, N, D), are never held, and near pairs stay exact. No gradient at 0."""
    return torch.cdist(e_ND, e_ND, compute_mode="donot_use_mm_for_euclid_dist")


def _relative(d_NN: Tensor) -> Tensor:
    """Distances over the mean of those of different samples."""
    n = len(d_NN)
    return d_NN / (d_NN.sum() / (n * (n - 1))).clamp_min(1e-12)


def _cosines(d_NN: Tensor) -> Tensor:
    """Cosine of the angle at j between i and k, (N, N, N) as (j, i, k), by the law of cosines; 0 where i, j and k are not three samples."""
    inverse_NN = torch.where(d_NN > 0, 1 / torch.where(d_NN > 0, d_NN, 1), 0)
    squared_NN = d_NN.square()
    twice_NNN = squared_NN[:, :, None] + squared_NN[:, None] - squared_NN[None]
    return 0.5 * twice_NNN * inverse_NN[:, :, None] * inverse_NN[:, None] * (1 - torch.eye(len(d_NN), dtype=d_NN.dtype, device=d_NN.device))


def _check_batch(student: Tensor, teacher: Tensor, least: int) -> None:
    if student.dim() < 2 or teacher.dim() < 2 or student.shape[0] != teacher.shape[0] or student.shape[0] < least:
        raise UsageError(
            f"relations between samples need features (N, ...) of the same {least} or more samples, not {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
