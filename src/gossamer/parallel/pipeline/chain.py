"""A network in training as a chain of operations, and where the chain can be cut.

Position ``p`` lies before operation ``p``. What crosses it are the results of operations before it that are used behind it: the tensors that a
stage hands to the next, those that only a later stage needs (skips) included. The network's inputs cross nothing: each stage is given them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gossamer.errors import ExportError
from gossamer.result import ExampleInputs
from gossamer.sources.batches import check_inputs
from gossamer.trace.capture import quiet


@dataclass(frozen=True, eq=False)
class Chain:
    """A network as a chain of operations.

    Attributes:
        graph: of ATen operations in train mode, for batches of the example inputs' size; parameters and buffers have the network's names, and
            are its own.
        operations: in order; no inputs, weights or constants among them.
        inputs: of the network, flat.
        crossing: for each position from 0 to ``len(operations)``, what crosses it.
        barred: position -> why the chain cannot be cut there.
        out_spec: how the network's outputs are nested.
    """

    graph: fx.GraphModule = field(repr=False)
    operations: tuple[fx.Node, ...] = field(repr=False)
    inputs: tuple[fx.Node, ...]
    crossing: tuple[tuple[fx.Node, ...], ...] = field(repr=False)
    barred: dict[int, str] = field(repr=False)
    out_spec: Any = field(repr=False)

    def crossing_bytes(self, position: int) -> int:
        """Bytes of what crosses a position, for one micro-batch."""
        return sum(size_bytes(n) for n in self.crossing[position])

    def weights(self, first: int, end: int) -> list[str]:
        """Names of the parameters and buffers that some operations use, in order of use."""
        return list(dict.fromkeys(str(w.target) for n in self.operations[first:end] for w in n.all_input_nodes if w.op == "get_attr"))


def size_bytes(node: fx.Node) -> int:
    """Bytes of an operation's result."""
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor))


def chain_of(model: nn.Module, example_inputs: ExampleInputs) -> Chain:
    """Write a network in train mode down as a chain of operations.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> chain = chain_of(net, (torch.zeros(3, 4),))
        >>> [n.name for n in chain.operations], [chain.crossing_bytes(p) for p in range(4)]
        (['linear', 'relu', 'linear_1'], [0, 96, 96, 0])

    Args:
        model: the network; its mode is put back. The graph holds its parameters and buffers themselves.
        example_inputs: of one micro-batch: a tuple of positional inputs, or a dict of keyword inputs.

    Raises:
        ExportError: the network cannot be written as one graph.
    """
    inputs = check_inputs(example_inputs)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    modes = [(m, m.training) for m in model.modules()]
    model.train()
    try:
        with quiet(), redirect_stderr(StringIO()):  # where a failing export prints the graph
            exported = torch.export.export(model, args, kwargs, strict=False)
            graph: Any = exported.module(check_guards=False)
    except Exception as e:  # torch.export raises many kinds
        reason = next((s.strip() for s in str(e).splitlines() if s.strip()), type(e).__name__)
        raise ExportError(f"a pipeline needs the network as one graph, and it cannot be exported in train mode: {reason[:200]}") from None
    finally:
        for m, mode in modes:
            m.training = mode
    _own_tensors(graph, model)
    held = _functional(graph.graph)
    operations = tuple(n for n in graph.graph.nodes if n.op not in ("placeholder", "get_attr", "output"))
    placeholders = tuple(n for n in graph.graph.nodes if n.op == "placeholder")
    return _described(graph, operations, placeholders, held, exported.call_spec.out_spec)


def _own_tensors(graph: nn.Module, model: nn.Module) -> None:
    """The network's own parameters and buffers in the place of the graph's, which may be copies."""
    for node in graph.graph.nodes:  # type: ignore[union-attr]
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            try:
                tensor = getattr(model.get_submodule(path), leaf)
            except AttributeError:  # a constant that export lifted
                continue
            owner = graph.get_submodule(path)
            if leaf in owner._parameters:
                owner._parameters[leaf] = tensor
            elif leaf in owner._buffers:
                owner._buffers[leaf] = tensor


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return (schema is not None and any(r.alias_info is not None for r in schema.returns)) or node.target is operator.getitem


