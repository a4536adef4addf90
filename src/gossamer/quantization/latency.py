"""Which kinds of layers run slower in integers than in float, measured in ONNX Runtime on this machine."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from gossamer.quantization.build import quantized
from gossamer.quantization.graph import LINEAR, op_name, tensor_at, weight_name
from gossamer.quantization.moments import geometry
from gossamer.quantization.points import Points, find_points

FASTER = 0.97
"""What leaving a kind in float must bring the whole network's latency down to, as a fraction, to be done."""


def kind_of(layer: fx.Node, w: Tensor) -> str:
    """In words: ``"depthwise convolutions"``, ``"grouped convolutions"``, ``"1x1 convolutions"``, ``"larger convolutions"`` or ``"linear layers"``."""
    if op_name(layer) in LINEAR:
        return "linear layers"
    shape = geometry(layer, w)
    if shape is None:
        return "other convolutions"
    if shape.groups > 1:
        return "depthwise convolutions" if shape.inputs == w[0, 0].numel() else "grouped convolutions"
    return "1x1 convolutions" if all(k == 1 for k in shape.kernel) else "larger convolutions"


def slower_in_integers(
    floating: fx.GraphModule, points: Points, edits: Sequence[Any], ignore: Sequence[str], example_inputs: Any, *, seconds: float = 1.0
) -> tuple[list[str], str]:
    """Weights that had better stay float, and a note with the times.

    The whole quantised network is timed, interleaved, beside networks in which one kind of layers is left in float, conversions and all; then with all
    kinds that gained left in float together.

    Args:
        floating: a canonical graph.
        points: what is quantised.
        edits: its edits.
        ignore: patterns that stay float anyway.
        example_inputs: what is timed, one thread.
        seconds: of timing for each network.
    """
    from gossamer.exporting import export
    from gossamer.profiling import benchmark

    by_kind: dict[str, list[str]] = {}
    for layer in points.layers:
        name = str(weight_name(layer))
        by_kind.setdefault(kind_of(layer, tensor_at(floating, name)), []).append(name)

    def write(left_float: list[str], path: Path) -> Path:
        kept = find_points(floating, ignore=[*ignore, *left_float])
        wanted = {str(weight_name(n)) for n in kept.layers} | set(kept.activations.values())
        chosen = [e for e in edits if getattr(e, "tensor", getattr(e, "point", "")) in wanted]
        export(quantized(copy.deepcopy(floating), chosen), path, example_inputs=example_inputs)
        return path

    with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
        files = [write([], Path(folder) / "all.onnx")]
        kinds = [k for k in by_kind if len(by_kind) > 1]
        files += [write(by_kind[k], Path(folder) / f"{i}.onnx") for i, k in enumerate(kinds)]
        rows = benchmark(*files, example_inputs=example_inputs, seconds=seconds).rows[1:]
        ratios = {k: row.ratio for k, row in zip(kinds, rows, strict=True)}
        gained = [k for k in kinds if ratios[k] < FASTER]
        if len(gained) > 1:
            together = write([n for k in gained for n in by_kind[k]], Path(folder) / "together.onnx")
            best = min(gained, key=ratios.__getitem__)
            row = benchmark(files[0], together, example_inputs=example_inputs, seconds=seconds).rows[1]
            gained = gained if row.ratio < ratios[best] else [best]
    measured = ", ".join(f"{k} {ratios[k]:.2f}" for k in kinds)
    what = f"stay float, faster so: {', '.join(gained)}" if gained else "nothing is faster in float"
    note = f"measured for latency, the whole network with a kind of layers left in float, all in integers = 1: {measured or 'one kind only'}; {what}"
    return [n for k in gained for n in by_kind[k]], note
