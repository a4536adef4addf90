"""What the operations of a captured graph are called here, and small questions about its nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

CONVOLUTION = {"conv1d", "conv2d", "conv3d"}
TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
LINEAR = {"linear"}
WEIGHTED = CONVOLUTION | TRANSPOSED | LINEAR
BATCH_NORM = {"batch_norm"}
DROPOUT = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
CLIP = {"relu", "hardtanh", "relu6", "clamp", "clamp_min"}
JOIN = {"add", "mul", "cat"}
GATE = {"sigmoid", "hardsigmoid"}
AVERAGE = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean"}
MAXIMUM = {"max_pool1d", "max_pool2d", "max_pool3d"}
SPLIT = {"split", "split_with_sizes", "chunk", "unbind", "tensor_split"}
VIEW = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "slice", "select", "expand", "clone",
    "contiguous", "pixel_shuffle", "pixel_unshuffle", "narrow", "channel_shuffle", "movedim", "alias", "detach", "repeat", "roll", "flip",
    "index_select",
}  # fmt: skip
_ALIASES = {
    "unsafe_view": "view",
    "native_batch_norm_legit_no_training": "batch_norm",
    "unsafe_split": "split",
    "max_pool2d_with_indices": "max_pool2d",
}


def op_name(node: fx.Node) -> str:
    """The operation without overload, in-place mark and implementation prefix: ``"conv2d"``; ``""`` where the node is no ATen call.

    Examples:
        >>> graph = fx.Graph()
        >>> op_name(graph.call_function(torch.ops.aten.relu_.default, (graph.placeholder("x"),)))
        'relu'
    """
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = node.target._schema.name.partition("::")[2].strip("_")
    return _ALIASES.get(name, name)


def module_path(node: fx.Node) -> str:
    """Path of the module whose forward made the call, ``""`` for the network's own."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return re.sub(r"@\d+", "", path.removeprefix("L['self']").lstrip("."))


def point_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A name for every call and input, ``"module.path:op:n"``: the n-th call of ``op`` inside that module, in execution order."""
    names: dict[fx.Node, str] = {}
    seen: dict[tuple[str, str], int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            key = ("", "input")
        elif op_name(node):
            key = (module_path(node), op_name(node))
        elif is_part(node):
            key = (module_path(node.args[0]), f"{op_name(node.args[0])}.{node.args[1]}")
        else:
            continue
        n = seen.get(key, 0)
        seen[key] = n + 1
        names[node] = f"input:{n}" if node.op == "placeholder" else f"{key[0]}:{key[1]}:{n}"
    return names


def is_part(node: fx.Node) -> bool:
    """Whether a node takes one output of an operation that has several."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[0], fx.Node)


def value(node: Any) -> Tensor | None:
    """The traced (fake) value of a node, where it is a tensor."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return val if isinstance(val, Tensor) else None


def sample_bytes(module: fx.GraphModule) -> list[float]:
    """What each value that a graph takes or computes has of one sample; looked at once, since symbolic sizes are slow to ask for."""
    if "sample_bytes" not in module.meta:
        nodes = [n for n in module.graph.nodes if n.op not in ("get_attr", "output")]
        vals = [(n.op, v) for n in nodes if (v := value(n)) is not None and v.dim()]
        batch = next((int(v.shape[0]) for op, v in vals if op == "placeholder"), 1)
        module.meta["sample_bytes"] = [int(v.numel()) * v.element_size() / max(1, batch) for _, v in vals]
    return module.meta["sample_bytes"]


def is_float(node: Any) -> bool:
    """Whether a node's value is a floating-point tensor."""
    val = value(node)
    return val is not None and val.is_floating_point()


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    path, _, leaf = name.rpartition(".")
    found = getattr(module.get_submodule(path), leaf)
    assert isinstance(found, Tensor)
    return found


def put_tensor(module: nn.Module, name: str, tensor: Tensor, *, buffer: bool) -> None:
    """Set a parameter or buffer by its dotted name, in place of what has that name; makes the modules on the way."""
    path, _, leaf = name.rpartition(".")
    for part in filter(None, path.split(".")):
        if not isinstance(getattr(module, part, None), nn.Module):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    module._parameters.pop(leaf, None)
    module._buffers.pop(leaf, None)
    if buffer:
        module.register_buffer(leaf, tensor)
    else:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))


def weighted_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Convolutions, transposed convolutions and linear layers, in execution order."""
    return (n for n in graph.nodes if op_name(n) in WEIGHTED)


def weight_name(node: fx.Node) -> str | None:
    """State-dict name of the weight of a convolution or linear layer; None where it is computed from the input."""
    weight = node.args[1]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def bias_node(node: fx.Node) -> Any:
    """The bias argument of a convolution or linear layer, a node or None."""
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def set_bias(node: fx.Node, bias: fx.Node) -> None:
    """Give a convolution or linear layer this bias."""
    args = [*node.args, None] if len(node.args) == 2 else list(node.args)
    args[2] = bias
    node.args = tuple(args)


def channel_axis(node: fx.Node) -> int:
    """The dimension of the weight that the output channels lie along (for a transposed convolution, those of one group)."""
    return 1 if op_name(node) in TRANSPOSED else 0
