"""Where activations are rounded, in ``quantized_decomposed`` operations that XNNPACK's partitioner takes into its kernels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gossamer.quantization import ops
from gossamer.quantization.graph import is_float, op_name, tensor_at
from gossamer.quantization.points import source

assert ops.limits(8, True) == (-128, 127)  # the operators are registered
_ROUND = torch.ops.gossamer.quantize_dequantize.default


@dataclass(frozen=True)
class Rounding:
    """How an activation is rounded to int8."""

    step: float
    zero: int


def round_activations(module: fx.GraphModule, found: Counter[str]) -> dict[fx.Node, Rounding]:
    """Write each rounding, and one behind each operation that only moves rounded values; return how each dequantised value is rounded."""
    graph = module.graph
    how: dict[fx.Node, Rounding] = {}
    for node in list(graph.nodes):
        if node.target is _ROUND:
            rounding = _rounding(module, node)
            if rounding is None:
                found["activations of 16 bits are float there"] += 1
                step, zero = (tensor_at(module, str(a.target)) for a in node.args[1:3])
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_held(graph, node, float(step), int(zero), *node.args[3:5]))
            else:
                how[node] = rounding
    moved = [(n, how[s]) for n in graph.nodes if n not in how and n.op == "call_function" and is_float(n) and (s := source(n)) in how]
    made: dict[fx.Node, Rounding] = {}
    for node, rounding in [*how.items(), *moved]:
        value: Any = node.args[0] if node in how else node
        users = list(node.users)
        with graph.inserting_before(node.next):
            if node in how:
                value = _limited(graph, node, rounding, value)
            marked = graph.call_function(decomposed("quantize_per_tensor"), (value, rounding.step, rounding.zero, -128, 127, torch.int8))
        marked.meta["val"] = node.meta["val"].to(torch.int8)
        for user in users:  # one for each reader: the partitioner takes them into the reader's kernel
            with graph.inserting_before(user):
                back = graph.call_function(
                    decomposed("dequantize_per_tensor"), (marked, rounding.step, rounding.zero, -128, 127, torch.int8)
                )
            back.meta["val"] = node.meta["val"]
            user.replace_input_with(node, back)
            made[back] = rounding
    for node in reversed(how):
        graph.erase_node(node)
    _round_parts(graph, made)
    _joins_apart(graph, made, found)
    return made


def _round_parts(graph: fx.Graph, made: dict[fx.Node, Rounding]) -> None:
    """Round what a concatenation joins as its result is rounded, which changes nothing: XNNPACK joins codes of one step only."""
    for node in [n for n in graph.nodes if op_name(n) == "cat"]:
        users = list(node.users)
        if len(users) != 1 or users[0].target is not decomposed("quantize_per_tensor"):
            continue
        rounding = Rounding(*users[0].args[1:3])
        for part in [p for p in node.all_input_nodes if made.get(p, rounding) != rounding]:
            with graph.inserting_before(node):
                _, back = _both(graph, part, rounding)
            node.replace_input_with(part, back)
            made[back] = rounding


def _both(graph: fx.Graph, x: fx.Node, rounding: Rounding) -> tuple[fx.Node, fx.Node]:
    how = (rounding.step, rounding.zero, -128, 127, torch.int8)
    codes = graph.call_function(decomposed("quantize_per_tensor"), (x, *how))
    back = graph.call_function(decomposed("dequantize_per_tensor"), (codes, *how))
    codes.meta["val"], back.meta["val"] = x.meta["val"].to(torch.int8), x.meta["val"]
    return codes, back


def _rounding(module: fx.GraphModule, node: fx.Node) -> Rounding | None:
    """None where the codes have 16 bits."""
    step, zero = (tensor_at(module, str(a.target)) for a in node.args[1:3])  # type: ignore[union-attr]
    low, high = int(node.args[3]), int(node.args[4])  # type: ignore[arg-type]
    if high - low > 255:
        return None
    return Rounding(float(step), int(zero) - (128 if low >= 0 else 0))


def _limited(graph: fx.Graph, node: fx.Node, rounding: Rounding, value: Any) -> Any:
    """A value held to the range of codes of fewer than 8 bits."""
    low, high = (int(a) - (128 if int(node.args[3]) >= 0 else 0) for a in node.args[3:5])  # type: ignore[arg-type]
    return value if (low, high) == (-128, 127) else _held(graph, node, rounding.step, rounding.zero, low, high)


def _held(graph: fx.Graph, node: fx.Node, step: float, zero: int, low: Any, high: Any) -> fx.Node:
    """What a rounding node reads, held to the range of its codes: an activation before it may be done by that alone."""
    held = graph.call_function(torch.ops.aten.hardtanh.default, (node.args[0], (low - zero) * step, (high - zero) * step))
    held.meta["val"] = node.meta["val"]
    return held


def rounding_after(layer: fx.Node) -> Rounding | None:
    """How what a layer gives is rounded, past one activation that XNNPACK takes into the layer; None where it is float."""
    users = list(layer.users)
    if len(users) == 1 and op_name(users[0]) in ("relu", "hardtanh"):
        users = list(users[0].users)
    alone = len(users) == 1 and users[0].target is decomposed("quantize_per_tensor")
    return Rounding(*users[0].args[1:3]) if alone else None  # type: ignore[arg-type]


def _joins_apart(graph: fx.Graph, made: dict[fx.Node, Rounding], found: Counter[str]) -> None:
    """Sums and products of steps too far apart for XNNPACK in float: a clip that changes nothing keeps its partitioner from taking them."""
    for node in [n for n in graph.nodes if op_name(n) in ("add", "sub", "mul")]:
        parts, after = [made[p].step for p in node.all_input_nodes if p in made], rounding_after(node)
        if after is None or not parts:
            continue
        product = op_name(node) == "mul"
        ratios = [math.prod(parts if len(parts) > 1 else parts * 2) / after.step] if product else [p / after.step for p in parts]
        if 2.0 ** (-16 if product else -10) <= min(ratios) and max(ratios) < 256:
            continue
        (codes,) = node.users
        with graph.inserting_before(codes):
            held = graph.call_function(
                torch.ops.aten.hardtanh.default, (node, (-128 - after.zero) * after.step, (127 - after.zero) * after.step)
            )
        held.meta["val"] = node.meta["val"]
        codes.replace_input_with(node, held)
        found["sums and products of steps too far apart for XNNPACK are float there"] += 1


def decomposed(name: str, overload: str = "default") -> Callable[..., Any]:
    """An operator of ``quantized_decomposed``, the form that XNNPACK's partitioner reads."""
    found: Callable[..., Any] = getattr(getattr(torch.ops.quantized_decomposed, name), overload)
    return found
