"""The arena for ExecuTorch: addresses of a program's tensors, given through its memory-planning hook.

ExecuTorch fixes the order of operations and says when each tensor is alive; what is decided here is which outputs lie on inputs that end, and every address.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx

from gossamer.errors import UsageError
from gossamer.memory.arena import place
from gossamer.memory.liveness import Life, peak

POINTWISE: Mapping[str, tuple[int, ...]] = {
    **{
        f"aten::{name}": (0,)
        for name in (
            "abs", "clamp", "elu", "exp", "gelu", "hardtanh", "leaky_relu", "log", "neg", "pow", "reciprocal", "relu", "rsqrt", "sigmoid", "sqrt", "tanh",
            "_native_batch_norm_legit_no_training", "native_layer_norm", "_softmax",
        )
    },
    **{f"aten::{name}": (0, 1) for name in ("add", "div", "maximum", "minimum", "mul", "sub")},
}  # fmt: skip
"""Operations whose kernels read an element, or a row, before they write it, and the inputs that their first output may lie on."""
INSTALL = "pip install 'gossamer[executorch]'"


def executorch_memory(*, inplace: bool = True, **options: Any) -> Any:
    """ExecuTorch's memory-planning pass with this package's planner in place of its greedy one.

    Give it to ``ExecutorchBackendConfig(memory_planning_pass=...)``. Its planned buffer is never larger than the one of ExecuTorch's greedy planner, and
    with ``inplace`` usually much smaller: outputs of operations element by element lie on inputs that end there.

    Args:
        inplace: whether outputs may lie on inputs. ExecuTorch's portable and optimised kernels read an element before they write it; give False for a
            device's own kernels that do not.
        options: of ExecuTorch's ``MemoryPlanningPass``, ``alloc_graph_input=False`` for example.

    Returns:
        A ``MemoryPlanningPass``.

    Raises:
        UsageError: ExecuTorch is not installed.
    """
    from gossamer.trace.capture import quiet

    try:
        with quiet():
            from executorch.exir.passes import MemoryPlanningPass
    except ImportError:
        raise UsageError(f"ExecuTorch is not installed: {INSTALL}") from None
    planner = partial(plan_addresses, inplace=inplace)
    return MemoryPlanningPass(planner, allow_lifetime_and_storage_overlap=inplace, **options)


def plan_addresses(
    alignment: int, specs: Iterable[Any], graph_module: Any, graph_signature: Any = None, extra_padding: int = 0, *, inplace: bool = True
) -> list[int]:
    """Give every tensor an address: what ExecuTorch calls a memory-planning algorithm.

    Args:
        alignment: bytes that addresses are multiples of.
        specs: tensors to place, with lifetimes; ``mem_id``, ``mem_obj_id`` and ``mem_offset`` are set.
        graph_module: the program, whose nodes are what lifetimes count.
        graph_signature: not read.
        extra_padding: bytes added to every buffer.
        inplace: whether outputs may lie on inputs that end.

    Returns:
        Bytes of each buffer; number 0 is that of constants, which are not planned.
    """
    planned = list(dict.fromkeys(specs))
    for spec in planned:
        spec.realign(alignment)
        spec.mem_id = 1 if spec.mem_id is None else spec.mem_id
    taken = getattr(graph_module, "input_mem_buffer_sizes", None) or []
    sizes = [0] * max(2, len(taken), *(s.mem_id + 1 for s in planned))
    for number in sorted({s.mem_id for s in planned}):
        start = taken[number] if number < len(taken) else 0  # what control flow inside the program takes
        sizes[number] = start + _place(alignment, [s for s in planned if s.mem_id == number], graph_module, start, inplace) + extra_padding
    return sizes


def _place(alignment: int, specs: list[Any], module: Any, start: int, inplace: bool) -> int:
    """Set the addresses of one buffer's tensors, from ``start``; return the bytes they take."""
    own = [s for s in specs if getattr(s, "storage_base", None) is None]
    over = _overwritten(module.graph, {id(s) for s in own}) if inplace else {}
    chains = _chains(own, over)
    lives = [
        Life(str(i), (i,), max(s.allocated_memory for s in chain), min(s.lifetime[0] for s in chain), max(s.lifetime[1] for s in chain))
        for i, chain in enumerate(chains)
    ]
    bound = peak(lives, 1 + max((life.last for life in lives), default=0))
    placed = place([life for life in lives if life.size], bound)
    offsets = iter(placed.offsets)
    for chain, life in zip(chains, lives, strict=True):
        offset = start + (next(offsets) if life.size else 0)
        for spec in chain:
            spec.mem_offset, spec.mem_obj_id = offset, 0
    for spec in specs:
        offset, base = 0, spec
        while getattr(base, "storage_base", None) is not None:
            offset, base = offset + base.storage_base_offset, base.storage_base
        if base is not spec:
            assert base.mem_offset is not None and (base.mem_offset + offset) % alignment == 0
            spec.mem_offset, spec.mem_obj_id = base.mem_offset + offset, 0
    return placed.size


