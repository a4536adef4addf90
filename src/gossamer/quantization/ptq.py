"""Quantisation after training: calibration in, integer network and its plan out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from gossamer.errors import NothingToDo, UsageError, near
from gossamer.plan import Plan, QuantizeActivation, QuantizeWeight, input_specs
from gossamer.quantization.build import least_steps, quantized
from gossamer.quantization.calibration import Progress, correct_biases, observe
from gossamer.quantization.canonical import canonical, tensors_with_nan
from gossamer.quantization.dynamic import uncalibrated, with_tables
from gossamer.quantization.graph import CONVOLUTION, LINEAR, bias_node, channel_axis, op_name, tensor_at, weight_name
from gossamer.quantization.observers import Histogram, affine
from gossamer.quantization.points import Points, find_points, source
from gossamer.quantization.steps import minmax_steps, mse_steps
from gossamer.quantization.target import resolve
from gossamer.result import Profile, Result, network_of
from gossamer.sources.batches import check_inputs
from gossamer.trace.capture import capture

STEPS = ("mse", "minmax")
OBSERVERS = ("mse", "percentile", "minmax")


def quantize(
    model: nn.Module | Result,
    example_inputs: Any,
    *,
    calibration: Iterable[Any] | None = None,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    dynamic: bool = False,
    weight_only: bool = False,
    group_size: int = 32,
    step: str = "mse",
    observer: str = "mse",
    target: str = "auto",
    bias_correction: bool = True,
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
) -> Result:
    """Quantise weights per channel and activations per tensor, without training.

    Batch norm is folded first; convolutions and linear layers keep integer weights and int32 biases, embeddings become 8-bit tables; what
    an integer runtime holds in 8 bits is rounded where it is computed (`gossamer.quantization.points`). Outputs of the network stay float.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
        >>> images = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
        >>> result = quantize(net, (images[0],), calibration=images)
        >>> result.model.state_dict()["0.weight"].dtype in (torch.int8, torch.uint8), result.plan.counts()
        (True, {'quantize_weight': 2, 'quantize_activation': 2})

    Args:
        model: a float network, or a `Result`, whose plan is continued; it is not changed.
        example_inputs: a tuple of positional inputs, or a dict of keyword inputs.
        calibration: batches as `gossamer.sources.batches.split` takes them; some 100 samples do. Read once.
        weight_bits: 2 to 8. Codes of fewer bits are stored in 8.
        activation_bits: 2 to 8; None is ``weight_only``.
        dynamic: without calibration: linear and LSTM layers in 8 bits, their inputs rounded by the range that they have when they run
            (outputs then depend on what else is in a batch), embeddings as 8-bit tables. Outlying features behind layer norms are moved into
            weights first, by what the norm's parameters say or, with ``calibration``, by what is measured.
        weight_only: without calibration: linear layers in 4 or 8 bits (``weight_bits``) with a step for each ``group_size`` inputs,
            embeddings as 8-bit tables; all arithmetic in float.
        group_size: 32, 64 or 128.
        step: steps of weights, ``"mse"`` (least squared rounding error) or ``"minmax"`` (cover the largest magnitude).
        observer: ranges of activations, ``"mse"``, ``"percentile"`` (99.99% of values) or ``"minmax"``.
        target: ``"vnni"`` and ``"arm"`` store signed weights; ``"avx2"`` unsigned ones, since kernels for signed ones saturate
            there; ``"auto"`` reads this machine's flags.
        bias_correction: shift biases so that each channel's mean over some calibration samples is the float network's.
        ignore: patterns of module paths or weight names that stay float.
        progress: called with (batches done, batches in all).

    Returns:
        A `Result`: ``.model`` an ``fx.GraphModule`` in eval mode whose state dict holds the integers, ``.notes`` what stays float.

    Raises:
        UsageError: no calibration data, an option out of range, NaN in weights or activations.
        SelectorError: an ``ignore`` pattern matches no layer.
        NothingToDo: the network has no convolution or linear layer that can be quantised.
        ExportError: the network cannot be captured as one graph.
    """
    given, model = model, network_of(model, "quantize")
    if dynamic or weight_only or activation_bits is None:
        how: dict[str, Any] = {
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "group_size": group_size,
            "step": step,
            "target": target,
        }
        result = uncalibrated(model, example_inputs, dynamic, weight_only, calibration, ignore=ignore, profiles=_profiles, **how)
        return given.then(result) if isinstance(given, Result) else result
    _check_options(weight_bits=weight_bits, activation_bits=activation_bits, step=step, observer=observer)
    _, signed, target_note = resolve(target)
    example_inputs = check_inputs(example_inputs)
    if calibration is None:
        raise UsageError(
            "quantize needs calibration data to choose the ranges of activations: give calibration=, some 100 samples in batches"
        )
    if isinstance(calibration, torch.Tensor):
        calibration = [calibration]
    if bad := tensors_with_nan(model):
        raise UsageError(f"{bad[0]} holds NaN or infinity" + (f", and {len(bad) - 1} more tensors do" if len(bad) > 1 else ""))
    floating = canonical(capture(model, example_inputs))
    points = find_points(floating, ignore=ignore)
    if not points.layers:
        raise NothingToDo("nothing to quantise: the network has no convolution or linear layer" + "".join(f"; {n}" for n in points.notes))
    histograms, sample = observe(floating, points.activations, calibration, example_inputs, progress)
    rounded = {n: _activation(name, histograms[n], observer, activation_bits) for n, name in points.activations.items()}
    edits = [*_weights(floating, points, rounded, weight_bits, step, signed), *rounded.values()]
    edits = with_tables(floating, edits, step, ignore)
    network = quantized(copy.deepcopy(floating), edits)
    if bias_correction:
        correct_biases(floating, network, sample)
    before, after = _profiles(model, floating, network, example_inputs)
    notes = (*floating.meta["notes"], target_note, *points.notes)
    if weight_bits < 8:
        notes = (*notes, f"{weight_bits}-bit codes are stored in 8 bits each")
    plan = Plan(edits=tuple(edits), inputs=input_specs(example_inputs))
    result = Result(network, plan, before, after, example_inputs=example_inputs, notes=notes, floating=floating)
    return given.then(result) if isinstance(given, Result) else result


def _check_options(*, weight_bits: int, activation_bits: int, step: str, observer: str) -> None:
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if not isinstance(bits, int) or not 2 <= bits <= 8:
            raise UsageError(f"{name}={bits}: give an integer from 2 to 8")
    for name, value, known in (("step", step, STEPS), ("observer", observer, OBSERVERS)):
        if value not in known:
            raise UsageError(f"{name}={value!r}: known are {', '.join(known)}{near(str(value), known)}")


def _activation(point: str, histogram: Histogram, observer: str, bits: int) -> QuantizeActivation:
    step, zero = affine(*histogram.range(observer, bits), bits)
    return QuantizeActivation(point=point, bits=bits, signed=False, step=step, zero_point=zero)


def _weights(
    module: fx.GraphModule, points: Points, rounded: dict[fx.Node, QuantizeActivation], bits: int, step: str, signed: bool
) -> list[QuantizeWeight]:
    uses: dict[str, list[fx.Node]] = {}
    for layer in points.layers:
        uses.setdefault(str(weight_name(layer)), []).append(layer)
    edits = []
    for name, layers in uses.items():
        w, axis = tensor_at(module, name).detach(), channel_axis(layers[0])
        steps = (mse_steps if step == "mse" else minmax_steps)(w, bits, axis)
        for layer in layers:
            inputs = rounded.get(_rounded_at(layer, rounded))  # type: ignore[arg-type]
            bias = bias_node(layer)
            if inputs and isinstance(bias, fx.Node) and bias.op == "get_attr" and op_name(layer) in CONVOLUTION | LINEAR:
                steps = torch.maximum(steps, least_steps(tensor_at(module, str(bias.target)).detach(), inputs.step))
        values = tuple(float(f"{s:.7g}") for s in steps.tolist())
        zero = 0 if signed else 1 << (bits - 1)
        edits.append(QuantizeWeight(tensor=name, bits=bits, axis=axis, signed=signed, steps=values, zero_points=(zero,) * len(values)))
    return edits


def _rounded_at(layer: fx.Node, rounded: dict[fx.Node, QuantizeActivation]) -> fx.Node | None:
    assert isinstance(layer.args[0], fx.Node)
    home = source(layer.args[0])
    return home if home in rounded else None


def _profiles(model: nn.Module, floating: fx.GraphModule, network: fx.GraphModule, example_inputs: Any) -> tuple[Profile, Profile]:
    from gossamer.profiling import profile

    before = profile(model, example_inputs)
    state = network.state_dict().values()
    params = sum(p.numel() for p in floating.parameters())
    return before, replace(before, params=params, weight_bytes=sum(t.numel() * t.element_size() for t in state))
