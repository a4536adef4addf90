"""The watcher: a dispatch mode that sees every ATen operation of one forward pass, and carries labels and costs along."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.result import LayerCost
from gossamer.trace._costs import contraction_cost
from gossamer.trace._ledger import Ledger
from gossamer.trace._memory import Timeline
from gossamer.trace._planes import Operand, Planes, varies
from gossamer.trace._sites import Counter, Site, Sites

_ATTRIBUTE = "_gossamer_note"


@dataclass(slots=True)
class Note:
    """What the watcher remembers of a tensor: its planes, the weight it was computed from (where it is one), what it is, and what it blurs if used."""

    watch: Watch
    planes: Planes
    weight: str | None
    what: str
    blurs: tuple[tuple[Tensor, str], ...] = ()


@dataclass(slots=True)
class Call:
    """One operation as rules see it."""

    op: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    outputs: list[Tensor]
    path: str
    weight: str | None
    before: tuple[tuple[int, ...], ...] = ()
    blurs: tuple[tuple[Tensor, str], ...] = ()

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def where(self) -> str:
        """The operation and module, for reasons."""
        return f"{self.op} in {self.path or 'the network itself'}"


@dataclass(frozen=True, slots=True)
class Step:
    """What a trace remembers of one operation, to hold a replay against it.

    Attributes:
        op: its name.
        path: module it ran in.
        inputs: planes of all its operands.
        outputs: planes of each result.
        shapes: shape of each result.
        scalars: the numbers that it computes with.
        numbers: of a slice or split: its arguments, None for the tensor.
        site: index of the call site it ran in; -1 where there is none.
    """

    op: str
    path: str
    inputs: Planes
    outputs: tuple[Planes, ...]
    shapes: tuple[tuple[int, ...], ...]
    scalars: tuple[float, ...] = ()
    numbers: tuple[Any, ...] = ()
    site: int = -1


class _Tracked:
    """A parameter or buffer, and the labels of its dimensions."""

    __slots__ = ("blocks", "labels", "name", "planes", "tensor")

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.labels: dict[int, Tensor] = {}
        self.blocks: dict[int, Tensor] = {}
        self.planes: Planes | None = None


class Watch(TorchDispatchMode):
    """Watches forward passes of one network.

    Args:
        model: the network.
        ledger: where labels are written down; None watches costs only.
        on_step: called with every `Step` before the next operation runs.
        written: of the tensors that Python makes, by number, the dimensions along which labels are written into them.
    """

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger | None,
        on_step: Callable[[Step], None] | None = None,
        written: Mapping[int, set[int]] | None = None,
    ) -> None:
        super().__init__()
        self.labelling = ledger is not None
        self.ledger = ledger if ledger is not None else Ledger()
        self.on_step = on_step
        self.costs: list[LayerCost] = []
        self.used: set[str] = set()
        self.visited: set[str] = set()
        self._paths = {id(m): n for n, m in model.named_modules()}
        self.sites: list[Site] = []
        self._site = -1
        self._counter = Counter()
        self._tracked: dict[int, _Tracked] = {}
        self._by_storage: dict[int, list[_Tracked]] = {}
        self.memory = Timeline(self._by_storage)
        self._noted: list[Tensor] = []
        self._written = written or {}
        self.written: dict[int, set[int]] = {}
        self._blanks: list[StorageWeakRef] = []
        self._blank_at: dict[int, int] = {}
        self._counted: set[str] = set()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tracked = _Tracked(name, tensor)
            self._tracked[id(tensor)] = tracked
            self._by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(tracked)

    # the forward pass ----------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Watch what runs inside, with ``inputs`` as the network's inputs."""
        self._counter = Counter()
        for t in inputs:
            if id(t) not in self._tracked:
                setattr(t, _ATTRIBUTE, Note(self, (), None, "the network's input"))
                self._noted.append(t)
        self.memory.start(inputs)
        before = nn.modules.module.register_module_forward_pre_hook(self._enter)
        after = nn.modules.module.register_module_forward_hook(self._leave, always_call=True)
        try:
            with Sites(self._at_site, self._off_site), self:
                yield
        finally:
            self.memory.finish()
            before.remove()
            after.remove()
            for t in self._noted:
                if hasattr(t, _ATTRIBUTE):
                    delattr(t, _ATTRIBUTE)
            self._noted.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.visited.add(self._counter.enter(self._paths.get(id(module))))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._counter.leave()

    def _at_site(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._site = len(self.sites)
        self.sites.append(self._counter.count(name, args, kwargs))
        return args, kwargs

    def _off_site(self) -> None:
        self._site = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = (tuple(args[0].shape), args[0].stride()) if args and isinstance(args[0], Tensor) and func._schema.is_mutable else ()
        out = func(*args, **kwargs)
        self._after(func, args, kwargs, out, before)
        return out

    def _after(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any, before: tuple[tuple[int, ...], ...]) -> None:
        from gossamer.trace._rules import rule_of, unknown

        name, rule, inplace = rule_of(func)
        tensors = list(_tensors(args))
        if kwargs:
            tensors += _tensors(tuple(kwargs.values()))
        outputs = list(_tensors((out,)))
        call = Call(name, func, args, kwargs, tensors, outputs, self._counter.path, self._weight(tensors), before)
        self.memory.step(name, tensors, outputs[:1] if name in _SIDE_RESULTS else outputs, func)
        contraction = contraction_cost(call)
        if contraction is not None:
            self._charge(call, *contraction)
        if not outputs or not self.labelling:
            if call.weight is not None and not inplace:
                self._note(call, [()] * len(outputs))
            return
        if inplace and self._blank_at:
            self._write(call)
        self._use(call)
        try:
            planes = rule(self, call)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError):  # operands that the rule does not know
            planes = unknown(self, call)
        if not inplace:
            self._note(call, planes)
        if self.on_step is not None:
            inputs = tuple(p for t in tensors for p in self.planes(t)) if any(planes) or any(map(self.planes, tensors)) else ()
            numbers = tuple(None if isinstance(a, Tensor) else a for a in args) if name in _SIZED else ()
            count = 1 if name in _SIDE_RESULTS or name.startswith("_scaled_dot_product") else len(outputs)
            shapes = tuple(tuple(t.shape) for t in outputs[:count])
            self.on_step(Step(name, call.path, inputs, tuple(planes[:count]), shapes, scalars_of(name, args, kwargs), numbers, self._site))

    def _note(self, call: Call, planes: Sequence[Planes]) -> None:
        what = f"the result of {call.op}" if call.tensors else f"a tensor made by {call.op}"
        for t, p in zip(call.outputs, planes, strict=True):
            if id(t) not in self._tracked:
                kept = tuple(q for q in p if q.numel() > 1)
                if not kept and len(call.tensors) and not call.weight:
                    what = self._what(call)
                setattr(t, _ATTRIBUTE, Note(self, kept, call.weight, what, call.blurs))

    def _use(self, call: Call) -> None:
        """A tensor that is reduced over channels blurs them where it is computed with, but not where Python only looks at its value."""
        for t in call.tensors:
            note = self.note(t)
            if note is not None and note.blurs:
                if all(o.dtype == torch.bool for o in call.outputs):
                    call.blurs += note.blurs
                else:
                    self.blur_used(t)

    def blur_used(self, tensor: Tensor) -> None:
        """A tensor's value matters: what it was reduced over is inexact."""
        note = self.note(tensor)
        if note is not None:
            for plane, reason in note.blurs:
                self.ledger.blur(plane, reason)
            note.blurs = ()

    def _what(self, call: Call) -> str:
        """An unlabelled result is called after the unlabelled tensor it came from."""
        for t in call.tensors:
            note = self.note(t)
            if note is not None and not note.planes and note.weight is None:
                return note.what
        return f"the result of {call.where()}"

    # what rules ask ------------------------------------------------------------------------------------------------

    def note(self, tensor: Tensor) -> Note | None:
        """What is known of an activation."""
        note = tensor.__dict__.get(_ATTRIBUTE)
        return note if note is not None and note.watch is self else None

    def tracked(self, tensor: Tensor) -> _Tracked | None:
        """The parameter or buffer that a tensor is, or is an alias of."""
        found = self._tracked.get(id(tensor))
        if found is None and self.note(tensor) is None:
            for candidate in self._by_storage.get(tensor.untyped_storage()._cdata, ()):
                if candidate.tensor.shape == tensor.shape and candidate.tensor.stride() == tensor.stride():
                    return candidate
        return found

    def planes(self, tensor: Tensor) -> Planes:
        """The planes of a tensor; a parameter or buffer gets its labels when it is first asked for them."""
        note = self.note(tensor)
        if note is not None:
            return note.planes
        tracked = self.tracked(tensor)
        return self._planes_of(tracked) if tracked is not None else ()

    def operand(self, tensor: Tensor) -> Operand:
        """A tensor as an operand of `join`."""
        note = self.note(tensor)
        if note is not None:
            shape = tuple(1 if step == 0 else n for n, step in zip(tensor.shape, tensor.stride(), strict=True))  # expanded: as broadcast
            return Operand(shape, note.planes, note.what, note.weight is not None)
        known = self.tracked(tensor) is not None
        return Operand(tuple(tensor.shape), self.planes(tensor), "a tensor that is neither parameter nor buffer", known)

    def labels_of(self, tracked: _Tracked, dim: int) -> Tensor:
        """Labels of one dimension of a parameter or buffer, shape ``(size,)``."""
        if dim not in tracked.labels:
            tracked.labels[dim] = self.ledger.fresh(tracked.name, dim, tracked.tensor.shape[dim])
            tracked.planes = None
        return tracked.labels[dim]

    def blank(self, tensor: Tensor) -> Iterator[Tensor]:
        """Planes of a tensor that Python made: labels that belong to no parameter, along the dimensions that ``written`` names for it."""
        number = len(self._blanks)
        storage = tensor.untyped_storage()
        self._blanks.append(StorageWeakRef(storage))
        self._blank_at[storage._cdata] = number
        for d in self._written.get(number, ()):
            if d < tensor.dim() and tensor.shape[d] > 1:
                view = [1] * tensor.dim()
                view[d] = tensor.shape[d]
                yield self.ledger.fresh("", d, tensor.shape[d]).reshape(view)

    def _write(self, call: Call) -> None:
        """Take note where labelled channels are written into an unlabelled tensor that Python made."""
        target = call.tensors[0]
        number = self._blank_at.get(target.untyped_storage()._cdata)
        if number is None or self._blanks[number].expired() or self.planes(target):
            return
        dims = {target.dim() - p.dim() + d for t in call.tensors[1:] for p in self.planes(t) for d in varies(p)}
        if dims:
            self.written.setdefault(number, set()).update(dims)

    def blocks_of(self, tracked: _Tracked, dim: int, blocks: int) -> Tensor | None:
        """Labels of a dimension that mean other channels in each block of dimension 0; None where it was already labelled otherwise."""
        if dim in tracked.labels or (dim in tracked.blocks and tracked.blocks[dim].shape[0] != blocks):
            return None
        if dim not in tracked.blocks:
            tracked.blocks[dim] = self.ledger.fresh(tracked.name, dim, tracked.tensor.shape[dim], blocks)
        return tracked.blocks[dim]

    def _planes_of(self, tracked: _Tracked) -> Planes:
        if tracked.planes is None:
            tensor, planes = tracked.tensor, []
            if tensor.is_floating_point() and tensor.numel() > 1:
                for d, n in enumerate(tensor.shape):
                    if d in tracked.blocks:
                        blocks = tracked.blocks[d]
                        rows = blocks.repeat_interleave(tensor.shape[0] // blocks.shape[0], 0)
                        view = [1] * tensor.dim()
                        view[0], view[d] = rows.shape
                        planes.append(rows.reshape(view))
                    elif n > 1:
                        view = [1] * tensor.dim()
                        view[d] = n
                        planes.append(self.labels_of(tracked, d).reshape(view))
            tracked.planes = tuple(planes)
        return tracked.planes

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer, or computed from those alone."""
        note = self.note(tensor)
        return note.weight is not None if note is not None else self.tracked(tensor) is not None

    # costs ---------------------------------------------------------------------------------------------------------

    def _weight(self, tensors: Sequence[Tensor]) -> str | None:
        """The weight an operation's result is computed from: the name of its largest parameter where nothing else goes in."""
        best, size, alone = None, -1, True
        for t in tensors:
            name = self.weight_name(t)
            if name is None:
                alone = alone and not t.dim()
            elif t.numel() > size:
                best, size = name, t.numel()
        return best if alone else None

    def weight_name(self, tensor: Tensor) -> str | None:
        """State-dict name of the parameter or buffer a tensor is or was computed from; None for an activation."""
        note = self.note(tensor)
        if note is not None:
            return note.weight
        tracked = self.tracked(tensor)
        if tracked is None:
            return None
        self.used.add(tracked.name)
        return tracked.name

    def _charge(self, call: Call, kind: str, macs: int, weights: Sequence[Tensor | None]) -> None:
        names = [None if t is None else self.weight_name(t) for t in weights]
        params = 0
        for t, name in zip(weights, names, strict=True):
            if t is not None and name is not None and name not in self._counted:
                self._counted.add(name)
                params += t.numel()
        weight = next((n for n, t in zip(names, weights, strict=True) if n is not None and t is not None and t.dim() > 1), None)
        out = call.outputs[0]
        self.costs.append(LayerCost(call.path, kind, weight, macs, params, out.numel() * out.element_size(), tuple(out.shape)))


_SIZED = {"slice", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"}


_SCALING = {"mul", "div", "mul_", "div_"}


def scalars_of(op: str, args: Any, kwargs: dict[str, Any]) -> tuple[float, ...]:
    """The numbers that an operation computes with: real ones, and whole ones where it multiplies or divides (elsewhere they are sizes)."""
    kinds = (float, int) if op in _SCALING else (float,)
    return tuple(a for a in (*args, *kwargs.values()) if isinstance(a, kinds) and not isinstance(a, bool))


_SIDE_RESULTS = {"native_batch_norm", "native_layer_norm", "native_group_norm", "max_pool2d_with_indices", "max_pool3d_with_indices"}


def _tensors(values: Any) -> Iterator[Tensor]:
    for v in values:
        if isinstance(v, Tensor):
            yield v
        elif isinstance(v, tuple | list):
            yield from _tensors(v)
