"""Quantisation after training: calibration in, integer network and its plan out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from gossamer.errors import NothingToDo, UsageError
from gossamer.plan import Plan, input_specs
from gossamer.quantization.absorption import absorb_biases
from gossamer.quantization.allocation import HARMFUL, activation_losses, allocate, sizes_of, weight_losses
from gossamer.quantization.bias import correct_analytically
from gossamer.quantization.build import quantized
from gossamer.quantization.calibration import Progress, leading, observe, observe_again
from gossamer.quantization.canonical import canonical, tensors_with_nan
from gossamer.quantization.dynamic import uncalibrated, with_tables
from gossamer.quantization.edits import activation_edit, weight_edits, with_steps_of
from gossamer.quantization.equalization import find_wires
from gossamer.quantization.graph import weight_name
from gossamer.quantization.latency import slower_in_integers
from gossamer.quantization.observers import Histogram
from gossamer.quantization.options import Options
from gossamer.quantization.points import Points, find_points
from gossamer.quantization.ranges import ranges_by_outputs
from gossamer.quantization.reconstruction import reconstruct
from gossamer.quantization.sensitivity import Sensitivity
from gossamer.quantization.target import Target, resolve
from gossamer.quantization.trial import equalize_where_it_helps
from gossamer.result import Profile, Result, network_of
from gossamer.sources.batches import check_inputs
from gossamer.trace.capture import capture

_MEASURED_ON = 16  # samples that sensitivities are measured on


def quantize(
    model: nn.Module | Result,
    example_inputs: Any,
    *,
    calibration: Iterable[Any] | None = None,
    weight_bits: int | Mapping[str, int] = 8,
    activation_bits: int | str | None = 8,
    average_bits: float | tuple[float, float] | None = None,
    dynamic: bool = False,
    weight_only: bool = False,
    group_size: int = 32,
    step: str = "mse",
    granularity: str = "channel",
    observer: str = "output",
    rounding: str = "nearest",
    equalize: bool = True,
    bias_correction: bool | str = True,
    target: str = "auto",
    prefer: str = "size",
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
) -> Result:
    """Quantise weights and activations, without training.

    Batch norm is folded first and channels are equalised across layers; convolutions and linear layers keep integer weights and int32 biases,
    embeddings become 8-bit tables; what an integer runtime holds in 8 bits is rounded where it is computed (`gossamer.quantization.points`). Outputs of the network stay float.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
        >>> images = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
        >>> result = quantize(net, (images[0],), calibration=images)
        >>> result.model.state_dict()["0.weight"].dtype in (torch.int8, torch.uint8), result.plan.counts()
        (True, {'quantize_weight': 2, 'quantize_activation': 2})

    Args:
        model: a float network, or a `Result`, whose plan is continued; it is not changed.
        example_inputs: a tuple of positional inputs, or a dict of keyword inputs.
        calibration: batches as `gossamer.sources.batches.split` takes them; some 100 samples do. Read once.
        weight_bits: 2 to 8, or bits by pattern of weight names, the first match first: ``{"features.0.*": 8, "*": 4}``. Codes of fewer bits
            are packed in the ONNX file and run as 8 bits.
        activation_bits: 2 to 8; 16, which runs in float; ``"auto"``: 16 for those that alone do harm at 8, by measured
            sensitivity; or None, which is ``weight_only``.
        average_bits: choose each weight's bits, 2 to 8, for the least loss at this average over all entries; a pair is for weights and activations.
        dynamic: without calibration: linear and LSTM layers in 8 bits, their inputs rounded by the range that they have when they run
            (outputs then depend on what else is in a batch), embeddings as 8-bit tables. Outlying features behind layer norms are moved into
            weights first, by what is measured with ``calibration``; without it on random rows where the network reads its inputs from
            tables (`gossamer.quantization.drawn`), else by what the norm's parameters say.
        weight_only: without calibration: linear layers in 4 or 8 bits (``weight_bits``) with a step for each ``group_size`` inputs,
            embeddings as 8-bit tables; all arithmetic in float.
        group_size: 32, 64 or 128.
        step: steps of weights, ``"mse"`` (least squared rounding error) or ``"minmax"`` (cover the largest magnitude).
        granularity: a step for each output ``"channel"`` or for the whole ``"tensor"``.
        observer: ranges of activations, ``"output"`` (least noise of the outputs by their derivatives, as far as samples held back bear it out, else as
            ``"mse"``), ``"mse"`` (least squared error), ``"percentile"`` (99.99% of values), ``"minmax"``, ``"moving_average"`` or ``"entropy"``.
        rounding: ``"nearest"``; ``"gptq"``, second order, and ``"adaround"``, learned, fit the codes so that each layer gives the float layer's output on what reaches it,
            and below 8 bits the steps too.
        equalize: absorb biases, and rescale channels between layers, where that lowers the noise on samples that the scales have not seen
            (`gossamer.quantization.equalization`).
        bias_correction: shift biases so that each channel's mean over some calibration samples is the float network's; ``"analytic"`` takes
            the means of inputs from the batch norms instead.
        target: ``"vnni"`` and ``"arm"`` store signed weights; ``"avx2"`` unsigned ones, since kernels for signed ones saturate
            there; ``"auto"`` reads this machine's flags.
        prefer: ``"size"``, or ``"latency"``: on ``"avx2"`` signed weights of 7 bits, which do not saturate and run faster; and, where the target is
            this machine's, kinds of layers stay float that ONNX Runtime, measured, runs slower in integers.
        ignore: patterns of module paths or weight names that stay float.
        progress: called with (done, in all) of each stage: batches, sensitivities, layers.

    Returns:
        A `Result`: ``.model`` an ``fx.GraphModule`` in eval mode whose state dict holds the integers, ``.notes`` what stays float.

    Raises:
        UsageError: no calibration data, an option out of range, NaN in weights or activations.
        SelectorError: a pattern matches no layer.
        BudgetError: an average that no choice of bits meets.
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
    options = Options(weight_bits, activation_bits, average_bits, step, granularity, observer, rounding, equalize, bias_correction, prefer)
    aim = resolve(target, prefer)
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
    floating, network, edits, more = _static(floating, points, options, aim, ignore, calibration, example_inputs, progress)
    before, after = _profiles(model, floating, network, example_inputs)
    notes = (*floating.meta["notes"], aim.note, *points.notes, *more)
    plan = Plan(edits=tuple(edits), inputs=input_specs(example_inputs))
    result = Result(network, plan, before, after, example_inputs=example_inputs, notes=notes, floating=floating)
    return given.then(result) if isinstance(given, Result) else result