def _chains(specs: list[Any], over: Mapping[int, int]) -> list[list[Any]]:
    """Tensors that follow each other in one place."""
    chains: dict[int, list[Any]] = {}
    for spec in specs:
        root = id(spec)
        while root in over:
            root = over[root]
        chains.setdefault(root, []).append(spec)
    return list(chains.values())


def _overwritten(graph: fx.Graph, planned: set[int]) -> dict[int, int]:
    """For each tensor that can lie on an input of the operation that makes it, that input; both by identity."""
    over: dict[int, int] = {}
    taken: set[int] = set()
    for now, node in enumerate(graph.nodes):
        positions = POINTWISE.get(_schema_name(node))
        out = _first_output(node) if positions else None
        if positions is None or out is None or id(out) not in planned or not _static(out):
            continue
        reads = [_Read.of(a) for a in _arguments(node)]
        ends = [r for r in reads if r is not None]
        for position in positions:
            read = _Read.of(node.args[position]) if position < len(node.args) else None
            if read is None or id(read.base) not in planned or id(read.base) in taken or read.base is out:
                continue
            same = all(_alike(r.seen, out) for r in ends if r.base is read.base)
            if same and _static(read.base) and read.base.lifetime[1] == now and read.base.mem_id == out.mem_id:
                over[id(out)] = id(read.base)
                taken.add(id(read.base))
                break
    return over


@dataclass(frozen=True)
class _Read:
    """What a node reads: the tensor that is stored, and how it looks through views."""

    base: Any
    seen: Any

    @classmethod
    def of(cls, node: Any) -> _Read | None:
        """What a node reads there; None where it is no tensor."""
        if not isinstance(node, fx.Node) or not hasattr(node.meta.get("spec"), "lifetime"):
            return None
        base = node
        while getattr(base.target, "__name__", "") == "view" and base.args and isinstance(base.args[0], fx.Node):
            base = base.args[0]
        return cls(base.meta["spec"], node.meta["spec"])


def _arguments(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes that an operation reads; where it writes is not among them."""
    outs = {id(v) for k, v in node.kwargs.items() if k.startswith("out")}
    return (n for n in node.all_input_nodes if id(n) not in outs)


def _schema_name(node: fx.Node) -> str:
    """Name of an operation that writes into a given place, ``"aten::add"``; ``""`` for any other node."""
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None and any(k.startswith("out") for k in node.kwargs) else ""


def _first_output(node: fx.Node) -> Any:
    """Where an operation writes its first output; None where that is not a tensor of its own."""
    where = node.kwargs.get("out", node.kwargs.get("out0"))
    return where.meta.get("spec") if isinstance(where, fx.Node) else None


def _static(spec: Any) -> bool:
    """Whether the size is known before the program runs."""
    return int(spec.shape_dynamism) == 0


def _alike(a: Any, b: Any) -> bool:
    """Whether two tensors have the same elements in the same places."""
    return a.scalar_type == b.scalar_type and list(a.shape) == list(b.shape) and tuple(a.dim_order) == tuple(b.dim_order)
