"""What small changes of layers do to a network's outputs, all of them at once: the second-order term of the divergence.

A change of a layer moves the outputs by dz, and the divergence by half dz^T H dz, H being its second derivative. With random v of E[v v^T] = H that is
half of E[(v^T dz)^2], and a backward pass from v gives v^T dz for each change of each layer, sample by sample: the gradient at the layer's output times
what the change adds there. So a few backward passes stand for a forward pass with each change.

Sources: Amari, "Natural gradient works efficiently in learning", 1998 (H of logits is the Fisher information); Hutchinson, 1990 (random signs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils import _pytree as pytree

from gossamer.calibration.divergence import Divergence, numbers
from gossamer.exchange import Layer, bare, put
from gossamer.profiling.runtime import evaluating
from gossamer.sources.batches import Batch

DRAWS = 2
"""Random directions of the outputs for each sample: samples are draws too, so that few are enough."""
SAMPLES_AT_ONCE = 8
"""Of a batch: what a backward pass needs is kept for so many."""
NUMBERS_AT_ONCE = 2**26
"""Of gradients of one layer's weight, a matrix for each sample."""


@dataclass(frozen=True)
class Change:
    """What is added to a layer.

    Attributes:
        weight: ``(groups, outs, K)``, as `gossamer.exchange.canonical` has it.
        bias: ``(groups * outs,)``, or None.
    """

    weight: Tensor
    bias: Tensor | None = None


def predicted(
    model: nn.Module,
    layers: Mapping[str, Layer],
    changes: Mapping[str, Sequence[Sequence[Change]]],
    far: Divergence,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, list[float]]:
    """For each change alone, what ``far`` would be for the network with it, to second order; without layers that no gradient reaches.

    Examples:
        >>> layer = nn.Linear(4, 3)
        >>> far = Divergence(layer, [Batch((torch.randn(2000, 4),), {}, None)])
        >>> change = Change(torch.randn(1, 3, 4) / 10)
        >>> found = predicted(layer, {"": layer}, {"": [(change,)]}, far)[""][0]
        >>> changed = nn.Linear(4, 3)
        >>> _ = changed.load_state_dict({"weight": layer.weight + change.weight[0], "bias": layer.bias})
        >>> bool(0.8 < found / far(changed) < 1.25)
        True

    Args:
        model: the original, which stays as it is.
        layers: modules of it by name.
        changes: of them; each of one or more forms, of which batches take one in turn (see `gossamer.calibration.Halves`).
        far: the distance from this network.
        draws: random directions of the outputs.
        seed: of them.
    """
    generator = torch.Generator().manual_seed(seed)
    forms = max((len(c) for own in changes.values() for c in own), default=1)
    every = [{n: _Changes(layers[n], [c[f % len(c)] for c in own]) for n, own in changes.items() if own} for f in range(forms)]
    sums = {n: torch.zeros(len(own), dtype=torch.float64) for n, own in changes.items()}
    try:
        with _frozen(model), evaluating(model), torch.enable_grad():
            for i, (batch, pulls) in enumerate(far.pulls(draws, generator)):
                for part, rows in _parts(batch, pulls[0]):
                    found = _squares(model, layers, every[i % forms], part, [[v[rows] for v in pull] for pull in pulls])
                    for name, squares in found.items():
                        sums[name] += squares
    except Exception:  # an operation without a gradient, or a part of a batch that the network does not take: whatever it raises
        return {}
    return {n: (s / (2 * draws * far.count)).nan_to_num(inf, inf).tolist() for n, s in sums.items() if bool((s != 0).any())}


