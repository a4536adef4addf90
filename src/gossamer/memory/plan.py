"""`plan_memory`: what inference takes when its tensors share one buffer, and that buffer's layout."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gossamer.errors import UsageError
from gossamer.memory.arena import Placement, place
from gossamer.memory.kernels import packed
from gossamer.memory.liveness import Life, lives, peak
from gossamer.memory.lowering import build
from gossamer.memory.ordering import best_order, bound_over_orders, reordered
from gossamer.memory.program import Program, View
from gossamer.result import ExampleInputs, Result

if TYPE_CHECKING:
    from gossamer.memory.compiled import ArenaModule
    from gossamer.memory.patches import Patching

ALIGNMENT = 64


@dataclass(frozen=True)
class MemoryPlan:
    """Where every tensor of an inference lies in one buffer, and when.

    Attributes:
        arena_bytes: the buffer: inputs, activations and scratch; weights are not in it.
        lower_bound_bytes: the largest sum of bytes that live together in the plan's order; no arena can be smaller in this order.
        any_order_bound_bytes: below this no order of the same steps can be.
        given_order_bytes: ``lower_bound_bytes`` of the order in which the network computes.
        no_reuse_bytes: all tensors of the captured graph, each with memory of its own.
        input_bytes: of them, the inputs.
        optimal: whether no arena for this order can be smaller.
        method: what found the addresses: ``"greedy"``, ``"search"`` or ``"integer program"``.
        lives, offsets: stretches of memory and their addresses.
        program: the steps.
        outside: step -> bytes it takes from the allocator while it runs, because torch has no kernel for it that writes into an arena.
        patching: the patches of the first stage, or None.
        notes: one line where something could not be done.
        alignment: bytes that every address is a multiple of.
        signature: shapes of the inputs.
    """

    arena_bytes: int
    lower_bound_bytes: int
    any_order_bound_bytes: int
    given_order_bytes: int
    no_reuse_bytes: int
    input_bytes: int
    optimal: bool
    method: str
    lives: tuple[Life, ...]
    offsets: tuple[int, ...]
    program: Program
    outside: dict[str, int]
    patching: Patching | None
    notes: tuple[str, ...]
    alignment: int
    signature: tuple[Any, ...]
    _source: _Source

    @property
    def outside_bytes(self) -> int:
        """The most that one step takes from the allocator beside the arena."""
        return max(self.outside.values(), default=0)

    def compile(self) -> ArenaModule:
        """A module that computes what the network does, inside one preallocated buffer.

        Examples:
            >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
            >>> x = torch.rand(1, 3, 16, 16)
            >>> small = plan_memory(net, (x,)).compile()
            >>> torch.allclose(small(x), net(x), atol=1e-5), small(torch.rand(4, 3, 16, 16)).shape
            (True, torch.Size([4, 2]))
        """
        from gossamer.memory.compiled import ArenaModule

        return ArenaModule(self)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, for other runtimes: sizes, addresses and lifetimes of all tensors, and the steps in order."""
        from gossamer.memory.showing import as_json

        return as_json(self)

    def picture(self, path: str | Path) -> Path:
        """Draw the plan, time by address, one rectangle a tensor, into a PNG, SVG or PDF file."""
        from gossamer.memory.showing import draw

        return draw(self, Path(path))

    def __str__(self) -> str:
        from gossamer.memory.showing import as_table

        return as_table(self)

    @property
    def output_spec(self) -> Any:
        """How the network's outputs are nested."""
        return self._source.graph.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]

    def leaves(self, args: Any, kwargs: Any) -> list[Any]:
        """A call's inputs in the graph's order."""
        names = self._source.names
        if names is not None:
            missing = [n for n in names if n not in kwargs]
            if args or missing or len(kwargs) != len(names):
                raise UsageError(f"the network was planned with keyword inputs {', '.join(names)}: give exactly these")
            kwargs = {n: kwargs[n] for n in names}
        found = pytree.tree_leaves((args, kwargs))
        if len(found) != len(self.signature):
            raise UsageError(f"the network was planned for {len(self.signature)} inputs, not {len(found)}")
        return found

    def for_inputs(self, values: list[Any]) -> MemoryPlan:
        """The plan for inputs of another batch size.

        Raises:
            UsageError: something else than the batch size differs.
            ExportError: the network cannot be captured at that batch size.
        """
        for old, new in zip(self.signature, values, strict=True):
            shape = tuple(new.shape) if isinstance(new, Tensor) else new
            if shape != old and not (isinstance(old, tuple) and isinstance(shape, tuple) and old[1:] == shape[1:] and old):
                raise UsageError(f"the network was planned for an input {old}, not {shape}: only the batch size may differ; plan again")
        source = self._source
        if source.static is not None:
            from gossamer.trace.capture import capture

            inputs = dict(zip(source.names, values, strict=True)) if source.names is not None else tuple(values)
            source = replace(source, graph=capture(source.static, inputs))
        return _plan(source, values)

    def packed(self) -> MemoryPlan:
        """The same plan with weights laid out for the kernels."""
        with torch.no_grad():
            return replace(self, program=_packed(self.program))


