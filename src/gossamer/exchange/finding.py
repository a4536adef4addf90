"""Which layers of a network others can stand in for: found by running it once, with the reason for each that is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gossamer.errors import SelectorError, TraceError, UsageError, near
from gossamer.exchange.forms import Dims, Layer, bare, dims, walk
from gossamer.plan import apply_structure, replace_module
from gossamer.profiling.runtime import evaluating, first_line
from gossamer.sources.batches import call

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OTHER = "its class computes something else than its base class"


@dataclass(frozen=True)
class Place:
    """A layer that others can stand in for.

    Attributes:
        name: module path.
        layer: the module itself.
        shapes: of its input, for each call.
        dims: of its weight.
        macs: of all calls.
        params: of its weight and bias.
    """

    name: str
    layer: Layer
    shapes: tuple[tuple[int, ...], ...]
    dims: Dims
    macs: int
    params: int


def find_places(
    model: nn.Module, example_inputs: Any, ignore: Sequence[str] = (), *, kinds: type[nn.Module] | UnionType = Layer
) -> tuple[list[Place], list[str]]:
    """Layers that a sequence of layers can stand in for, in the network's order, and one line for each reason why others are left alone.

    A layer is replaced where it is a linear layer or convolution (or a subclass that computes the same on the example inputs) that is called
    with one tensor, wherever it is registered, and whose attributes nobody but itself reads.

    Args:
        model: it is not changed.
        example_inputs: a tuple or dict of inputs.
        ignore: patterns of module paths; what lies below a match is ignored too.

        kinds: of layers that are looked at; the others do not show in the notes.

    Raises:
        SelectorError: a pattern matches no module.
        TraceError: the network fails on the example inputs.
    """
    left: dict[str, list[str]] = {}
    ignored = _ignored(model, ignore)
    chosen: dict[str, Layer] = {}
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | _ConvNd) or not isinstance(module, kinds):
            continue
        reason = "ignored" if name in ignored else _unfit(module, holders)
        if reason is None:
            chosen[name] = module
        else:
            left.setdefault(reason, []).append(name)
    shapes = _watched(model, chosen, example_inputs, left)
    places = []
    for name, seen in shapes.items():
        layer = chosen[name]
        d = dims(layer)
        weight = d.groups * d.outs * d.ins * d.taps
        macs = weight * sum(walk([bare(layer)], shape)[0][1] for shape in seen)
        places.append(Place(name, layer, tuple(seen), d, macs, weight + (d.groups * d.outs if layer.bias is not None else 0)))
    notes = []
    for reason, names in left.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notes.append(
            f"{'' if reason == 'ignored' else 'left alone, '}{reason}: {', '.join(n or 'the network itself' for n in names[:3])}{more}"
        )
    return places, notes


def _ignored(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    names = [n for n, _ in model.named_modules() if n]
    out: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hit = [n for n in names if fnmatchcase(n, pattern)]
        if not hit:
            raise SelectorError(f"ignore={pattern!r} matches no module{near(pattern, names)}")
        out |= {n for n in names if any(n == h or n.startswith(h + ".") for h in hit)}
    return out


def _unfit(module: nn.Module, holders: Counter[int]) -> str | None:
    """Why a layer cannot be replaced, as far as it can be told without running it."""
    if not isinstance(module, _PLAIN):
        return _OTHER
    if any(holders[id(p)] > 1 for p in module._parameters.values() if p is not None):
        return "its parameters are tied to another layer's"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks"
    weight = module.weight
    if not isinstance(weight, Tensor) or isinstance(weight, nn.parameter.UninitializedParameter) or not weight.is_floating_point():
        return "its weight is not a floating-point tensor yet"
    return None


class _Door(nn.Module):
    """Stands in for a layer and writes down how it is used."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.shapes: list[tuple[int, ...]] = []
        self.calls = 0
        self.odd: str | None = None
        inner = layer.forward
        base = next(c for c in _PLAIN if isinstance(layer, c))
        own = type(layer).forward is not base.forward or getattr(type(layer), "_conv_forward", 0) is not getattr(base, "_conv_forward", 0)
        self.plain: Callable[..., Any] | None = base.forward if own else None

        def counted(*args: Any, **kwargs: Any) -> Any:  # no hook: code with a fast path for modules without hooks must take it here
            self.calls += 1
            return inner(*args, **kwargs)

        layer.forward = counted

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            self.odd = "it is called with more than one tensor"
        else:
            self.shapes.append(tuple(args[0].shape))
        out = self.layer(*args, **kwargs)
        if self.plain is not None and self.odd is None and not _same(out, self.plain(self.layer, args[0])):
            self.odd = _OTHER
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            self.odd = "another module reads its weight or its sizes"
            return getattr(super().__getattr__("layer"), name)


def _same(a: Any, b: Any) -> bool:
    """Whether two outputs are equal up to rounding."""
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()) if a.numel() else True


def _watched(
    model: nn.Module, layers: dict[str, Layer], example_inputs: Any, left: dict[str, list[str]]
) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the inputs of those layers that may be replaced; the others go to ``left``."""
    probe = apply_structure(model, [])
    doors = {name: _Door(probe.get_submodule(name)) for name in layers}
    for door in doors.values():
        probe = replace_module(probe, door.layer, door)
    with evaluating(probe):
        try:
            call(probe, example_inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as e:
            raise TraceError(f"the network fails on the example inputs: {first_line(e)}") from e
    found = {}
    for name, door in doors.items():
        reason = door.odd
        if reason is None and not door.calls:
            reason = "it never ran on the example inputs"
        if reason is None and door.calls != len(door.shapes):
            reason = "it is also called from where it is not registered"
        if reason is None:
            found[name] = door.shapes
        else:
            left.setdefault(reason, []).append(name)
    return found


def check_finite(model: nn.Module) -> None:
    """UsageError naming the first parameter that holds NaN or infinity."""
    for name, p in model.named_parameters():
        if p.is_floating_point() and not isinstance(p, nn.parameter.UninitializedParameter) and not bool(torch.isfinite(p.detach()).all()):
            bad = int((~torch.isfinite(p.detach())).sum())
            raise UsageError(f"{name} holds {bad} values that are NaN or infinite: check how it was trained")