def _written(node: fx.Node) -> fx.Node | None:
    """What an operation writes into by name; batch norms, which update their buffers without saying so, are not meant."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        return None
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def _functional(graph: fx.Graph) -> list[fx.Node]:
    """Replace operations that write into what an operation made by ones that do not; returns those left, whose targets stay in one stage."""
    left = []
    for node in list(graph.nodes):
        into = _written(node) if node.op == "call_function" else None
        if into is None or into.op == "get_attr":
            continue
        packet, overload = str(node.target).removeprefix("aten.").rsplit(".", 1)
        plain = getattr(getattr(torch.ops.aten, packet[:-1], None), overload, None) if packet.endswith("_") else None
        others = [u for u in into.users if u is not node]
        if plain is None or into.op == "placeholder" or _is_view(into) or any(_is_view(u) for u in others):
            left.append(node)
            continue
        node.target = plain
        node.meta["in_place"] = True
        order = {n: i for i, n in enumerate(graph.nodes)}
        into.replace_all_uses_with(node, delete_user_cb=lambda u, n=node, o=order: u is not n and o[u] > o[n])  # type: ignore[misc]
    return left


def _described(
    graph: fx.GraphModule, operations: tuple[fx.Node, ...], inputs: tuple[fx.Node, ...], held: list[fx.Node], out_spec: Any
) -> Chain:
    order = {n: i for i, n in enumerate(operations)}
    count = len(operations)
    last = {n: max((order.get(u, count) for u in n.users), default=i) for n, i in order.items()}
    crossing: list[list[fx.Node]] = [[] for _ in range(count + 1)]
    for n, i in order.items():
        for p in range(i + 1, min(last[n], count - 1) + 1):
            crossing[p].append(n)
    barred: dict[int, str] = {}

    def bar(positions: Iterator[int] | range, why: str) -> None:
        barred.update({p: why for p in positions if p not in barred})

    tensors: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for node, owner in _tensors_of(graph):
        trained = isinstance(owner, nn.Parameter) and owner.requires_grad
        places = [order[u] for u in node.users if u in order]
        if places and (trained or any(_changes(u, node) for u in node.users)):
            tensors.setdefault(id(owner), []).extend(places)
            names.setdefault(id(owner), str(node.target))
    for key, places in tensors.items():
        bar(range(min(places) + 1, max(places) + 1), f"{names[key]} is used on both sides")
    for node in held:
        family = _aliases(node)
        places = [order[f] for f in family if f in order]
        ends = [last[f] for f in family if f in last]
        bar(range(min(places) + 1, min(max(ends), count) + 1), f"{node.name} writes into a tensor part by part")
    learned = _differentiable(graph, operations)
    for p in range(1, count):
        for n in crossing[p]:
            if not isinstance(n.meta.get("val"), Tensor):
                bar(range(p, p + 1), f"{n.name}, which is not one tensor, crosses")
            elif n not in learned:
                bar(range(p, p + 1), f"{n.name}, which no weight before it contributes to, crosses")
    return Chain(graph, operations, inputs, tuple(tuple(c) for c in crossing), barred, out_spec)


def _tensors_of(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, Any]]:
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            yield node, operator.attrgetter(str(node.target))(graph)


def _changes(user: fx.Node, buffer: fx.Node) -> bool:
    """Whether an operation changes a buffer: by writing into it, or as a batch norm in training does."""
    if _written(user) is buffer:
        return True
    return "batch_norm" in str(user.target) or "instance_norm" in str(user.target)


def _aliases(node: fx.Node) -> set[fx.Node]:
    """Everything that may share memory with what a node writes into."""
    root = node
    while (base := root.args[0] if root.args and (_is_view(root) or _written(root) is not None) else None) is not None:
        if not isinstance(base, fx.Node) or base.op != "call_function":
            break
        root = base
    found, fresh = {root}, [root]
    while fresh:
        for user in fresh.pop().users:
            if user not in found and (_is_view(user) or _written(user) is not None):
                found.add(user)
                fresh.append(user)
    return found


def _differentiable(graph: fx.GraphModule, operations: tuple[fx.Node, ...]) -> set[fx.Node]:
    """Operations whose results carry gradients to a trained weight."""
    found = {n for n, t in _tensors_of(graph) if isinstance(t, nn.Parameter) and t.requires_grad}
    for node in operations:
        value = node.meta.get("val")
        floating = any(isinstance(t, Tensor) and t.is_floating_point() for t in pytree.tree_leaves(value))
        if floating and "detach" not in str(node.target) and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found
