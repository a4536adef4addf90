"""Second-order pruning: weights go where the layer's output changes least, and those that stay make up for it.

For one layer with inputs x and H = E[x x^T], the error of its output is tr((W - W0) H (W - W0)^T). On a given mask the best weights are a least
squares problem for each output, solved for all of them together by preconditioned conjugate gradients. Masks come from two proposals, and the
one with the lower error is taken: the weights that cost least to set to zero alone, in several rounds with the others refitted in between; and
optimal brain surgeon's saliency w^2 / [H^-1]_jj, which counts on the others' refit, at once. Convolutions are linear in their patches; each
group is a layer of its own.

Sources: Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon", NeurIPS 1992; Frantar and Alistarh, "Optimal
brain compression", NeurIPS 2022, and "SparseGPT", ICML 2023; conjugate gradients on a fixed mask: Meng et al., "ALPS", NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from gossamer.errors import UsageError
from gossamer.profiling.runtime import evaluating
from gossamer.sources.batches import Batch
from gossamer.sparsity.selection import Pattern, nm_mask, select

ROUNDS = 6
"""In which weights go when the others are refitted in between."""
ITERATIONS = 8
"""Of conjugate gradients after each round; three times as many at the end."""
DAMPING = 0.01
"""Added to the diagonal of H, as a fraction of its mean."""
POSITIONS = 2048
"""Most positions of a batch that a layer is measured on, drawn with a fixed seed."""
HELD_BYTES = 2**29
"""Second moments held at a time; layers beyond them wait for the next sweep, in which the layers before them are sparse already."""


def reconstruct(
    model: nn.Module,
    layers: Mapping[str, nn.Linear | _ConvNd],
    batches: Iterable[Batch],
    *,
    sparsity: float | None,
    pattern: Pattern | None = None,
    scope: str = "layer",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Make layers sparse in place, one after the other in the order they run in.

    Args:
        model: changed in place.
        layers: weight name -> its layer.
        batches: taken apart, to be swept over several times.
        sparsity: fraction of each layer's weights that go, or None with a pattern.
        pattern: ``N:M`` along the input channels.
        scope: ``"layer"`` or ``"row"``.
        progress: called with layers done and all.

    Returns:
        The masks of the weights that stay; layers that never ran are left out.

    Raises:
        UsageError: the batches are empty, or a layer's input is not finite.
    """
    masks: dict[str, Tensor] = {}
    for group in _stages(layers):
        moments = _second_moments(model, {n: layers[n] for n in group}, batches)
        for name in group:
            if name in moments:
                masks[name] = _prune(layers[name].weight, moments.pop(name), sparsity, pattern, scope)
            if progress is not None:
                progress(list(layers).index(name) + 1, len(layers))
    return masks


def _stages(layers: Mapping[str, nn.Linear | _ConvNd]) -> list[list[str]]:
    """Layers in groups whose second moments fit in memory; at least a dozen groups, so that later layers see sparse ones before them."""
    out: list[list[str]] = [[]]
    size, most = 0, -(-len(layers) // 12)
    for name, module in layers.items():
        groups = getattr(module, "groups", 1)
        bytes_ = 4 * groups * module.weight[0].numel() ** 2
        if out[-1] and (size + bytes_ > HELD_BYTES or len(out[-1]) >= most):
            out.append([])
            size = 0
        out[-1].append(name)
        size += bytes_
    return out


def _second_moments(model: nn.Module, layers: Mapping[str, nn.Linear | _ConvNd], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """E[x x^T] for every layer and group: ``(groups, K, K)``, K the inputs of one output."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            x_PGK = patches(module, inputs[0].detach())
            now = torch.einsum("pgk,pgl->gkl", x_PGK, x_PGK) if x_PGK.shape[1] > 1 else (x_PGK[:, 0].T @ x_PGK[:, 0])[None]
            sums[name] = sums[name].add_(now) if name in sums else now
            counts[name] = counts.get(name, 0) + len(x_PGK)

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    try:
        seen = 0
        with evaluating(model):
            for batch in batches:
                model(*batch.args, **batch.kwargs)
                seen += 1
    finally:
        for h in handles:
            h.remove()
    if not seen:
        raise UsageError("criterion='second_order' got no calibration batch: the data is empty")
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise UsageError(f"the inputs of {name} are not finite on the calibration data: check the data and the network")
    return {name: total / counts[name] for name, total in sums.items()}


def patches(module: nn.Linear | _ConvNd, x: Tensor) -> Tensor:
    """What one output of a layer is computed from: ``(positions, groups, K)``, at most `POSITIONS` of them.

    Example:
        >>> conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        >>> patches(conv, torch.zeros(2, 4, 8, 8)).shape
        torch.Size([32, 2, 18])
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, 1, x.shape[-1])
        if len(rows) > POSITIONS:
            rows = rows[torch.randperm(len(rows), generator=generator)[:POSITIONS].to(x.device)]
        return rows.float()
    spatial = len(module.kernel_size)
    x = x if x.dim() == spatial + 2 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sizes = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
    ]
    total = x.shape[0]
    for n in sizes:
        total *= n
    drawn = torch.randperm(total, generator=generator)[:POSITIONS] if total > POSITIONS else torch.arange(total)
    index: list[Tensor] = []
    for axis in reversed(range(spatial)):
        at = drawn % sizes[axis]
        drawn = drawn // sizes[axis]
        offsets = torch.arange(module.kernel_size[axis]) * module.dilation[axis]
        shape = [1] * (spatial + 1)
        shape[axis + 1] = -1
        index.insert(0, (at * module.stride[axis]).reshape(-1, *(1,) * spatial) + offsets.reshape(shape))
    samples = drawn.reshape(-1, *(1,) * spatial)
    got = x.movedim(1, -1)[(samples.to(x.device), *(i.to(x.device) for i in index))]  # (P, k.., C)
    return got.movedim(-1, 1).reshape(len(got), module.groups, -1).float()


def _prune(weight: Tensor, h_GKK: Tensor, sparsity: float | None, pattern: Pattern | None, scope: str) -> Tensor:
    """Prune one layer in place; returns its mask."""
    groups, k, _ = h_GKK.shape
    w0_GOK = weight.detach().reshape(groups, -1, k).float()
    h_GKK = h_GKK.float()
    diagonal_GK = h_GKK.diagonal(dim1=1, dim2=2)
    damping_GK = torch.where(diagonal_GK > 0, DAMPING * diagonal_GK.mean(1, keepdim=True), 1.0)  # an input that is always 0 costs nothing
    h_GKK = h_GKK + torch.diag_embed(damping_GK)

    def masked(score_GOK: Tensor, part: float) -> Tensor:
        score = score_GOK.reshape(weight.shape)
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
    weight.detach().copy_(w_GOK.reshape(weight.shape))
    return kept_GOK.reshape(weight.shape)


def refit(w_GOK: Tensor, w0_GOK: Tensor, h_GKK: Tensor, kept_GOK: Tensor, iterations: int) -> Tensor:
    """Least squares on a mask: minimise tr((W - W0) H (W - W0)^T) over W that is zero where the mask says so.

    Example:
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
