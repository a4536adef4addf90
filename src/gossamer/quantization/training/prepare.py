"""From a float graph and edits to a network that can be trained, and back to a float graph and edits."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gossamer.plan import QuantizeActivation, QuantizeWeight
from gossamer.quantization.build import clip_range, least_steps
from gossamer.quantization.canonical import drop_unused
from gossamer.quantization.graph import (
    CLIP,
    CONVOLUTION,
    LINEAR,
    bias_node,
    is_part,
    op_name,
    point_names,
    tensor_at,
    weight_name,
)
from gossamer.quantization.graph import weighted_nodes as weighted
from gossamer.quantization.ops import along, dequantize, limits
from gossamer.quantization.points import source
from gossamer.quantization.training.norms import FoldedNorm, layers_with_norm
from gossamer.quantization.training.rounding import RoundedActivation, RoundedWeight


def trainable(floating: fx.GraphModule, edits: Sequence[Any], statistics: Mapping[str, tuple[Tensor, Tensor]]) -> fx.GraphModule:
    """A copy of a canonical float graph that rounds as the edits say, with steps as parameters and folded norms unfolded.

    Args:
        floating: what `canonical` returned.
        edits: `QuantizeWeight` and `QuantizeActivation`, whose steps are the first ones.
        statistics: of `output_statistics`.

    Returns:
        A graph module in train mode. Weights have their names; steps and norms lie under ``rounding`` and ``norms``.
    """
    module = copy.deepcopy(floating)
    layers = layers_with_norm(module)
    points = {e.point: e for e in edits if isinstance(e, QuantizeActivation)}
    for node, name in point_names(module.graph).items():
        if name in points:
            _round_after(module, node, points[name])
    weights = {e.tensor: e for e in edits if isinstance(e, QuantizeWeight)}
    nodes = {str(n.target): n for n in module.graph.nodes if n.op == "get_attr"}
    for name, edit in weights.items():
        _round_weight(module, nodes[name], edit)
    for name, (mean, var) in statistics.items():
        if name in weights and weights[name].axis is not None:
            _unfold(module, name, layers[name], mean, var)
    _give_gradients(module)
    module.graph.eliminate_dead_code()
    drop_unused(module)
    module.graph.lint()
    module.recompile()
    return module.train()


def as_fitted(floating: fx.GraphModule, fitted: nn.Module, edits: Sequence[Any]) -> fx.GraphModule:
    """A copy of a float graph whose weights round to the codes that a quantised network holds, each as near to the float weight as that allows.

    What was fitted to calibration data (`gossamer.quantization.reconstruction`) is so where training starts.

    Args:
        floating: what `canonical` returned, equalised as it was when it was quantised.
        fitted: the quantised network.
        edits: what it was made with, its steps in them.
    """
    module = copy.deepcopy(floating)
    names = {str(weight_name(n)) for n in weighted(module.graph)}
    with torch.no_grad():
        for edit in (e for e in edits if isinstance(e, QuantizeWeight) and e.tensor in names):
            stored, step = tensor_at(fitted, edit.tensor), tensor_at(fitted, edit.tensor + "_step")
            zero = None if edit.signed else tensor_at(fitted, edit.tensor + "_zero_point")
            w, middle = tensor_at(module, edit.tensor).detach(), dequantize(stored, step, zero, edit.axis)
            reach = 0.49 * along(step, w, edit.axis)
            w.copy_(torch.minimum(torch.maximum(w, middle - reach), middle + reach))
    return module


def finished(trained: fx.GraphModule, floating: fx.GraphModule) -> tuple[fx.GraphModule, list[Any]]:
    """What was trained as a canonical float graph, its norms folded and its weights on their grids, and edits with the learned steps.

    Args:
        trained: of `trainable`, after training.
        floating: the graph that it was made from; it is not changed.

    Returns:
        A copy of ``floating`` with the trained tensors, and edits in the order of the network.
    """
    module = copy.deepcopy(floating)
    modules = dict(trained.named_modules())
    norms = {m.weight: m for m in modules.values() if isinstance(m, FoldedNorm)}
    own = {**dict(trained.named_parameters()), **dict(trained.named_buffers())}
    steps = {m.edit.point: m.edited() for m in modules.values() if isinstance(m, RoundedActivation)}
    with torch.no_grad():
        for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            if name in own:
                tensor.detach().copy_(own[name])
        for name, layers in layers_with_norm(module).items():
            if name in norms:
                tensor_at(module, str(bias_node(layers[0]).target)).detach().copy_(norms[name].shift())
        edits: list[Any] = []
        for rounding in (m for m in modules.values() if isinstance(m, RoundedWeight)):
            name, step = rounding.edit.tensor, rounding.step()
            w = rounding(tensor_at(module, name)).detach()
            if name in norms:
                factor = norms[name].factor()
                w, step = w * along(factor, w, rounding.edit.axis), torch.where(step * factor > 1e-30, step * factor, step)
            tensor_at(module, name).detach().copy_(w)
            step = torch.maximum(step, _least(module, name, steps)) if rounding.edit.axis == 0 else step
            edits.append(rounding.edit.model_copy(update={"steps": tuple(step.reshape(-1).tolist())}))
    return module, [*edits, *steps.values()]


def unrounded(trained: fx.GraphModule, floating: fx.GraphModule) -> fx.GraphModule:
    """The float graph with the trained weights before rounding, norms folded: where more training can go on from."""
    module, _ = finished(trained, floating)
    own = dict(trained.named_parameters())
    norms = {m.weight: m for m in trained.modules() if isinstance(m, FoldedNorm)}
    with torch.no_grad():
        for rounding in (m for m in trained.modules() if isinstance(m, RoundedWeight)):
            w = own[rounding.edit.tensor].detach()
            if rounding.edit.tensor in norms:
                w = w * along(norms[rounding.edit.tensor].factor(), w, rounding.edit.axis)
            tensor_at(module, rounding.edit.tensor).detach().copy_(w)
    return module


def _round_after(module: fx.GraphModule, node: fx.Node, edit: QuantizeActivation) -> None:
    """Round a node's value; clips that the rounding does anyway go, and bound its step so that they stay implied."""
    low, high = limits(edit.bits, edit.signed)
    bounds: list[float] = []
    last, clips = node, list[fx.Node]()
    while op_name(last) in CLIP and (found := clip_range(last)) is not None and all(len(c.users) == 1 for c in [*clips, last][1:]):
        floor, ceiling = found
        if (floor is not None and floor > 0) or (floor == 0 and edit.zero_point != low) or (ceiling is not None and ceiling <= 0):
            break
        bounds += [floor / (low - edit.zero_point)] if floor else []
        bounds += [ceiling / (high - edit.zero_point)] if ceiling is not None and high > edit.zero_point else []
        clips.append(last)
        last = last.args[0]  # type: ignore[assignment]
    name = f"rounding.activations_{edit.bits}bit.{_flat(edit.point)}"
    module.add_submodule(name, RoundedActivation(edit, min(bounds, default=None)))
    users = list(node.users)
    after = [n for n in module.graph.nodes if n.op == "placeholder"][-1] if node.op == "placeholder" else node
    with module.graph.inserting_after(after):
        rounded = module.graph.call_module(name, (last,))
    for user in users:
        user.replace_input_with(node, rounded)


