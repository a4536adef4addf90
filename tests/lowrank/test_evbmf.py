"""The variational rank of matrices whose rank is known."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import UsageError
from gossamer.lowrank import evbmf_rank


@pytest.mark.parametrize("rank", [0, 1, 3, 10])
@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (50, 400)], ids=str)
@pytest.mark.parametrize("noise", [0.01, 0.5])
def test_the_rank_under_noise_of_any_strength(rank, shape, noise):
    x = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) + noise * torch.randn(shape)
    for scale in (1e-4, 1.0, 1e4):
        assert evbmf_rank(x * scale) == rank
    assert evbmf_rank(x.T) == rank


def test_without_noise_and_at_the_edges():
    assert evbmf_rank(torch.randn(20, 3) @ torch.randn(3, 30)) == 3
    assert evbmf_rank(torch.zeros(5, 6)) == 0
    assert evbmf_rank(torch.ones(5, 6)) == 1
    assert evbmf_rank(torch.ones(1, 6)) == 1
    for bad in (torch.zeros(3), torch.full((2, 2), float("inf"))):
        with pytest.raises(UsageError, match="evbmf_rank"):
            evbmf_rank(bad)
