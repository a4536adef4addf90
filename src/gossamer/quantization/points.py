"""Where activations are rounded: the tensors that an integer runtime has to hold in 8 bits, and no others."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from gossamer.errors import SelectorError, near
from gossamer.quantization.graph import (
    AVERAGE,
    CLIP,
    CONVOLUTION,
    GATE,
    JOIN,
    LINEAR,
    MAXIMUM,
    SPLIT,
    VIEW,
    is_float,
    is_part,
    module_path,
    op_name,
    point_names,
    value,
    weight_name,
    weighted_nodes,
)  # fmt: skip


@dataclass(frozen=True)
class Points:
    """What will be quantised.

    Attributes:
        layers: convolutions and linear layers whose weight is stored as integers.
        activations: nodes after which the value is rounded, with their point names, in execution order.
        notes: one line for each kind of thing that stays float, with the reason.
    """

    layers: tuple[fx.Node, ...]
    activations: dict[fx.Node, str]
    notes: tuple[str, ...]


def find_points(module: fx.GraphModule, *, ignore: Iterable[str] = ()) -> Points:
    """Choose weights and activations of a canonical graph.

    Every convolution and linear layer with a constant weight is quantised. Rounded are: what flows into them; what a convolution
    gives, past an activation that clips (rounding clips too, so it costs nothing); and what sums, products, concatenations and
    average pools of rounded values give. Values that are only moved (views, maximum pools) stay rounded. The network's outputs, and
    everything else, stay float.

    Args:
        module: what `canonical` returned.
        ignore: patterns (``fnmatch``) of module paths or weight names; those layers stay float.

    Raises:
        SelectorError: a pattern matches no layer.
    """
    layers, notes = _layers(module, tuple(ignore))
    users_output = _reach_only_output(module.graph)
    rounded: dict[fx.Node, None] = {}

    def require(node: fx.Node) -> bool:
        """Round this value where it is made, or past the clip that follows; False where it cannot or need not be."""
        home = _clip_after(source(node))
        if home in users_output or not is_float(home) or home.op == "get_attr":
            return False
        rounded[home] = None
        return True

    def is_rounded(node: Any) -> bool:
        return isinstance(node, fx.Node) and _clip_after(source(node)) in rounded and _clip_after(source(node)) not in users_output

    for layer in layers:
        if op_name(layer) in CONVOLUTION | LINEAR:
            assert isinstance(layer.args[0], fx.Node)
            require(layer.args[0])
        if op_name(layer) in CONVOLUTION:
            require(layer)
    for _ in range(2):  # the second time, for joins whose inputs were required by a later one
        for node in module.graph.nodes:
            op = op_name(node)
            if op in JOIN:
                parts = _operands(node)
                if (
                    any(map(is_rounded, parts))
                    and all(is_rounded(p) or _can_be_rounded(p) for p in parts)
                    and _clip_after(node) not in users_output
                ):
                    for part in parts:
                        require(part)
                    require(node)
            elif ((op in AVERAGE and is_image(node.args[0])) or op in CLIP) and is_rounded(node.args[0]) and source(node) is node:
                require(node)
    names = point_names(module.graph)
    return Points(tuple(layers), {n: names[n] for n in module.graph.nodes if n in rounded}, tuple(notes))


def source(node: fx.Node) -> fx.Node:
    """The node whose values a node only moves: through views, splits and maximum pools."""
    while True:
        before = node.args[0] if node.args else None
        part_of_move = is_part(node) and (op_name(node.args[0]) in SPLIT or op_name(node.args[0]) in MAXIMUM)  # type: ignore[arg-type]
        moves = op_name(node) in VIEW | SPLIT | MAXIMUM or part_of_move or (op_name(node) == "pad" and _pads_zeros(node))
        if not moves or not isinstance(before, fx.Node):
            return node
        node = before


def is_image(node: Any) -> bool:
    """Whether a value has spatial dimensions (batch, channels, positions...)."""
    val = value(node)
    return val is not None and val.dim() >= 3


def _layers(module: fx.GraphModule, ignore: tuple[str, ...]) -> tuple[list[fx.Node], list[str]]:
    candidates: list[tuple[fx.Node, str, str]] = []
    notes: list[str] = []
    computed = []
    for node in weighted_nodes(module.graph):
        name = weight_name(node)
        if name is None:
            computed.append(f"{module_path(node)} ({op_name(node)})")
        elif is_float(node.args[1]):
            candidates.append((node, name, module_path(node)))
    if computed:
        notes.append(f"stay float, their weight depends on the input: {', '.join(computed)}")
    for pattern in ignore:
        known = [n for _, name, path in candidates for n in (path, name)]
        if not any(_matches(pattern, name, path) for _, name, path in candidates):
            raise SelectorError(f"ignore pattern {pattern!r} matches no convolution or linear layer{near(pattern, known)}")
    ignored = [(n, name, path) for n, name, path in candidates if any(_matches(p, name, path) for p in ignore)]
    if ignored:
        notes.append(f"stay float, ignored: {', '.join(dict.fromkeys(name for _, name, _ in ignored))}")
    names = {name for _, name, _ in ignored}  # a shared weight is one tensor: ignored once is ignored
    left = [n for n, name, _ in candidates if name not in names]
    floats = [n for n in module.graph.nodes if op_name(n) == "batch_norm"]
    if floats:
        notes.append(f"runs in float, no layer before it to fold it into: {', '.join(module_path(n) + ' (batch norm)' for n in floats)}")
    no_kernel = [n for n in left if op_name(n) not in CONVOLUTION | LINEAR]
    if no_kernel:
        notes.append(
            f"run in float with 8-bit weights, runtimes have no integer kernel: {', '.join(f'{module_path(n)} ({op_name(n)})' for n in no_kernel)}"
        )
    other: dict[str, None] = {}
    for n in module.graph.nodes:
        if op_name(n) in {
            "lstm",
            "gru",
            "rnn_tanh",
            "rnn_relu",
            "bilinear",
            "matmul",
            "bmm",
            "einsum",
            "scaled_dot_product_attention",
        }:
            other[f"{module_path(n)} ({op_name(n)})".lstrip()] = None
    if other:
        notes.append(f"stay float, not quantised by this version: {', '.join(other)}")
    return left, notes


def _matches(pattern: str, name: str, path: str) -> bool:
    return any(fnmatch.fnmatchcase(n, pattern) for n in (name, path)) or path.startswith(pattern + ".")


def _clip_after(node: fx.Node) -> fx.Node:
    """The clipping activation that alone reads a value, else the node itself."""
    while len(node.users) == 1 and op_name(user := next(iter(node.users))) in CLIP and user.args[0] is node and not _node_arguments(user):
        node = user
    return node


def _node_arguments(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.all_input_nodes if a is not node.args[0]]


def _operands(node: fx.Node) -> list[Any]:
    """What a sum, product or concatenation joins; a number counts as something that cannot be rounded."""
    return list(node.args[0]) if op_name(node) == "cat" else list(node.args[:2])  # type: ignore[arg-type]


def _can_be_rounded(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    made_by = source(node)
    if op_name(made_by) in CLIP:
        made_by = made_by.args[0]  # type: ignore[assignment]
    return op_name(made_by) in CONVOLUTION | LINEAR | GATE | JOIN | AVERAGE | {"batch_norm"} or (
        is_part(made_by) and op_name(made_by.args[0]) == "batch_norm"  # type: ignore[arg-type]
    )


def _pads_zeros(node: fx.Node) -> bool:
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    fill = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return bool(mode == "constant" and fill in (None, 0, 0.0))


def _reach_only_output(graph: fx.Graph) -> set[fx.Node]:
    """Values that are only moved on their way to the network's outputs."""
    reach: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node.users and all(u in reach and (u.op == "output" or source(u) is not u) for u in node.users)):
            reach.add(node)
    return reach
