"""Layer by layer through the float and the quantised network at once: each layer's codes and bias fitted to what really reaches it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gossamer.quantization.adaround import adaround
from gossamer.quantization.build import bias_codes, bias_name, clip_range
from gossamer.quantization.calibration import parts
from gossamer.quantization.graph import CLIP, LINEAR, bias_node, op_name, tensor_at, weight_name, weighted_nodes
from gossamer.quantization.moments import geometry
from gossamer.quantization.ops import limits
from gossamer.quantization.positions import position_weights
from gossamer.quantization.rounding import damped, descend, fitted_steps, gptq
from gossamer.quantization.targets import Clipped, joined, target, watch

ROUNDINGS = ("nearest", "gptq", "adaround")
Progress = Callable[[int, int], None]
_REFIT = 2  # times that steps and codes are fitted to one another, below 8 bits


def reconstruct(
    floating: fx.GraphModule,
    quantised: fx.GraphModule,
    leaves: list[Any],
    bits: Mapping[str, int],
    *,
    rounding: str = "nearest",
    bias_correction: bool = True,
    activation_bits: int = 8,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Fit codes, steps and biases in place, in execution order, each layer with the ones before it done.

    Codes are chosen for the least change of the layer's output on what the quantised network feeds it (`gossamer.quantization.rounding`), each position
    counting as much as the network's outputs depend on it (`gossamer.quantization.positions`).
    Rounded weights and clipped activations also shift a channel's mean, and the next layers amplify it: the bias takes the shift. What differs
    only past a clip, or past the range that the output is rounded in, is no difference.

    Args:
        floating: the canonical float graph.
        quantised: the graph that `gossamer.quantization.build.quantized` made of a copy of it; its buffers are changed.
        leaves: flat inputs, all samples together.
        bits: width of each weight.
        rounding: ``"nearest"`` leaves codes as they are; ``"gptq"`` and ``"adaround"`` refit those of convolutions in one and two
            dimensions and of linear layers that are called once.
        bias_correction: give biases the shift of the mean.
        activation_bits: the fewest that activations are rounded to.
        progress: called with (layers done, layers in all).

    Returns:
        Shift of each corrected bias, by node name.

    Source:
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, with measured means.
    """
    samples = parts(floating, leaves)
    pieces = [(_Walker(floating, part), _Walker(quantised, part)) for part in samples]
    weights = (
        [{}] * len(pieces)
        if rounding == "nearest"
        else position_weights(floating, weighted_nodes(floating.graph), samples, activation_bits)
    )
    originals = {n.name: n for n in floating.graph.nodes}
    calls = Counter(weight_name(n) for n in weighted_nodes(floating.graph))
    layers = [n for n in weighted_nodes(quantised.graph) if n.name in originals]
    shifts: dict[str, Tensor] = {}
    with torch.no_grad():
        for done, layer in enumerate(layers, start=1):
            original = originals[layer.name]
            name = str(weight_name(original))
            ends = seen_range(layer)
            refit = rounding != "nearest" and name in bits and calls[name] == 1
            aims = list[Clipped]()
            for ours, theirs in pieces:
                ours.walk(original)
                theirs.walk(layer)
                aims.append(Clipped(ours.run_node(original), *ends))
            each = [_fitting(w.get(original.name), aim.wanted, original) for w, aim in zip(weights, aims, strict=True)]
            if refit:
                inputs = [(ours.env[original.args[0]], theirs.env[layer.args[0]]) for ours, theirs in pieces]  # type: ignore[index]
                if _refit(floating, quantised, original, name, bits[name], inputs, rounding, aims, each):
                    for _, theirs in pieces:
                        theirs.again(layer.args[1], layer.args[2] if len(layer.args) > 2 else None)
            gots = [theirs.run_node(layer) for _, theirs in pieces]
            if bias_correction:
                missing = [aim.error(aim.wanted, got) for aim, got in zip(aims, gots, strict=True)]
                shift = borne_out(layer, missing, each)
                if shift_bias(quantised, layer, shift):
                    shifts[layer.name] = shift
                    gots = [got + (shift if op_name(layer) in LINEAR else shift.view(-1, *[1] * (got.dim() - 2))) for got in gots]
            for (ours, theirs), aim, got in zip(pieces, aims, gots, strict=True):
                ours.finish(original, aim.wanted)
                theirs.finish(layer, got)
            if progress:
                progress(done, len(layers))
    return shifts


