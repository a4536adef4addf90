"""Codes, steps and biases learned through the whole network, so that its blocks and its outputs are the float network's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gossamer.plan import QuantizeActivation, QuantizeWeight
from gossamer.quantization.blocks import block_ends
from gossamer.quantization.build import quantized
from gossamer.quantization.calibration import batch_size, parts
from gossamer.quantization.canonical import drop_unused
from gossamer.quantization.graph import bias_node, point_names, put_tensor, set_bias, tensor_at, weighted_nodes
from gossamer.quantization.ops import dequantize
from gossamer.quantization.training.codes import LearnedCodes
from gossamer.quantization.training.prepare import flat, give_gradients, least_for_biases, round_after
from gossamer.quantization.training.rounding import RoundedActivation

Progress = Callable[[int, int], None]
_BATCH = 20
_BLOCKS, _DIVERGENCE = 0.2, 0.3  # what blocks and the divergence of logits count beside the outputs' error
_RATES = {"latent": 1e-3, "ratio": 1e-2, "activation": 1e-3, "bias": 3e-3}


def learn(
    floating: fx.GraphModule,
    fitted: fx.GraphModule,
    edits: Sequence[Any],
    leaves: list[Any],
    *,
    iterations: int = 300,
    seed: int = 0,
    mirror: bool = False,
    progress: Progress | None = None,
) -> tuple[fx.GraphModule, list[Any], str]:
    """Learn what a fitted integer network still can, taught by the float network on calibration samples.

    Args:
        floating: the canonical float graph.
        fitted: the integer network that was fitted to it layer by layer (`gossamer.quantization.reconstruction.reconstruct`); it is not changed.
        edits: what it was made with, its steps in them.
        leaves: flat inputs, all samples together.
        iterations: steps of Adam, on 20 samples each.
        seed: of the samples' order and of what is mirrored.
        mirror: show each image mirrored half of the time.
        progress: called with (batches done, batches in all).

    Returns:
        The integer network, its edits, and a note. Where learning made the outputs worse, all of it is as it was.

    Source:
        Blocks: Li et al., "BRECQ", ICLR 2021, arXiv:2102.05426, here all of them at once; steps: Esser et al., arXiv:1902.08153.
    """
    start = _with_biases(floating, fitted)
    network = _trainable(start, fitted, edits)
    ends = [n.name for n in block_ends(floating.graph)]
    teacher, student = _Tapped(floating, ends), _Tapped(network, ends)
    parameters = [{"params": [p], "lr": rate, "initial": rate} for p, rate in _rates(network)]
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99))
    bounded = [m for m in network.modules() if isinstance(m, RoundedActivation)]
    generator = torch.Generator().manual_seed(seed)
    samples = batch_size(leaves)
    for i, index in enumerate(_batches(samples, _BATCH if floating.meta["dynamic_batch"] else samples, iterations, generator)):
        batch = _picked(leaves, index, samples, mirror, generator)
        share = 0.5 * (1 + math.cos(math.pi * i / iterations)) * min(1.0, (i + 1) / 10)
        for group in optimizer.param_groups:
            group["lr"] = group["initial"] * share
        with torch.no_grad():
            wanted = teacher.values(batch)
        loss = _distance(wanted, student.values(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for module in bounded:
            module.hold()
        if progress:
            progress(i + 1, iterations)
    learned, new = _finished(start, network, edits)
    before, after = (_apart(floating, each, leaves) for each in (fitted, learned))
    if not after < before:
        return (
            fitted,
            list(edits),
            f"learned rounding was dropped: it moved the outputs by {after:.3g} of their power, without it {before:.3g}",
        )
    return learned, new, f"learned rounding moves the outputs by {after:.3g} of their power, without it {before:.3g}"


def _batches(samples: int, size: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of the samples of ``count`` batches, all samples in another order each time."""
    while count > 0:
        batches = torch.randperm(samples, generator=generator).split(size)[:count]
        yield from batches
        count -= len(batches)


def _picked(leaves: list[Any], index: Tensor, samples: int, mirror: bool, generator: torch.Generator) -> list[Any]:
    """Some samples, each image of them mirrored or not."""
    mirrored = (torch.rand(len(index), generator=generator) < 0.5) & mirror
    picked = []
    for x in leaves:
        if isinstance(x, Tensor) and x.dim() and x.shape[0] == samples:
            x = x[index.to(x.device)]
            if mirror and x.dim() == 4:
                x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(3), x)
        picked.append(x)
    return picked


def _trainable(floating: fx.GraphModule, fitted: fx.GraphModule, edits: Sequence[Any]) -> fx.GraphModule:
    """A copy of a float graph that rounds as the fitted network does, with codes, steps and biases as parameters."""
    module = copy.deepcopy(floating)
    points = {e.point: e for e in edits if isinstance(e, QuantizeActivation)}
    nodes = {str(n.target): n for n in module.graph.nodes if n.op == "get_attr"}
    for node, name in point_names(module.graph).items():
        if name in points:
            round_after(module, node, points[name])
    module.requires_grad_(False)
    for rounding in module.modules():
        if isinstance(rounding, RoundedActivation):
            rounding.requires_grad_(True)
    for edit in (e for e in edits if isinstance(e, QuantizeWeight)):
        w, stored = tensor_at(floating, edit.tensor).detach(), tensor_at(fitted, edit.tensor)
        zero = None if edit.signed else tensor_at(fitted, edit.tensor + "_zero_point")
        codes = dequantize(stored, torch.ones_like(tensor_at(fitted, edit.tensor + "_step")), zero, edit.axis)
        name = f"rounding.weights.{flat(edit.tensor)}"
        module.add_submodule(name, LearnedCodes(edit, w, codes))
        with module.graph.inserting_before(nodes[edit.tensor]):
            nodes[edit.tensor].replace_all_uses_with(module.graph.call_module(name, ()))
    for layer in weighted_nodes(module.graph):
        if isinstance(bias := bias_node(layer), fx.Node) and bias.op == "get_attr":
            tensor_at(module, str(bias.target)).requires_grad_(True)
    give_gradients(module)
    module.graph.eliminate_dead_code()
    drop_unused(module)
    module.graph.lint()
    module.recompile()
    return module