def _static(
    floating: fx.GraphModule,
    points: Points,
    options: Options,
    aim: Target,
    ignore: Sequence[str],
    calibration: Iterable[Any],
    example_inputs: Any,
    progress: Progress | None,
) -> tuple[fx.GraphModule, fx.GraphModule, list[Any], list[str]]:
    """Calibrate, equalise, choose bits, round: the float graph as it was rounded, the quantised one, its edits, and notes."""
    names = list(dict.fromkeys(str(weight_name(n)) for n in points.layers))
    bits = {n: min(b, aim.weight_bits) for n, b in options.widths(names).items()}
    between = [n for w in find_wires(floating) if w.frozen is None for n in w.nodes if n in points.activations] if options.equalize else []
    whole = options.observer == "moving_average"
    observer, leaves = observe(floating, points.activations, calibration, example_inputs, progress, by_channel=between, whole=whole)
    histograms, notes = observer.histograms, list[str]()
    activation_bits = options.activation_width
    if options.equalize:
        absorbed = absorb_biases(floating, find_wires(floating), observer.channels)
        tried = options.rounding, options.observer if options.observer == "output" else "mse"
        rescaled, note = equalize_where_it_helps(floating, points, observer.channels, bits, activation_bits, leaves, *tried)
        notes.append(note)
        if absorbed:
            notes.append(f"biases of {absorbed} layers absorbed by the layers that read them")
        if rescaled or absorbed:
            histograms = observe_again(floating, points.activations, leaves, observer.batch if whole else None)
    if options.observer == "output" and activation_bits <= 8:
        notes.append(ranges_by_outputs(floating, points, histograms, leaves, activation_bits))
    widths = dict.fromkeys(points.activations, activation_bits)
    if options.average_bits is not None or options.activation_bits == "auto":
        bits, widths, more = _choose_bits(floating, points, options, histograms, bits, widths, leaves, progress)
        notes += more
    rounded = {n: activation_edit(name, histograms[n], options.observer, widths[n]) for n, name in points.activations.items()}
    weights = weight_edits(
        floating, points, rounded, bits, step=options.step, per_channel=options.granularity == "channel", signed=aim.signed
    )
    if options.prefer == "latency" and aim.here:
        slower, note = slower_in_integers(floating, points, [*weights, *rounded.values()], ignore, example_inputs)
        notes.append(note)
        points = find_points(floating, ignore=[*ignore, *slower])
        rounded = {n: e for n, e in rounded.items() if n in points.activations}
        weights = [e for e in weights if e.tensor in {weight_name(n) for n in points.layers}]
    elif options.prefer == "latency":
        notes.append(f"latency was not measured: this machine is not {aim.name}")
    edits = with_tables(floating, [*weights, *rounded.values()], options.step, ignore)
    tables = edits[len(weights) + len(rounded) :]
    network = quantized(copy.deepcopy(floating), edits)
    if options.rounding != "nearest" or options.bias_correction in (True, "measured"):
        measured = options.bias_correction in (True, "measured")
        how: dict[str, Any] = {
            "rounding": options.rounding,
            "bias_correction": measured,
            "activation_bits": min(widths.values(), default=8),
        }
        reconstruct(floating, network, leaves, bits, **how, progress=progress)
        weights = with_steps_of(network, weights)
    if options.bias_correction == "analytic":
        notes.append(correct_analytically(floating, network))
    if fewer := sorted({e.bits for e in weights if e.bits < 8}):
        notes.append(
            f"{', '.join(map(str, fewer))}-bit codes are packed in the ONNX file and unpacked to 8 bits, in which they run, when it is loaded"
        )
    if wide := [e.point for e in rounded.values() if e.bits == 16]:
        notes.append(f"activations of 16 bits, which ONNX Runtime computes in float: {', '.join(wide)}")
    return floating, network, [*weights, *rounded.values(), *tables], notes