def shift_bias(quantised: fx.GraphModule, layer: fx.Node, shift: Tensor) -> bool:
    """Add to a layer's stored bias, in place; False where it has none of its own that is stored as integers."""
    bias = bias_node(layer)
    if not isinstance(bias, fx.Node) or bias.target is not torch.ops.gossamer.dequantize.default:
        return False
    name = str(bias.args[0].target)  # type: ignore[union-attr]
    codes, step = tensor_at(quantised, name), tensor_at(quantised, name + "_step")
    codes.copy_(bias_codes(codes.double() * step.double() + shift, step))
    return True


def channel_mean(layer: fx.Node, result: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of each output channel over everything else, weights being shaped as the output without its channels."""
    if result.dim() == 1:
        return result
    rows = result.movedim(-1 if op_name(layer) in LINEAR else 1, 0).flatten(1)
    return rows.mean(1) if weights is None else rows @ weights.flatten() / weights.sum()


def borne_out(layer: fx.Node, missing: Sequence[Tensor], weights: Sequence[Tensor | None] | None = None) -> Tensor:
    """Mean of each output channel, less where the halves of the samples give different ones, and 0 where they disagree about the sign.

    Args:
        layer: whose outputs they are of.
        missing: pieces of them, samples first.
        weights: of each piece's positions, shaped as it is without its channels; None: alike.
    """
    sums: list[list[tuple[Tensor, float]]] = [[], []]
    for i, (piece, each) in enumerate(zip(missing, weights or [None] * len(missing), strict=True)):
        for j, half in enumerate((slice(0, None, 2), slice(1, None, 2)) if piece.dim() > 1 else (slice(None),)):
            if len(piece[half]):
                share = float(len(piece[half]) if each is None else each[half].sum())
                sums[(i + j) % 2].append((channel_mean(layer, piece[half], None if each is None else each[half]) * share, share))
    means = [torch.stack([s for s, _ in found]).sum(0) / sum(n for _, n in found) for found in sums if found]
    shares = [sum(n for _, n in found) for found in sums if found]
    mean = sum((m * n for m, n in zip(means, shares, strict=True)), torch.zeros_like(means[0])) / sum(shares)
    if len(means) < 2:
        return mean
    a, b = means
    return mean * (2 * a * b / (a.square() + b.square()).clamp(min=1e-30)).clamp(min=0)


class _Walker(fx.Interpreter):
    """Runs a graph piece by piece; values are dropped after their last use."""

    def __init__(self, module: fx.GraphModule, leaves: list[Any]) -> None:
        super().__init__(module)
        self.env: dict[fx.Node, Any] = {}
        self.args_iter = iter(leaves)
        self.todo = iter(module.graph.nodes)

    def walk(self, until: fx.Node) -> None:
        """Run up to a node, which is not run."""
        for node in self.todo:
            if node is until:
                return
            self.finish(node, self.run_node(node))

    def finish(self, node: fx.Node, value: Any) -> None:
        """Record the value of a node."""
        self.env[node] = value
        for used in self.user_to_last_uses.get(node, []):
            del self.env[used]

    def again(self, *nodes: Any) -> None:
        """Run dequantising nodes again, whose stored integers have changed."""
        for node in nodes:
            if isinstance(node, fx.Node) and node.target is torch.ops.gossamer.dequantize.default:
                sources = {a: self.run_node(a) for a in node.all_input_nodes}
                kept = dict(self.env)
                self.env.update(sources)
                kept[node] = self.run_node(node)
                self.env.clear()
                self.env.update(kept)


def seen_range(layer: fx.Node) -> tuple[float, float]:
    """What a layer's output is cut off at, by clips and by the rounding that follows, in a quantised graph; infinite where it is not."""
    low, high, node = -math.inf, math.inf, layer
    while len(node.users) == 1:
        node = next(iter(node.users))
        if op_name(node) in CLIP:
            ends = clip_range(node)
            bottom, top = (None, None) if ends is None else ends
        elif node.target is torch.ops.gossamer.quantize_dequantize.default:
            module = node.graph.owning_module
            assert module is not None
            step, zero = (float(tensor_at(module, str(a.target))) for a in node.args[1:3])  # type: ignore[union-attr]
            bottom, top = ((int(code) - zero) * step for code in node.args[3:5])  # type: ignore[arg-type]
        else:
            break
        low, high = max(low, -math.inf if bottom is None else bottom), min(high, math.inf if top is None else top)
    return low, max(low, high)


def _fitting(weights: Tensor | None, result: Tensor, layer: fx.Node) -> Tensor | None:
    """Weights of positions, where they are shaped as the layer's result without its channels."""
    shape = result.shape[:-1] if op_name(layer) in LINEAR else result.shape[:1] + result.shape[2:]
    return weights if weights is not None and weights.shape == shape and result.dim() > 1 else None


def _refit(
    floating: fx.GraphModule,
    quantised: fx.GraphModule,
    layer: fx.Node,
    name: str,
    bits: int,
    inputs: Sequence[tuple[Tensor, Tensor]],
    rounding: str,
    aims: Sequence[Clipped],
    weights: Sequence[Tensor | None],
) -> bool:
    """New codes, and below 8 bits new steps, for one weight; False where the layer is not understood."""
    w = tensor_at(floating, name).detach()
    shape = geometry(layer, w)
    if shape is None:
        return False
    codes, step = tensor_at(quantised, name), tensor_at(quantised, name + "_step")
    w_GRK = shape.rows(w)
    s_GR = step.expand(w.shape[0]).reshape(shape.groups, shape.outputs).clone()
    kept_GRK = None if bool(w.all()) else w_GRK != 0  # zeros of a mask stay
    cut = math.isfinite(aims[0].low) or math.isfinite(aims[0].high)
    seen = joined(
        [
            watch(shape, w_GRK, x, q, aim if cut else None, len(inputs), each)
            for (x, q), aim, each in zip(inputs, aims, weights, strict=True)
        ]
    )
    w_GRK, _ = target(w_GRK, seen)
    h_GKK = damped(sum(seen[1:], seen[0]).covariances()[0])
    q_GRK = adaround(w_GRK, h_GKK, s_GR, bits) if rounding == "adaround" else gptq(w_GRK, h_GKK, s_GR, bits, kept_GRK)
    q_GRK = descend(w_GRK, q_GRK if kept_GRK is None else q_GRK * kept_GRK, h_GKK, s_GR, bits, kept_GRK)
    for _ in range(_REFIT if bits < 8 and step.dim() else 0):
        s_GR = fitted_steps(w_GRK, q_GRK, h_GKK, s_GR)
        q_GRK = descend(w_GRK, q_GRK, h_GKK, s_GR, bits, kept_GRK)
    if bits < 8 and step.dim():
        _restep(quantised, name, s_GR.flatten())
    low, fitted = limits(bits, True)[0], q_GRK.reshape(w.shape)
    codes.copy_(fitted if codes.dtype == torch.int8 else fitted - low)
    return True


def _restep(quantised: fx.GraphModule, name: str, new: Tensor) -> None:
    """Give a weight new steps; the bias, whose step is a multiple of them, keeps its value."""
    step = tensor_at(quantised, name + "_step")
    bias = bias_name(name)
    if bias in dict(quantised.named_buffers()):
        codes, bias_step = tensor_at(quantised, bias), tensor_at(quantised, bias + "_step")
        b = codes.double() * bias_step.double()
        bias_step.mul_(new / step)
        codes.copy_(bias_codes(b, bias_step))
    step.copy_(new)
