"""Quantisation without calibration: integer weights, and inputs that are rounded when they run or stay float."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from gossamer.errors import NothingToDo, UsageError, near
from gossamer.plan import Plan, QuantizeGroups, QuantizeInput, QuantizeWeight, input_specs
from gossamer.quantization.build import quantized
from gossamer.quantization.calibration import flat_batches
from gossamer.quantization.canonical import canonical, tensors_with_nan
from gossamer.quantization.drawn import drawn_inputs
from gossamer.quantization.graph import tensor_at
from gossamer.quantization.grouped import group_steps, pack_steps
from gossamer.quantization.layers import smoothed, tables
from gossamer.quantization.selection import matched, read_otherwise, select
from gossamer.quantization.smoothing import estimated_range, factors, measured_ranges
from gossamer.quantization.steps import minmax_steps, mse_steps
from gossamer.quantization.target import resolve
from gossamer.result import Profile, Result
from gossamer.sources.batches import check_inputs
from gossamer.trace.capture import capture

STEPS = ("mse", "minmax")
GROUPS = (32, 64, 128)
"""Sizes of groups that ``weight_only`` takes: those that ONNX Runtime has kernels for."""


def uncalibrated(
    model: nn.Module,
    example_inputs: Any,
    dynamic: bool,
    weight_only: bool,
    calibration: Any,
    *,
    weight_bits: Any,
    activation_bits: Any,
    group_size: int,
    step: str,
    target: str,
    ignore: Sequence[str],
    profiles: Callable[..., tuple[Profile, Profile]],
) -> Result:
    """What `gossamer.quantize` does where it needs no calibration data; see there for the arguments."""
    if dynamic and (weight_only or activation_bits is None):
        raise UsageError("dynamic quantisation rounds activations, weight_only does not: give one of them")
    if calibration is not None and not dynamic:
        raise UsageError("weight_only quantisation takes no calibration data: leave calibration out")
    if step not in STEPS:
        raise UsageError(f"step={step!r}: known are {', '.join(STEPS)}{near(str(step), STEPS)}")
    if not dynamic:
        return _weight_only(model, example_inputs, weight_bits, group_size, ignore, profiles)
    if (weight_bits, activation_bits) != (8, 8):
        raise UsageError("dynamic quantisation has 8 bits, for weights and activations: leave weight_bits and activation_bits out")
    return _dynamic(model, example_inputs, calibration, step, target, ignore, profiles)


def _dynamic(
    model: nn.Module,
    example_inputs: Any,
    calibration: Any,
    step: str,
    target: str,
    ignore: Sequence[str],
    profiles: Callable[..., tuple[Profile, Profile]],
) -> Result:
    """Linear and LSTM layers in 8 bits, their inputs rounded by the range that they have when they run; embeddings as 8-bit tables."""
    aim = resolve(target)
    signed, target_note = aim.signed, aim.note
    floating, inputs = _floating(model, example_inputs)
    found = select(floating, ignore, recurrent=True)
    if found.empty:
        raise NothingToDo("nothing to quantise dynamically: no linear, embedding or LSTM layer" + "".join(f"; {n}" for n in found.notes))
    outliers = _outliers(floating, {n: nodes for n, nodes in found.linear.items() if n not in found.tables}, calibration, inputs)
    edits: list[Any] = []
    for name in dict.fromkeys([*found.linear, *found.tables]):
        moved = outliers.get(name, ())
        edits.append(_rows(floating, name, step, signed or name not in found.linear, moved))
        if name in found.linear:
            edits.append(QuantizeInput(tensor=name, factors=moved))
    for name, node in found.lstms.items():
        per = 4 if node.args[3] else 2
        weights = [str(w.target) for i, w in enumerate(node.args[2]) if i % per < 2]  # type: ignore[arg-type]
        edits += [*(_rows(floating, w, step, signed) for w in weights), QuantizeInput(tensor=name)]
    return _result(model, floating, edits, inputs, (target_note, *found.notes), profiles)


def _weight_only(
    model: nn.Module,
    example_inputs: Any,
    weight_bits: Any,
    group_size: int,
    ignore: Sequence[str],
    profiles: Callable[..., tuple[Profile, Profile]],
) -> Result:
    """Weights of linear layers in 4 or 8 bits with a step for each group of inputs, embeddings as 8-bit tables; arithmetic in float."""
    if weight_bits not in (4, 8):
        raise UsageError(f"weight_bits={weight_bits}: weight-only quantisation takes 4 or 8, for which ONNX Runtime has kernels")
    if group_size not in GROUPS:
        raise UsageError(f"group_size={group_size}: known are {', '.join(map(str, GROUPS))}")
    floating, inputs = _floating(model, example_inputs)
    found = select(floating, ignore, recurrent=False)
    edits: list[Any] = []
    notes = list(found.notes)
    tied = [n for n in found.linear if n in found.tables]
    if tied:
        notes.append(f"8 bits with a step for each row, since an embedding reads it too: {', '.join(tied)}")
    for name in found.linear:
        if name not in found.tables:
            steps = group_steps(tensor_at(floating, name), weight_bits, group_size)
            edits.append(QuantizeGroups(tensor=name, bits=weight_bits, group=group_size, steps=pack_steps(steps)))
    edits += [_rows(floating, name, "mse", True) for name in found.tables]
    if not edits:
        raise NothingToDo("nothing to quantise: no linear or embedding layer" + "".join(f"; {n}" for n in notes))
    return _result(model, floating, edits, inputs, notes, profiles)


def with_tables(floating: fx.GraphModule, edits: Sequence[Any], step: str, ignore: Sequence[str]) -> list[Any]:
    """Edits, and one for each embedding whose weight has none yet and is not ignored."""
    taken = {e.tensor for e in edits if isinstance(e, QuantizeWeight)}
    found = [n for n, nodes in tables(floating.graph).items() if n not in taken and not matched(ignore, nodes[0], n)]
    return [*edits, *(_rows(floating, n, step, True) for n in found if not read_otherwise(floating, n))]


def _floating(model: nn.Module, example_inputs: Any) -> tuple[fx.GraphModule, Any]:
    inputs = check_inputs(example_inputs)
    if bad := tensors_with_nan(model):
        raise UsageError(f"{bad[0]} holds NaN or infinity" + (f", and {len(bad) - 1} more tensors do" if len(bad) > 1 else ""))
    return canonical(capture(model, inputs)), inputs


def _outliers(floating: fx.GraphModule, linear: dict[str, list[fx.Node]], calibration: Any, inputs: Any) -> dict[str, tuple[float, ...]]:
    """Factors of the input features of each weight that all its layers' inputs agree on: from calibration data, rows drawn from tables, or weights."""
    ranges: dict[fx.Node, Any] = {}
    if calibration is not None:
        batches = [calibration] if isinstance(calibration, Tensor) else calibration
        seen: Iterable[list[Any]] | None = flat_batches(batches, inputs, floating)
    else:
        seen = drawn_inputs(floating, inputs)
    if seen is not None:
        ranges = dict(measured_ranges(floating, [n for found in linear.values() for n in found], seen))
    found: dict[str, tuple[float, ...]] = {}
    for name, layers in linear.items():
        values = {n.args[0] for n in layers}
        if len(values) == 1 and isinstance(value := values.pop(), fx.Node):
            reach = ranges.get(value) if seen is not None else estimated_range(floating, value)
            found[name] = () if reach is None else factors(reach)
    return found


def _rows(floating: fx.GraphModule, name: str, step: str, signed: bool, moved: tuple[float, ...] = ()) -> QuantizeWeight:
    """A weight in 8 bits with a step for each row, its columns multiplied by factors where there are some."""
    w = smoothed(tensor_at(floating, name).detach(), moved)
    steps = tuple(float(f"{s:.7g}") for s in (mse_steps if step == "mse" else minmax_steps)(w, 8, 0).tolist())
    return QuantizeWeight(tensor=name, bits=8, axis=0, signed=signed, steps=steps, zero_points=(0 if signed else 128,) * len(steps))


def _result(
    model: nn.Module, floating: fx.GraphModule, edits: list[Any], inputs: Any, notes: Sequence[str], profiles: Callable[..., Any]
) -> Result:
    network = quantized(copy.deepcopy(floating), edits)
    before, after = profiles(model, floating, network, inputs)
    plan = Plan(edits=tuple(edits), inputs=input_specs(inputs))
    return Result(network, plan, before, after, example_inputs=inputs, notes=(*floating.meta["notes"], *notes))
