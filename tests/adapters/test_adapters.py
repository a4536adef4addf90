"""Adapters against torch's own modules."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from gossamer.adapters import adapt_attention, free_attention, numbers_in, rescale_calls, with_numbers

OPTIONS = list(itertools.product([False, True], repeat=7))


@pytest.mark.parametrize("mask", [None, "bool", "float", "heads"])
def test_free_attention_computes_what_torchs_does(mask):
    torch.manual_seed(0)
    for first, bias, kv, zero, separate, batched, padded in OPTIONS:
        sizes = {"kdim": 12, "vdim": 10} if separate else {}
        m = nn.MultiheadAttention(16, 4, bias=bias, add_bias_kv=kv, add_zero_attn=zero, batch_first=first, **sizes).eval()
        for p in m.parameters():
            nn.init.normal_(p, std=0.3)
        q, k, v = torch.randn(3, 5, 16), torch.randn(3, 7, sizes.get("kdim", 16)), torch.randn(3, 7, sizes.get("vdim", 16))
        extra = {
            None: None,
            "bool": torch.rand(5, 7) > 0.7,
            "float": torch.randn(5, 7),
            "heads": torch.randn((3 if batched else 1) * 4, 5, 7),
        }[mask]
        padding = torch.rand(3, 7) > 0.8 if padded else None
        for t in (padding, extra if mask == "bool" else None):
            if t is not None:
                t[..., 0] = False  # somebody has to be looked at
        if not batched:
            q, k, v, padding = q[0], k[0], v[0], None if padding is None else padding[0]
        elif not first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        for weights in (False, True):
            options = {"key_padding_mask": padding, "attn_mask": extra, "need_weights": weights, "average_attn_weights": zero}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("warnings.warn", lambda *a, **k: None)  # torch prefers masks of one type
                expected = m(q, k, v, **options)
                with free_attention(m):
                    found = m(q, k, v, **options)
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
            if weights:
                torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
        assert type(m) is nn.MultiheadAttention


def test_adapted_attention_takes_any_number_of_heads():
    m = nn.MultiheadAttention(8, 2, batch_first=True)
    adapt_attention(m)
    m.num_heads = 3
    m.in_proj_weight, m.in_proj_bias = nn.Parameter(torch.randn(36, 8)), nn.Parameter(torch.randn(36))
    m.out_proj = nn.Linear(12, 8)
    assert m(*[torch.randn(2, 5, 8)] * 3)[0].shape == (2, 5, 8)


def test_numbers_are_walked_in_the_same_order():
    args, kwargs = (None, (slice(None), slice(2, 8, None)), [3, 4.5, True]), {"dim": 1}
    leaves = numbers_in(args, kwargs)
    assert leaves == [None, None, None, None, 2, 8, None, 3, 4.5, None, 1]
    changed = with_numbers(args, kwargs, {5: (1, 2), 8: (2.0, 3.0)})
    assert changed == ((None, (slice(None), slice(2, 4, None)), [3, 3.0, True]), {"dim": 1})


def test_rescaling_counts_calls_of_every_forward_anew_and_composes():
    class Two(nn.Module):
        def forward(self, x):
            return x.view(-1, 4), x.view(-1, 4)

    m = Two()
    rescale_calls(m, "view", 1, {2: (2, 4)})
    for _ in range(2):
        a, b = m(torch.zeros(8))
        assert (a.shape, b.shape) == ((2, 4), (4, 2))
    rescale_calls(m, "view", 1, {2: (1, 2)})
    assert m(torch.zeros(8))[1].shape == (8, 1)
    assert isinstance(m, Two)
