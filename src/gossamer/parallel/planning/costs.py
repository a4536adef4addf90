"""What an operation costs: counted from shapes, or measured. The one model that cutting a pipeline and planning share."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from gossamer.parallel.pipeline.chain import Chain, size_bytes

BACKWARD = 2.0
"""Times the forward pass that a backward pass takes: one product for the inputs, one for the weights."""


@dataclass(frozen=True)
class Machine:
    """What each process has.

    Attributes:
        flops: floating-point operations a second that contractions reach; one multiply-add is two.
        memory_bandwidth: bytes a second between its processor and its memory.
        bandwidth: bytes a second between two processes, in one direction.
        latency_s: seconds that a message takes however short it is.
        memory_bytes: of one process, or None where it does not matter.
        launch_s: seconds that an operation takes however little it does.
        overlap: fraction of a backward pass during which gradients travel unnoticed, in [0, 1].
    """

    flops: float = 1e13
    memory_bandwidth: float = 1e12
    bandwidth: float = 25e9
    latency_s: float = 20e-6
    memory_bytes: int | None = None
    launch_s: float = 5e-6
    overlap: float = 0.0


def flops_of(node: fx.Node) -> int:
    """Floating-point operations of a contraction, forward; 0 of anything else."""
    packet = getattr(node.target, "overloadpacket", None)
    args, kwargs = pytree.tree_map(lambda a: a.meta.get("val") if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
    out: Any = node.meta.get("val")
    if packet is torch.ops.aten.linear:
        return 2 * int(out.numel()) * int(args[1].shape[-1])
    if packet is torch.ops.aten.matmul:
        return 2 * int(out.numel()) * int(args[0].shape[-1])
    if packet is torch.ops.aten.einsum:
        terms = zip(args[1], args[0].split("->")[0].split(","), strict=True)
        sizes = {letter: size for t, term in terms for letter, size in zip(term.strip(), t.shape, strict=True)}
        return 2 * math.prod(sizes.values())
    if packet in _CONVOLUTIONS:
        x, w = args[0], args[1]
        transposed = "transpose" in str(packet)
        return 2 * int((x if transposed else out).numel()) * math.prod(w.shape[1:])
    if packet is torch.ops.aten.scaled_dot_product_attention:
        q, k, v = args[:3]
        return 2 * int(q.numel()) * int(k.shape[-2]) + 2 * int(out.numel()) * int(v.shape[-2])
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=out)) if count is not None else 0


_CONVOLUTIONS = {
    getattr(torch.ops.aten, name)
    for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
}


def is_view(node: fx.Node) -> bool:
    """Whether an operation only looks at its operand another way."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


@dataclass(frozen=True)
class Work:
    """What each operation of a chain does in one forward pass, as arrays over the operations.

    Attributes:
        batch: samples that the chain was made for.
        flops: of contractions.
        moved: bytes of activations read and written.
        weighed: bytes of weights read.
        kept: bytes of results that the backward pass needs: those of all operations but views and what was written in place.
    """

    batch: int
    flops: np.ndarray
    moved: np.ndarray
    weighed: np.ndarray
    kept: np.ndarray

    @classmethod
    def of(cls, chain: Chain) -> Work:
        """Count it."""
        rows = []
        for n in chain.operations:
            view = is_view(n)
            operands = [size_bytes(i) for i in n.all_input_nodes if i.op != "get_attr"]
            weights = [size_bytes(i) for i in n.all_input_nodes if i.op == "get_attr"]
            kept = 0 if view or n.meta.get("in_place") else size_bytes(n)
            rows.append((flops_of(n), 0 if view else size_bytes(n) + sum(operands), 0 if view else sum(weights), kept))
        flops, moved, weighed, kept_ = np.array(rows, dtype=float).reshape(-1, 4).T
        first = next((n.meta["val"] for n in chain.inputs if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dim()), None)
        return cls(len(first) if first is not None else 1, flops, moved, weighed, kept_)

    def seconds(self, machine: Machine, batch: float | None = None) -> np.ndarray:
        """Seconds of each operation, forward and backward: the longer of computing and moving its bytes, and starting it.

        Args:
            machine: what a process has.
            batch: samples; default: those of the chain.
        """
        scale = 1.0 if batch is None else batch / self.batch
        moving = (self.moved * scale + self.weighed) / machine.memory_bandwidth
        starting = machine.launch_s * (self.moved > 0)
        seconds: np.ndarray = (1 + BACKWARD) * (np.maximum(self.flops * scale / machine.flops, moving) + starting)
        return seconds


def predicted_seconds(chain: Chain, machine: Machine) -> list[float]:
    """Seconds of each operation, forward and backward: the longer of computing and moving its bytes.

    Examples:
        >>> from gossamer.parallel.pipeline.chain import chain_of
        >>> chain = chain_of(torch.nn.Linear(100, 10), (torch.zeros(50, 100),))
        >>> [round(1e6 * s) for s in predicted_seconds(chain, Machine(flops=1e9, memory_bandwidth=1e12, launch_s=0.0))]
        [300]

    Args:
        chain: of a network, for one micro-batch.
        machine: what a process has.
    """
    return [float(s) for s in Work.of(chain).seconds(machine)]


def measured_seconds(chain: Chain, inputs: list[Tensor], rounds: int = 3) -> list[float]:
    """Seconds of each operation on this machine: the fastest of several forward passes, times what a backward pass adds.

    Args:
        chain: of a network; its buffers are put back.
        inputs: of one micro-batch, flat.
        rounds: forward passes.
    """
    best: dict[fx.Node, float] = {}
    kept = [(b, b.clone()) for b in chain.graph.buffers()]

    waits = any(t.is_cuda for t in inputs)

    class Timed(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            started = time.perf_counter()
            out = super().run_node(n)
            if waits:
                torch.cuda.synchronize()
            best[n] = min(best.get(n, math.inf), time.perf_counter() - started)
            return out

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for _ in range(rounds):
            Timed(chain.graph).run(*inputs, enable_io_processing=False)
        for buffer, value in kept:
            buffer.copy_(value)
    return [(1 + BACKWARD) * best[n] for n in chain.operations]
