"""How much the outputs depend on each position of a layer's output: an error there counts that much where codes are fitted.

A layer's error at the border of a photograph, or past a clip, hardly reaches the outputs. With ``g`` the derivative of a random combination of the outputs
(`gossamer.quantization.derivatives`) and errors of positions that are independent, an error ``d x`` of the layer adds ``g^2 (d x)^2``, and the sum over positions is
``d H d'`` with ``H`` the covariance of the inputs ``x`` weighted by ``g^2``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from gossamer.quantization.derivatives import derivatives
from gossamer.quantization.graph import LINEAR, op_name

_LEAST = 1e-3  # of the mean, what every position counts


def position_weights(
    module: fx.GraphModule, layers: Iterable[fx.Node], pieces: list[list[Any]], activation_bits: int = 8
) -> list[dict[str, Tensor]]:
    """Of each piece of the samples, the weights of the positions of each layer's output, by its name; none of layers that have no derivative.

    Args:
        module: a float graph.
        layers: convolutions and linear layers of it.
        pieces: flat inputs.
        activation_bits: with fewer than 8, errors go further than derivatives tell, and weights are the roots of what they are with 8.

    Returns:
        For each piece tensors shaped as the layer's output without its channels; their mean over all pieces is about 1.

    Source:
        The diagonal of the Gauss-Newton matrix, one weight for all channels of a position; Kim et al., "GuidedQuant", ICML 2025, section 3, for its use in rounding.
    """
    watched, found = set(layers), [dict[str, list[Tensor]]() for _ in pieces]
    try:
        for piece, seen in zip(pieces, found, strict=True):
            for _, part in derivatives(module, watched, piece):
                for node, _, gradient in part:
                    seen.setdefault(node.name, []).append(gradient.square().mean(-1 if op_name(node) in LINEAR else 1))
    except RuntimeError:  # no derivative of some operator, or of values in place
        return [{} for _ in pieces]
    joined = [{name: torch.cat(same) if same[0].dim() else same[0] for name, same in seen.items()} for seen in found]
    sums = {name: torch.stack([t[name].sum() for t in joined if name in t]).sum() for name in set().union(*joined)}
    counts = {name: sum(t[name].numel() for t in joined if name in t) for name in sums}
    means = {name: float(total) / counts[name] for name, total in sums.items()}
    usable = [name for name, mean in means.items() if 0 < mean < float("inf") and all(name in t for t in joined)]
    power = 1.0 if activation_bits >= 8 else 0.5
    return [{name: (t[name] / means[name]) ** power + _LEAST for name in usable} for t in joined]
