"""Channels parted into groups of equal size, so that what inputs of one group do to outputs of another is as little as possible."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STARTS = 4
"""Random ones, beside the spectral one."""
ROUNDS = 20
"""Of the alternation at most; it ends where nothing gets better, mostly after three to six."""
Matrix = NDArray[np.float64]
Groups = NDArray[np.intp]


def part(energy: Matrix, groups: int, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Orders of outputs and inputs in which the diagonal blocks hold as much energy as can be found.

    Inputs are assigned to groups at the outputs' groups, then outputs at the inputs', each time exactly; from the singular vectors of the scaled
    matrix, from the order as it is, and from random groups. The best end is taken.

    Examples:
        >>> part(np.array([[0.0, 1, 0, 1], [1, 0, 1, 0], [0, 2, 0, 2], [2, 0, 2, 0]]), 2)
        ([1, 3, 0, 2], [0, 2, 1, 3])

    Args:
        energy: ``(outputs, inputs)``, 0 or more: what each input does to each output.
        groups: divides both.
        seed: of the random starts.

    Returns:
        Output and input channels, group by group, ascending within each; groups ascend by their first input.

    Source: spectral co-clustering (Dhillon, KDD 2001), representatives by pivoted QR (Damle, Minden and Ying, 2019), exact balanced assignment.
    """
    outs = len(energy)
    draw = np.random.default_rng(seed)
    starts = [np.arange(outs) * groups // outs, _spectral(energy, groups)]
    starts += [draw.permutation(outs) * groups // outs for _ in range(STARTS)]
    best, kept = None, -1.0
    for start in starts:
        by_output, by_input, held = _alternated(energy, start, groups)
        if best is None or held > kept * (1 + 1e-9):
            best, kept = (by_output, by_input), held
    assert best is not None
    by_output, by_input = best
    first = [int(np.flatnonzero(by_input == b)[0]) for b in range(groups)]
    order = np.argsort(first)
    return tuple([int(c) for b in order for c in np.flatnonzero(by == b)] for by in (by_output, by_input))  # type: ignore[return-value]


def _alternated(energy: Matrix, by_output: Groups, groups: int) -> tuple[Groups, Groups, float]:
    held = -1.0
    by_input = by_output[:0]
    for _ in range(ROUNDS):
        inputs, _ = assign(energy.T @ np.eye(groups)[by_output])
        outputs, now = assign(energy @ np.eye(groups)[inputs])
        if len(by_input) and now <= held * (1 + 1e-12):
            break
        by_output, by_input, held = outputs, inputs, now
    return by_output, by_input, held


def assign(scores: Matrix) -> tuple[Groups, float]:
    """The group of each channel, all of one size, with the largest sum of scores ``(channels, groups)``, and that sum.

    Examples:
        >>> assign(np.array([[3.0, 0.0], [2.0, 1.0]]))
        (array([0, 1]), 4.0)
    """
    from scipy.optimize import linear_sum_assignment

    room = len(scores) // scores.shape[1]
    rows, columns = linear_sum_assignment(np.repeat(scores, room, axis=1), maximize=True)
    by = np.empty(len(scores), dtype=np.intp)
    by[rows] = columns // room
    return by, float(scores[rows, by[rows]].sum())


def _spectral(energy: Matrix, groups: int) -> Groups:
    from scipy.linalg import qr

    rows, columns = (np.sqrt(np.maximum(energy.sum(a), 1e-30)) for a in (1, 0))
    left = np.linalg.svd(energy / rows[:, None] / columns, full_matrices=False)[0][:, :groups]
    if left.shape[1] < groups:
        return np.arange(len(energy)) * groups // len(energy)
    pivots = qr(left.T, mode="economic", pivoting=True)[2][:groups]
    return assign(np.abs(left @ left[pivots].T))[0]