class _Changes:
    """The changes of one layer, ready to meet gradients."""

    def __init__(self, layer: Layer, changes: Sequence[Change]) -> None:
        where = layer.weight.device
        outs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        biases = [torch.zeros(outs) if c.bias is None else c.bias for c in changes]
        self._biases_CO = torch.stack([b.to(where, torch.float32) for b in biases])
        self._spatial = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        self._matrices_CW: Tensor | None = None
        self._layers: list[nn.Module] = []
        if _is_matrix(layer):
            self._matrices_CW = torch.stack([c.weight.flatten() for c in changes]).to(where, torch.float32)
        else:
            self._layers = [_alone(layer, c.weight) for c in changes]

    def dots(self, x: Tensor, grad: Tensor, samples: int) -> Tensor:
        """The gradient at the layer's output times what each change adds there: ``(samples, changes)``, or one sum for all samples."""
        grad_NPO = self._rows(grad, samples)
        found = grad_NPO.sum(1) @ self._biases_CO.T
        if self._matrices_CW is None:
            each = [(self._rows(layer(x.float()), samples) * grad_NPO).sum((1, 2)) for layer in self._layers]
            return (found + torch.stack(each, 1)).double().cpu()
        x_NPK = self._rows(x, samples)
        step = max(1, NUMBERS_AT_ONCE // self._matrices_CW.shape[1])
        for start in range(0, len(x_NPK), step):
            rows = slice(start, start + step)
            found[rows] += (grad_NPO[rows].transpose(1, 2) @ x_NPK[rows]).flatten(1) @ self._matrices_CW.T
        return found.double().cpu()

    def _rows(self, t: Tensor, samples: int) -> Tensor:
        """``(samples, positions, channels)``; where it is not known which rows are whose, ``(1, all positions, channels)``."""
        if self._spatial:
            t = (t if t.dim() == self._spatial + 2 else t[None]).movedim(1, -1)
        apart = samples if t.dim() > 1 and len(t) == samples else 1
        return t.reshape(apart, -1, t.shape[-1]).float()


def _is_matrix(layer: Layer) -> bool:
    """Whether it multiplies what lies at each position with one matrix."""
    if isinstance(layer, nn.Linear):
        return True
    plain = layer.groups == 1 and {*layer.kernel_size, *layer.stride} == {1} and not isinstance(layer, _ConvTransposeNd)
    return plain and not any(layer._reversed_padding_repeated_twice)


def _alone(layer: Layer, weight_GOK: Tensor) -> nn.Module:
    """A layer of the same geometry with another weight and no bias."""
    twin = bare(layer).to_empty(device=layer.weight.device).float()
    twin.register_parameter("bias", None)
    twin.requires_grad_(False)
    put(twin, weight_GOK.reshape(*weight_GOK.shape[:2], -1, *(() if isinstance(layer, nn.Linear) else layer.kernel_size)))
    return twin.eval()


def _squares(
    model: nn.Module, layers: Mapping[str, Layer], changes: Mapping[str, _Changes], batch: Batch, pulls: Sequence[Sequence[Tensor]]
) -> dict[str, Tensor]:
    """Sums over samples and directions of what each change moves the outputs by along the direction, squared."""
    samples = samples_of((batch.args, batch.kwargs))
    anchors: list[Tensor] = []
    moved: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
            if not anchors:
                anchors.append(torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True))
            x, out = inputs[0].detach().clone(), out + anchors[0].to(out)  # so that each layer lies on a way back to the anchor

            def came(grad: Tensor) -> None:
                with torch.no_grad():
                    found, before = changes[name].dots(x, grad, samples), moved.get(name)
                    if before is not None and len(before) != len(found):  # called in two ways, once with rows that are nobody's
                        found, before = found.sum(0, keepdim=True), before.sum(0, keepdim=True)
                    moved[name] = found if before is None else before + found

            out.register_hook(came)
            return out

        return hook

    handles = [layers[n].register_forward_hook(watch(n)) for n in changes]
    try:
        outs = numbers(model(*batch.args, **batch.kwargs))
    finally:
        for h in handles:
            h.remove()
    total = {n: torch.zeros((), dtype=torch.float64) for n in changes}
    if not anchors:
        return total
    reached = [i for i, o in enumerate(outs) if o.requires_grad]
    for at, pull in enumerate(pulls):
        moved.clear()
        torch.autograd.grad([outs[i] for i in reached], anchors, [pull[i].to(outs[i]) for i in reached], retain_graph=at + 1 < len(pulls))
        for name, dots in moved.items():
            total[name] = total[name] + dots.square().sum(0)
    return total


def samples_of(inputs: Any) -> int:
    """Rows of the first tensor among some inputs that has any."""
    return len(next((t for t in _tensors(inputs) if t.dim()), [0]))


def _tensors(inputs: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]


def _parts(batch: Batch, pull: Sequence[Tensor]) -> Iterator[tuple[Batch, slice]]:
    """A batch in parts of a few samples, where every tensor has a row for each."""
    n = samples_of((batch.args, batch.kwargs))
    if n <= SAMPLES_AT_ONCE or any(not t.dim() or len(t) != n for t in (*_tensors((batch.args, batch.kwargs)), *pull)):
        yield batch, slice(None)
        return
    for start in range(0, n, SAMPLES_AT_ONCE):
        rows = slice(start, start + SAMPLES_AT_ONCE)

        def take(leaf: Any, rows: slice = rows) -> Any:
            return leaf[rows] if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(take, (batch.args, batch.kwargs))
        yield Batch(args, kwargs, None), rows


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters that take no gradient."""
    taking = [p for p in model.parameters() if p.requires_grad]
    for p in taking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in taking:
            p.requires_grad_(True)
