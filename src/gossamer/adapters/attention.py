"""`torch.nn.MultiheadAttention` without the rule that heads times their size is the width of the input: the same parameters, any number of heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FreeMultiheadAttention(nn.MultiheadAttention):
    """Computes what `torch.nn.MultiheadAttention` does; its head count and head size follow its parameters.

    ``num_heads`` is the number of heads; ``head_dim`` stays what it was, because it sets the scale of the scores.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original, masks and unbatched inputs included."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal needs attn_mask")
        batched, together = query.dim() == 3, query is key and key is value
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._project(query, key, value, together)
        if self.bias_k is not None and self.bias_v is not None:
            n = len(k)
            k, v = torch.cat([k, self.bias_k.expand(n, -1, -1)], 1), torch.cat([v, self.bias_v.expand(n, -1, -1)], 1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = (torch.cat([t, torch.zeros_like(t[:, :, :1])], 2) for t in (k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout, scale = (self.dropout if self.training else 0.0), self.head_dim**-0.5
        weights = None
        if need_weights:
            scores = (q * scale) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            if dropout:
                weights = F.dropout(weights, dropout)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, together: bool) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None and together:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        weights = (
            self.in_proj_weight.chunk(3)
            if self.in_proj_weight is not None
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores ``(batch, heads, queries, keys)``."""
        merged: Tensor | None = None
        for given in (attn_mask, key_padding_mask):
            if given is None:
                continue
            mask = torch.zeros_like(given, dtype=q.dtype).masked_fill(given, float("-inf")) if given.dtype == torch.bool else given
            if given is key_padding_mask:
                mask = mask[:, None, None, :]
            elif mask.dim() == 3:
                mask = mask.unflatten(0, (len(q), -1))
            if mask.shape[-1] < k.shape[2]:  # keys that bias_k and add_zero_attn put at the end
                mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
            merged = mask if merged is None else merged + mask
        return merged


def adapt_attention(module: nn.MultiheadAttention) -> None:
    """Let a `torch.nn.MultiheadAttention` have any number of heads, in place; its parameters keep their names.

    Examples:
        >>> attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> x = torch.ones(1, 3, 8)
        >>> before = attention(x, x, x)[0]
        >>> adapt_attention(attention)
        >>> bool((attention(x, x, x)[0] - before).abs().max() < 1e-6)
        True

    Args:
        module: changed in place.
    """
    module.__class__ = FreeMultiheadAttention
    module._qkv_same_embed_dim = False  # keeps encoder layers from the fused path, which derives the head size from the width


def original_attention(module: nn.Module) -> bool:
    """Whether a module is exactly `torch.nn.MultiheadAttention`."""
    return type(module) is nn.MultiheadAttention


@contextmanager
def free_attention(model: nn.Module) -> Iterator[None]:
    """Every `torch.nn.MultiheadAttention` of a network adapted for a while, so that its operations can be seen and sized."""
    swapped = [m for m in model.modules() if original_attention(m)]
    for m in swapped:
        m.__class__ = FreeMultiheadAttention
    try:
        yield
    finally:
        for m in swapped:
            m.__class__ = nn.MultiheadAttention