def _choose_bits(
    floating: fx.GraphModule,
    points: Points,
    options: Options,
    histograms: dict[fx.Node, Histogram],
    bits: dict[str, int],
    widths: dict[fx.Node, int],
    leaves: list[Any],
    progress: Progress | None,
) -> tuple[dict[str, int], dict[fx.Node, int], list[str]]:
    """Bits of weights and activations from what each one alone does to the outputs."""
    runs, notes = Sensitivity(floating, leading(floating, leaves, _MEASURED_ON)), []
    sizes, activation_sizes = sizes_of(floating, points)
    average, activation_average = options.averages
    if average is not None:
        bits = allocate(weight_losses(runs, floating, points, progress=progress), sizes, average)
        reached = sum(sizes[n] * b for n, b in bits.items()) / sum(sizes.values())
        notes.append(f"weights take {reached:.2f} bits on average: {', '.join(f'{n} {b}' for n, b in bits.items())}")
    if activation_average is not None:
        losses = activation_losses(runs, histograms, points, options.observer)
        widths = allocate(losses, activation_sizes, activation_average)
        reached = sum(activation_sizes[n] * b for n, b in widths.items()) / sum(activation_sizes.values())
        notes.append(f"activations take {reached:.2f} bits on average")
    elif options.activation_bits == "auto":
        alone = activation_losses(runs, histograms, points, options.observer, widths=(8,))
        widths = {n: 16 if losses[0] > HARMFUL else 8 for n, losses in alone.items()}
    return bits, widths, notes


def _profiles(model: nn.Module, floating: fx.GraphModule, network: fx.GraphModule, example_inputs: Any) -> tuple[Profile, Profile]:
    from gossamer.profiling import profile

    before = profile(model, example_inputs)
    state = network.state_dict().values()
    params = sum(p.numel() for p in floating.parameters())
    return before, replace(before, params=params, weight_bytes=sum(t.numel() * t.element_size() for t in state))
