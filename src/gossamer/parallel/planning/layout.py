"""A network laid out for planning: the work of one process's share, for each tensor degree, and what its ranks say to one another."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import fx, nn

from gossamer.parallel.pipeline.chain import Chain, chain_of, size_bytes
from gossamer.parallel.pipeline.cutting import Balance, places
from gossamer.parallel.planning.costs import Machine, Work, is_view
from gossamer.parallel.tensor.choice import Choice
from gossamer.parallel.tensor.split import share_of
from gossamer.result import ExampleInputs
from gossamer.trace import trace


@dataclass(frozen=True, eq=False)
class Laid:
    """One process's share of the layers.

    Attributes:
        tensor: ranks that share each layer.
        chain: of the share.
        work: of each of its operations.
        summed: bytes that are reduced over the tensor ranks at each operation, forward and backward together, for the chain's batch.
        sums: how many reductions those are.
        weights: bytes of trained weights at their first operation.
        buffers: bytes of all else that has to be there.
        norms: batch norms at each operation.
        crossing: bytes that cross each position, for the chain's batch.
    """

    tensor: int
    chain: Chain = field(repr=False)
    work: Work = field(repr=False)
    summed: np.ndarray = field(repr=False)
    sums: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)
    buffers: np.ndarray = field(repr=False)
    norms: np.ndarray = field(repr=False)
    crossing: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module, example_inputs: ExampleInputs, tensor: int) -> Laid:
        """Count a network's share among ``tensor`` ranks; NothingToDo where nothing can be shared."""
        choice = None
        if tensor > 1:
            model, choice = share_of(model, trace(model, example_inputs), tensor)
        chain = chain_of(model, example_inputs)
        n = len(chain.operations)
        summed, sums = _sums(chain, choice)
        weights, buffers = np.zeros(n), np.zeros(n)
        trained = {name for name, p in chain.graph.named_parameters(remove_duplicate=False) if p.requires_grad}
        sizes: dict[int, tuple[int, bool, int]] = {}
        tensors = dict(chain.graph.named_parameters(remove_duplicate=False)) | dict(chain.graph.named_buffers(remove_duplicate=False))
        for i in range(n):
            for name in chain.weights(i, i + 1):
                t = tensors.get(name)
                if t is not None:
                    sizes.setdefault(id(t), (i, name in trained, t.numel() * t.element_size()))
        for i, learned, size in sizes.values():
            (weights if learned else buffers)[i] += size
        norms = np.array([float("batch_norm" in str(o.target)) for o in chain.operations])
        crossing = np.array([chain.crossing_bytes(p) for p in range(n + 1)], dtype=float)
        return cls(tensor, chain, Work.of(chain), summed, sums, weights, buffers, norms, crossing)

    @cached_property
    def trained_bytes(self) -> float:
        """Of all trained weights of the share."""
        return float(self.weights.sum())

    def seconds(self, machine: Machine, batch: float) -> np.ndarray:
        """Of each operation for a micro-batch, forward and backward, with the sums over tensor ranks."""
        return self.work.seconds(machine, batch) + self.summing(machine, batch)

    def summing(self, machine: Machine, batch: float) -> np.ndarray:
        """Of the sums over tensor ranks alone."""
        if self.tensor == 1:
            return np.zeros(len(self.summed))
        moved = ring_bytes(self.summed * batch / self.work.batch, self.tensor)
        return moved / machine.bandwidth + self.sums * messages(self.tensor) * machine.latency_s

    def balance(self, machine: Machine, batch: float, most: int) -> Balance:
        """The cuts into stages for micro-batches of ``batch`` samples."""
        sending = 2 * self.crossing * batch / self.work.batch / machine.bandwidth
        return Balance(self.seconds(machine, batch).tolist(), sending.tolist(), most, places(self.chain))


def ring_bytes(size: np.ndarray | float, ranks: int) -> np.ndarray | float:
    """Bytes that each rank sends in an all-reduce of ``size`` bytes: once around to sum, once to tell."""
    return 2 * (ranks - 1) / ranks * size


def messages(ranks: int) -> float:
    """Messages one after another in an all-reduce of something short: up a tree and down."""
    return 2 * float(np.ceil(np.log2(ranks))) if ranks > 1 else 0.0


def _sums(chain: Chain, choice: Choice | None) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and number of the reductions at each operation: outputs of layers at the end, gradients of what enters those at the beginning."""
    n = len(chain.operations)
    summed, sums = np.zeros(n), np.zeros(n)
    if choice is None:
        return summed, sums
    begins = {p: i for i, u in enumerate(choice.units) for p in u.begins}
    ends = {p for u in choice.units for p in u.ends}
    entered: set[tuple[int, fx.Node]] = set()
    order = {node: i for i, node in enumerate(chain.operations)}
    for i, node in enumerate(chain.operations):
        owners = {str(w.target).rpartition(".")[0] for w in node.all_input_nodes if w.op == "get_attr" and _is_weight(w)}
        if owners & ends:
            summed[i] += size_bytes(node)
            sums[i] += 1
        for owner in owners & begins.keys():
            given = next((a for a in node.all_input_nodes if a.op != "get_attr"), None)
            given = _before_views(given)
            if given in order and (begins[owner], given) not in entered:
                entered.add((begins[owner], given))
                summed[i] += size_bytes(given)
                sums[i] += 1
    return summed, sums


def _is_weight(node: fx.Node) -> bool:
    return len(node.meta["val"].shape) > 1


def _before_views(node: fx.Node | None) -> fx.Node:
    assert node is not None
    while is_view(node) and node.op == "call_function" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
