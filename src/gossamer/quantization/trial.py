"""Whether equalisation helps, tried on samples that its scales have not seen."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gossamer.quantization.build import quantized
from gossamer.quantization.calibration import Observer, observe_again, parts, sample
from gossamer.quantization.edits import activation_edit, weight_edits
from gossamer.quantization.equalization import Wire, equalize, find_wires
from gossamer.quantization.influence import influences
from gossamer.quantization.observers import Channels
from gossamer.quantization.points import Points
from gossamer.quantization.reconstruction import reconstruct

_SAMPLES, _FITTED = 16, 32  # that scales are taken from, and as many others that they are tried on; where codes are fitted to them too
_WORTH = 0.9  # of the noise without, above which nothing is rescaled: less is chance on so few samples


def equalize_where_it_helps(
    floating: fx.GraphModule,
    points: Points,
    seen: Mapping[fx.Node, Channels],
    bits: Mapping[str, int],
    activation_bits: int,
    leaves: list[Any],
    rounding: str = "nearest",
    observer: str = "mse",
) -> tuple[int, str]:
    """Equalise a canonical graph in place with the wires that lower the noise on other samples by a tenth: none, those without a clip, or all.

    A clip that lies between two layers cuts each rescaled channel off not far above what calibration showed, and channels that fire rarely go further on
    other data. So half of the samples give the scales and the ranges, and the other half says what that did to the outputs.

    Args:
        floating: a canonical graph.
        points: what will be quantised.
        seen: statistics over all of the calibration data, which the scales are then taken from.
        bits: width of each weight.
        activation_bits: of the activations.
        leaves: flat inputs, several samples.
        rounding: how weights of fewer than 8 bits are rounded in the trial, biases corrected: to nearest they would drown what scales do in their noise.
        observer: how ranges of activations are chosen, in the trial as afterwards; ``"output"`` at 8 bits alone, and below as ``"mse"``.

    Returns:
        How many wires were rescaled, and a note.
    """
    wires = [w for w in find_wires(floating) if w.frozen is None]
    plain = [w for w in wires if w.cap is None]
    choices: dict[str, list[Wire]] = {"none": [], "those without a clip": plain, "all": wires}
    if not wires:
        return 0, "not equalised: no channels between two layers can be rescaled"
    choices = {k: v for k, v in choices.items() if k == "none" or v} if plain and len(plain) < len(wires) else {"none": [], "all": wires}
    most = _FITTED if _fits(rounding, bits) else _SAMPLES
    first, second = sample(floating, leaves, 0, most), sample(floating, leaves, 1, most)
    noise = {}
    with torch.no_grad():
        wanted = _outputs(floating, second)
        watched = {n for w in wires for n in w.nodes if n in points.activations}
        watching = Observer(floating, {}, watched)
        for part in parts(floating, first):
            watching.run(*part, enable_io_processing=False)
        for name, chosen in choices.items():
            copied = copy.deepcopy(floating)
            twins = dict(zip(floating.graph.nodes, copied.graph.nodes, strict=True))
            theirs = [_twin(w, twins) for w in chosen]
            equalize(copied, theirs, {twins[n]: c for n, c in watching.channels.items()}, bits, activation_bits)
            noise[name] = _noise(copied, _points(points, twins), bits, activation_bits, first, second, wanted, rounding, observer)
    best = min(noise, key=noise.__getitem__)
    best = best if noise[best] < _WORTH * noise["none"] else "none"
    count = equalize(floating, choices[best], seen, bits, activation_bits)
    tried = ", ".join(f"{k} {v:.3g}" for k, v in noise.items())
    return count, f"equalised across layers: {count} of {len(wires)} sets of channels; noise on other samples with {tried}"


def _points(points: Points, twins: Mapping[fx.Node, fx.Node]) -> Points:
    """The same points in a copy of the graph."""
    return Points(tuple(twins[n] for n in points.layers), {twins[n]: name for n, name in points.activations.items()}, points.notes)


def _twin(wire: Wire, twins: Mapping[fx.Node, fx.Node]) -> Wire:
    givers, readers, nodes = ([twins[n] for n in group] for group in (wire.givers, wire.readers, wire.nodes))
    return Wire(wire.channels, givers, readers, nodes, wire.cap, wire.frozen)


def _noise(
    copied: fx.GraphModule,
    points: Points,
    bits: Mapping[str, int],
    activation_bits: int,
    first: list[Any],
    second: list[Any],
    wanted: list[list[Tensor]],
    rounding: str,
    observer: str,
) -> float:
    """Squared error of the outputs over their mean square."""
    histograms = observe_again(copied, points.activations, first)
    if observer == "output" and activation_bits == 8:  # with fewer, errors are too large for derivatives
        for node, influence in influences(copied, histograms, first).items():
            histograms[node].least_noise = influence.least
    rounded = {n: activation_edit(name, histograms[n], observer, activation_bits) for n, name in points.activations.items()}
    edits = [*weight_edits(copied, points, rounded, bits), *rounded.values()]
    network = quantized(copy.deepcopy(copied), edits)
    if _fits(rounding, bits):
        reconstruct(copied, network, first, bits, rounding=rounding, activation_bits=activation_bits)
    total = 0.0
    for ours, theirs in zip(wanted, _outputs(network, second), strict=True):
        error = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
        total += error / max(sum(float(a.square().sum()) for a in ours), 1e-30)
    return total


def _fits(rounding: str, bits: Mapping[str, int]) -> bool:
    return rounding != "nearest" and min(bits.values()) < 8


def _outputs(module: fx.GraphModule, leaves: list[Any]) -> list[list[Tensor]]:
    """Each output, part by part."""
    outs = [pytree.tree_leaves(fx.Interpreter(module).run(*part, enable_io_processing=False)) for part in parts(module, leaves)]
    return [[t.float() for t in same] for same in zip(*outs, strict=True) if isinstance(same[0], Tensor) and same[0].is_floating_point()]
