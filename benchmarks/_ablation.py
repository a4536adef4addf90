"""Where the noise of an integer network comes from: weights and activations apart, and each tensor alone against the float network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

import gossamer as gs
from gossamer.plan import QuantizeActivation, QuantizeWeight
from gossamer.quantization.graph import bias_node, point_names, tensor_at, weight_name, weighted_nodes
from gossamer.quantization.ops import dequantize, limits
from gossamer.quantization.reconstruction import channel_mean

Change = Callable[[Tensor], Tensor]


class _Changed(fx.Interpreter):
    """Runs a float graph with the values of some nodes changed, and with other weights in one layer, whose channels keep their means."""

    def __init__(self, module: fx.GraphModule, changes: Mapping[fx.Node, Change], layer: fx.Node | None = None) -> None:
        super().__init__(module)
        self.changes, self.layer = changes, layer

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n is self.layer:
            x, w, *others = self.fetch_args_kwargs_from_env(n)[0]
            assert callable(n.target)
            got = n.target(x, self.changes[n](w), *others)
            shift = channel_mean(n, result) - channel_mean(n, got)
            return got + shift.view(-1, *[1] * (got.dim() - 2))
        return self.changes[n](result) if n in self.changes else result


def ablation(result: gs.Result, photographs: Sequence[Tensor], most: int = 12) -> None:
    """Print what rounding does to the outputs, in dB and nats: all, weights alone, activations alone, then one tensor at a time.

    Weights are the fitted integers of ``result``. Weights alone have its biases; one layer alone has a bias that keeps its channels' means.

    Args:
        result: of `gossamer.quantize`.
        photographs: batches.
        most: tensors to list, worst first.
    """
    floating, network = result.floating, result.model
    assert isinstance(floating, fx.GraphModule)
    layers, activations = dict[fx.Node, Change](), dict[fx.Node, Change]()
    layer_of = {str(weight_name(n)): n for n in weighted_nodes(floating.graph)}
    points = {name: n for n, name in point_names(floating.graph).items()}
    bits: dict[str, int] = {}
    for edit in result.plan:
        if isinstance(edit, QuantizeWeight):
            zero = None if edit.signed else tensor_at(network, edit.tensor + "_zero_point")
            rounded = dequantize(tensor_at(network, edit.tensor), tensor_at(network, edit.tensor + "_step"), zero, edit.axis)
            layers[layer_of[edit.tensor]] = partial(_instead, rounded)
            bits[f"weight {edit.tensor}"] = edit.bits
        elif isinstance(edit, QuantizeActivation):
            activations[points[edit.point]] = partial(_rounded, edit)
            bits[f"activation {edit.point}"] = edit.bits
    weight_names, value_names = {n: f"weight {k}" for k, n in layer_of.items()}, {n: f"activation {k}" for k, n in points.items()}
    with torch.no_grad():
        wanted = [_Changed(floating, {}).run(x) for x in photographs]
        print(f"{'':46} {'bits':>4} {'SQNR dB':>8} {'KL, nats':>9}")
        _line("all", "", wanted, [network(x) for x in photographs])
        alone = {n.args[1]: c for n, c in layers.items()} | _biases(floating, network)
        for name, changes in (("weights alone, biases corrected", alone), ("activations alone", activations)):
            _line(name, "", wanted, [_Changed(floating, changes).run(x) for x in photographs])
        for group, names in ((layers, weight_names), (activations, value_names)):
            found = {n: [_Changed(floating, {n: c}, n if group is layers else None).run(x) for x in photographs] for n, c in group.items()}
            for n in sorted(found, key=lambda n: _sqnr(wanted, found[n]))[:most]:
                _line(names[n], bits[names[n]], wanted, found[n])
            noise = sum(10 ** (-_sqnr(wanted, f) / 10) for f in found.values())
            print(f"{f'all {len(found)}, were they independent':46} {'':4} {-10 * math.log10(noise):8.1f}", flush=True)


def _biases(floating: fx.GraphModule, network: fx.GraphModule) -> dict[fx.Node, Change]:
    """The biases of the quantised network, in float, for the float network's."""
    ours = {n.name: n for n in weighted_nodes(floating.graph)}
    found = {}
    for layer in weighted_nodes(network.graph):
        stored = bias_node(layer)
        if stored is not None and stored.target is torch.ops.gossamer.dequantize.default:
            name = str(stored.args[0].target)
            found[bias_node(ours[layer.name])] = partial(_instead, tensor_at(network, name) * tensor_at(network, name + "_step"))
    return found


def _instead(rounded: Tensor, _: Tensor) -> Tensor:
    return rounded


def _rounded(edit: QuantizeActivation, x: Tensor) -> Tensor:
    low, high = limits(edit.bits, edit.signed)
    return (x / edit.step).round_().add_(edit.zero_point).clamp_(low, high).sub_(edit.zero_point).mul_(edit.step)


def _sqnr(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    a, b = torch.cat(list(wanted)).double(), torch.cat(list(got)).double()
    return float(10 * (a.square().sum() / (a - b).square().sum().clamp(min=1e-30)).log10())


def _line(name: str, bits: int | str, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    p, q = torch.cat(list(wanted)).log_softmax(1), torch.cat(list(got)).log_softmax(1)
    print(f"{name:46} {bits!s:>4} {_sqnr(wanted, got):8.1f} {float((p.exp() * (p - q)).sum(1).mean()):9.4f}", flush=True)
