"""Second-order pruning: weights go where the layer's output changes least, and those that stay make up for it.

For one layer with inputs x and H = Cov(x), the error of its output is tr((W - W0) H (W - W0)^T), up to the mean, which its bias or the batch norm
after it makes up for. On a given mask the best weights are a least squares problem for each output, solved for all of them together by
preconditioned conjugate gradients. Masks come from two proposals, and the one with the lower error is taken: the weights that cost least to set to
zero alone, in several rounds with the others refitted in between; and optimal brain surgeon's saliency w^2 / [H^-1]_jj, which counts on the others'
refit, at once. Convolutions are linear in their patches; each group is a layer of its own. Inputs are the dense network's: fitting each layer to
what the sparse layers before it give was measured to be worse, since a hundred pictures do not tell their errors from noise.

Sources: Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon", NeurIPS 1992; Frantar and Alistarh, "Optimal
brain compression", NeurIPS 2022, and "SparseGPT", ICML 2023; conjugate gradients on a fixed mask: Meng et al., "ALPS", NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gossamer.calibration import Moments, in_stages, second_moments
from gossamer.sources.batches import Batch
from gossamer.sparsity.criteria import owners
from gossamer.sparsity.selection import Pattern, nm_mask, select

ROUNDS = 6
"""In which weights go when the others are refitted in between."""
ITERATIONS = 8
"""Of conjugate gradients after each round; three times as many at the end."""
DAMPING = (0.1, 1.0)
"""What is added to the diagonal of H, as a fraction of its mean, lies in this range: a quarter of inputs over positions, so that few positions are not
fitted exactly."""


def reconstruct(
    model: nn.Module,
    weights: Sequence[str],
    batches: Iterable[Batch],
    *,
    sparsity: float | None,
    pattern: Pattern | None = None,
    scope: str = "layer",
    norms: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sparse weights of layers, each fitted to what it gave before.

    Args:
        model: the dense network; it stays so.
        weights: names of weights of linear layers and (not transposed) convolutions.
        batches: taken apart; swept over once, or several times where memory asks for it.
        sparsity: fraction of each layer's weights that go, or None with a pattern.
        pattern: ``N:M`` along the input channels.
        scope: ``"layer"`` or ``"row"``.
        norms: batch norms will be re-estimated: convolutions without a bias need not keep their outputs' means.
        progress: called with layers done and all.

    Returns:
        The masks of the weights that stay, and new values of weights and biases by name. Layers that never ran are left out.

    Raises:
        UsageError: the batches are empty, or a layer's input is not finite.
    """
    layers = owners(model, weights)
    masks: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    done = 0
    for group in in_stages(layers):
        moments = second_moments(model, {n: layers[n] for n in group}, batches)
        for name in group:
            if name in moments:
                layer = layers[name]
                centre = layer.bias is not None or (norms and isinstance(layer, _ConvNd))
                masks[name], values[name], shift = _prune(layer.weight.detach(), moments.pop(name), centre, sparsity, pattern, scope)
                if layer.bias is not None:
                    values[name.removesuffix("weight") + "bias"] = layer.bias.detach() + shift.to(layer.bias.dtype)
            done += 1
            if progress is not None:
                progress(done, len(layers))
    return masks, values


def _prune(
    w0: Tensor, moments: Moments, centre: bool, sparsity: float | None, pattern: Pattern | None, scope: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The mask of one layer, its weights, and what its outputs' means lost."""
    mean_GK, h_GKK = moments.mean, moments.covariance() if centre else moments.about_zero()
    groups, k, _ = h_GKK.shape
    average_G1 = h_GKK.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    fraction = min(max(0.25 * k / moments.n, DAMPING[0]), DAMPING[1])
    h_GKK = h_GKK + torch.diag_embed(torch.where(average_G1 > 0, fraction * average_G1, 1.0).expand(groups, k))
    w0_GOK = w0.reshape(groups, -1, k).float()

    def masked(score_GOK: Tensor, part: float) -> Tensor:
        score = score_GOK.reshape(w0.shape)
        if pattern is not None:
            n = pattern.n + round((pattern.m - pattern.n) * (1 - part))
            return nm_mask(score, n, pattern.m).reshape(w0_GOK.shape)
        assert sparsity is not None
        return select({"w": score}, sparsity=sparsity * part, scope=scope)["w"].reshape(w0_GOK.shape)

    alone_GK = h_GKK.diagonal(dim1=1, dim2=2)
    w_GOK = w0_GOK
    for t in range(1, ROUNDS + 1):
        kept_GOK = masked(w_GOK.square() * alone_GK[:, None], 1 - (1 - t / ROUNDS) ** 3)
        w_GOK = refit(torch.where(kept_GOK, w_GOK, 0.0), w0_GOK, h_GKK, kept_GOK, ITERATIONS * (3 if t == ROUNDS else 1))
    found = [(kept_GOK, w_GOK)]
    together_GK = torch.linalg.inv(h_GKK.double()).diagonal(dim1=1, dim2=2).float()
    kept_GOK = masked(w0_GOK.square() / together_GK[:, None].clamp(min=1e-30), 1.0)
    found.append((kept_GOK, refit(torch.where(kept_GOK, w0_GOK, 0.0), w0_GOK, h_GKK, kept_GOK, 3 * ITERATIONS)))
    kept_GOK, w_GOK = min(found, key=lambda f: output_error(f[1], w0_GOK, h_GKK))
    shift_GO = ((w0_GOK - w_GOK) @ mean_GK[:, :, None])[:, :, 0]
    return kept_GOK.reshape(w0.shape), w_GOK.reshape(w0.shape).to(w0.dtype), shift_GO.reshape(-1)


def refit(w_GOK: Tensor, w0_GOK: Tensor, h_GKK: Tensor, kept_GOK: Tensor, iterations: int) -> Tensor:
    """Least squares on a mask: minimise tr((W - W0) H (W - W0)^T) over W that is zero where the mask says so.

    Examples:
        >>> w0, h = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])
        >>> refit(torch.tensor([[[1.0, 0.0]]]), w0, h, torch.tensor([[[True, False]]]), 4)
        tensor([[[1.5000, 0.0000]]])

    Args:
        w_GOK: where to start, zero outside the mask; groups x outputs x inputs.
        w0_GOK: the dense weights.
        h_GKK: second moments of the inputs, positive definite.
        kept_GOK: the mask.
        iterations: of conjugate gradients, each output on its own.
    """
    scale_G1K = h_GKK.diagonal(dim1=1, dim2=2)[:, None]
    residual = torch.where(kept_GOK, (w0_GOK - w_GOK) @ h_GKK, 0.0)
    z = residual / scale_G1K
    direction, product = z, (residual * z).sum(2, keepdim=True)
    for _ in range(iterations):
        along = torch.where(kept_GOK, direction @ h_GKK, 0.0)
        step = product / (direction * along).sum(2, keepdim=True).clamp(min=1e-30)
        w_GOK = w_GOK + step * direction
        residual = residual - step * along
        z = residual / scale_G1K
        product, before = (residual * z).sum(2, keepdim=True), product
        direction = z + product / before.clamp(min=1e-30) * direction
    return w_GOK


def output_error(w_GOK: Tensor, w0_GOK: Tensor, h_GKK: Tensor) -> float:
    """tr((W - W0) H (W - W0)^T), summed over groups."""
    d = w_GOK - w0_GOK
    return float(((d @ h_GKK) * d).sum())