@dataclass(frozen=True)
class _Source:
    """What a plan was made from."""

    graph: fx.GraphModule
    names: tuple[str, ...] | None
    inplace: bool
    reorder: bool
    patches: Any
    ram_budget: int | None
    static: nn.Module | None = None  # where the graph holds for one batch size only


def plan_memory(
    model: nn.Module | Result,
    example_inputs: ExampleInputs = None,
    *,
    inplace: bool = True,
    reorder: bool = True,
    patches: str | tuple[int, int] | None = None,
    ram_budget: int | str | None = None,
) -> MemoryPlan:
    """Plan the memory of inference: which tensors share addresses, in which order the steps run, in how small a buffer.

    Batch norm is folded, views take nothing, a residual is added where it lies, what a concatenation reads is made in its slice.
    With ``patches`` the first stage runs patch by patch, each with the border of pixels that its convolutions look at.

    Examples:
        >>> import gossamer as gs
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
        >>> plan = gs.plan_memory(net, (torch.zeros(1, 3, 32, 32),))
        >>> plan.arena_bytes, plan.lower_bound_bytes, plan.optimal  # 16 and 4 channels of 32 x 32 in float32
        (81920, 81920, True)

    Args:
        model: a network, or a `Result`. It is captured in eval mode and left as it is.
        example_inputs: a tuple of positional inputs, or a dict of keyword inputs; a `Result` brings its own.
        inplace: whether outputs may be written over inputs that nothing reads afterwards.
        reorder: whether steps may run in another order where that lowers the peak.
        patches: None; ``"auto"``, the grid and stage with the smallest arena at no more than 15% more multiply-adds; or a grid, ``(4, 4)``.
        ram_budget: bytes of the arena, or ``"1.5MB"``: the patches with the fewest recomputed multiply-adds that fit. Without
            ``patches``, they are used where the budget needs them.

    Returns:
        A `MemoryPlan`; it prints as a table, and ``compile()`` runs it.

    Raises:
        ExportError: the network cannot be captured as one graph.
        TraceError: the network fails on the example inputs.
        BudgetError: no patches fit ``ram_budget``; says the smallest arena.
        NothingToDo: ``patches`` were asked for, and no stage can be run so.

    Source:
        Greedy by size: Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020. Reordering: Ahn et al.,
        "Ordering Chaos" (SERENITY), MLSys 2020. Patches: Lin et al., "MCUNetV2", NeurIPS 2021.
    """
    from gossamer.memory.patches import parse_bytes, parse_patches
    from gossamer.sources.batches import check_inputs
    from gossamer.trace.capture import capture

    network = model
    if isinstance(model, Result):
        network = model.model
        example_inputs = model.example_inputs if example_inputs is None else example_inputs
    if not isinstance(network, nn.Module):
        raise UsageError(f"plan_memory takes a torch.nn.Module or a Result, not {type(network).__name__}")
    if example_inputs is None:
        raise UsageError("plan_memory needs example_inputs, for example (torch.zeros(1, 3, 224, 224),)")
    away = next((n for n, p in (*network.named_parameters(), *network.named_buffers()) if p.device.type != "cpu"), None)
    if away is not None:
        raise UsageError(f"{away} is not on the CPU: plan_memory plans for the CPU, so move the network with .cpu()")
    inputs = check_inputs(example_inputs)
    grid, budget = parse_patches(patches), parse_bytes(ram_budget)
    graph = capture(network, inputs)
    names = tuple(inputs) if isinstance(inputs, dict) else None
    values = pytree.tree_leaves(((), inputs) if names is not None else (inputs, {}))
    static = None if graph.meta["dynamic_batch"] else copy.deepcopy(network)
    return _plan(_Source(graph, names, inplace, reorder, grid, budget, static), values)