def _with_biases(floating: fx.GraphModule, fitted: fx.GraphModule) -> fx.GraphModule:
    """A copy of the float graph whose layers have the biases that the fitted network holds as integers, each one of its own."""
    module = copy.deepcopy(floating)
    stored = {n.name: bias_node(n) for n in weighted_nodes(fitted.graph)}
    for layer in weighted_nodes(module.graph):
        back, own = stored.get(layer.name), bias_node(layer)
        if not isinstance(back, fx.Node) or back.target is not torch.ops.gossamer.dequantize.default:
            continue
        name = str(back.args[0].target)  # type: ignore[union-attr]
        value = (tensor_at(fitted, name).double() * tensor_at(fitted, name + "_step").double()).float()
        if own is None:
            put_tensor(module, name, value, buffer=False)
            with module.graph.inserting_before(layer):
                set_bias(layer, module.graph.get_attr(name))
        elif len(own.users) == 1:
            put_tensor(module, str(own.target), value, buffer=False)
    module.recompile()
    return module


def _rates(network: fx.GraphModule) -> Iterator[tuple[nn.Parameter, float]]:
    """Each parameter with its learning rate: of a step for codes, of themselves for steps, of their mean magnitude for biases."""
    activations = {id(m.ratio) for m in network.modules() if isinstance(m, RoundedActivation)}
    for name, p in network.named_parameters():
        if p.requires_grad:
            kind = "activation" if id(p) in activations else name.rpartition(".")[2]
            yield p, _RATES[kind] if kind in _RATES else _RATES["bias"] * max(1e-6, float(p.detach().abs().mean()))


def _finished(floating: fx.GraphModule, network: fx.GraphModule, edits: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """The learned network in integers, and its edits."""
    module = copy.deepcopy(floating)
    steps = {m.edit.point: m.edited() for m in network.modules() if isinstance(m, RoundedActivation)}
    learned = {m.edit.tensor: m for m in network.modules() if isinstance(m, LearnedCodes)}
    own = dict(network.named_parameters())
    new: list[Any] = []
    with torch.no_grad():
        for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            if name in own:
                tensor.detach().copy_(own[name])
        for edit in edits:
            if isinstance(edit, QuantizeActivation):
                edit = steps[edit.point]
            elif isinstance(edit, QuantizeWeight):
                codes = learned[edit.tensor]
                tensor_at(module, edit.tensor).detach().copy_(codes())
                step = codes.steps()
                step = torch.maximum(step, least_for_biases(module, edit.tensor, steps)) if edit.axis == 0 else step
                edit = edit.model_copy(update={"steps": tuple(step.reshape(-1).tolist())})
            new.append(edit)
    return quantized(module, new), new


class _Tapped(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes, by name."""

    def __init__(self, module: fx.GraphModule, names: Sequence[str]) -> None:
        super().__init__(module)
        self.names = set(names)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names:
            self.seen[n.name] = result
        return result

    def values(self, leaves: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the values of the tapped nodes."""
        self.seen = {}
        out = self.run(*leaves, enable_io_processing=False)
        return _floats(out), [self.seen[n] for n in sorted(self.names)]


def _distance(wanted: tuple[list[Tensor], list[Tensor]], got: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    """Squared error of the outputs over their power; a share of each block's over its variance; and of the divergence where outputs are logits."""
    (outputs, blocks), (our_outputs, our_blocks) = wanted, got
    errors = [(b - a).square().mean() / a.var().clamp(min=1e-20) for a, b in zip(blocks, our_blocks, strict=True)]
    loss = _BLOCKS * torch.stack(errors).mean() if errors else torch.zeros(())
    for a, b in zip(outputs, our_outputs, strict=True):
        loss = loss + (a - b).square().sum() / a.square().sum().clamp(min=1e-20)
        if a.dim() == 2 and a.shape[1] > 1:
            loss = loss + _DIVERGENCE * (a.softmax(1) * (a.log_softmax(1) - b.log_softmax(1))).sum(1).mean()
    return loss


def _floats(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def _apart(floating: fx.GraphModule, network: fx.GraphModule, leaves: list[Any]) -> float:
    """Squared error of the outputs over their power, on all samples."""
    error = power = 0.0
    with torch.no_grad():
        for part in parts(floating, leaves, _BATCH):
            wanted, got = (_floats(_Tapped(m, ()).run(*part, enable_io_processing=False)) for m in (floating, network))
            error += sum(float((a.double() - b.double()).square().sum()) for a, b in zip(wanted, got, strict=True))
            power += sum(float(a.double().square().sum()) for a in wanted)
    return error / max(power, 1e-30)