def _round_weight(module: fx.GraphModule, node: fx.Node, edit: QuantizeWeight) -> None:
    name = f"rounding.weights_{edit.bits}bit.{_flat(edit.tensor)}"
    module.add_submodule(name, RoundedWeight(edit))
    with module.graph.inserting_after(node):
        rounded = module.graph.call_module(name, (node,))
    for user in list(node.users):
        if user is not rounded:
            user.replace_input_with(node, rounded)


def _unfold(module: fx.GraphModule, name: str, layers: list[fx.Node], mean: Tensor, var: Tensor) -> None:
    bias = bias_node(layers[0])
    norm = FoldedNorm(name, mean, var, tensor_at(module, str(bias.target)).detach())
    module.add_submodule(f"norms.{_flat(name)}", norm)
    for layer in layers:
        layer.args = (*layer.args[:2], None, *layer.args[3:])
        with module.graph.inserting_after(layer):
            normed = module.graph.call_module(f"norms.{_flat(name)}", (layer,))
        for user in list(layer.users):
            if user is not normed:
                user.replace_input_with(layer, normed)


def _give_gradients(module: fx.GraphModule) -> None:
    """Operations without a gradient as ones that have it: a batch norm that stays, a copy into a part, a recurrent layer on a GPU."""
    for node in list(module.graph.nodes):
        if "_native_batch_norm_legit_no_training" in str(node.target):
            x, weight, bias, mean, var, momentum, eps = node.args
            with module.graph.inserting_before(node):
                new = module.graph.call_function(F.batch_norm, (x, mean, var, weight, bias, False, momentum, eps))
            for user in list(node.users):
                if is_part(user) and user.args[1] == 0:
                    user.replace_all_uses_with(new)
        elif op_name(node) == "copy":
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_function(torch.Tensor.expand_as, (node.args[1], node.args[0])))
        elif op_name(node) in ("lstm", "gru", "rnn_tanh", "rnn_relu") and node.args[5] == 0.0:
            node.args = (*node.args[:6], True, *node.args[7:])


def _least(module: fx.GraphModule, name: str, steps: Mapping[str, QuantizeActivation]) -> Tensor:
    """The smallest steps with which the biases of a weight's layers fit int32."""
    names, found = point_names(module.graph), tensor_at(module, name).detach().new_zeros(())
    for layer in weighted(module.graph):
        bias = bias_node(layer)
        if weight_name(layer) != name or op_name(layer) not in CONVOLUTION | LINEAR or not isinstance(bias, fx.Node):
            continue
        point = names.get(source(layer.args[0]), "")  # type: ignore[arg-type]
        if point in steps and bias.op == "get_attr":
            found = torch.maximum(found, least_steps(tensor_at(module, str(bias.target)).detach(), steps[point].step))
    return found


def _flat(name: str) -> str:
    """A name as one part of a module path."""
    return name.replace(".", "_").replace(":", "__")