def _plan(source: _Source, values: list[Any]) -> MemoryPlan:
    """Plan a captured graph for inputs of these sizes: steps, order, addresses, patches."""
    from gossamer.memory.patches import patched

    program, naive = build(source.graph, values, inplace=source.inplace)
    steps = len(program.steps)
    given = peak(lives(program, inplace=source.inplace, alignment=ALIGNMENT), steps)
    if source.reorder:
        ordering = best_order(program, inplace=source.inplace, alignment=ALIGNMENT)
        program = reordered(program, ordering.order)
        any_order = ordering.peak if ordering.exact else ordering.bound
    else:
        any_order = bound_over_orders(program, inplace=source.inplace, alignment=ALIGNMENT)
    found, placed = _placed(program, source.inplace)
    patching = None
    if source.patches is not None or (source.ram_budget is not None and placed.size > source.ram_budget):
        program, patching = patched(program, source.patches, source.ram_budget, inplace=source.inplace, without=placed.size)
        found, placed = _placed(program, source.inplace)
        any_order = min(any_order, peak(found, len(program.steps)))
    inside = {v.buffer: program.sizes[v.buffer] for v in program.inputs if isinstance(v, View)}
    return MemoryPlan(
        arena_bytes=placed.size,
        lower_bound_bytes=peak(found, len(program.steps)),
        any_order_bound_bytes=any_order,
        given_order_bytes=given,
        no_reuse_bytes=naive,
        input_bytes=sum(inside.values()),
        optimal=placed.optimal,
        method=placed.method,
        lives=tuple(found),
        offsets=placed.offsets,
        program=program,
        outside=_outside(program),
        patching=patching,
        notes=tuple(source.graph.meta["notes"]),
        alignment=ALIGNMENT,
        signature=tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in values),
        _source=source,
    )


def _packed(program: Program) -> Program:
    """The program, stages in patches included, with convolutions' weights as their kernels want them."""
    steps = []
    for step in program.steps:
        if step.kernel == "patches":
            inner = step.options["inner"]
            step = step.with_options(inner=replace(inner, program=_packed(inner.program)))
        steps.append(packed(step) if step.kernel == "convolution" else step)
    return replace(program, steps=tuple(steps))


def _outside(program: Program) -> dict[str, int]:
    """The most bytes that each step takes beside the arena, by its name."""
    found: dict[str, int] = {}
    for step in program.steps:
        if step.outside:
            name = f"{step.name} ({step.options['func']._schema.name.partition('::')[2]})"
            found[name] = max(found.get(name, 0), step.outside)
    return found


def _placed(program: Program, inplace: bool) -> tuple[list[Life], Placement]:
    """Lifetimes in a program's order, and their addresses."""
    found = lives(program, inplace=inplace, alignment=ALIGNMENT)
    return found, place(found, peak(found, len(program.steps)))
