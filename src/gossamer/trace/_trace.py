"""Tracing: one forward pass in eval mode, watched; labels become classes, and costs come along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.adapters import free_attention
from gossamer.errors import TraceError, UsageError, near
from gossamer.result import ExampleInputs, Profile
from gossamer.sources.batches import call, check_inputs, outputs
from gossamer.trace._classes import Classes, has_free_rows, resolve
from gossamer.trace._ledger import Ledger
from gossamer.trace._sites import Site
from gossamer.trace._watch import Step, Watch
from gossamer.trace.channels import ChannelMap


@dataclass(frozen=True)
class Trace:
    """What one watched forward pass says about a network.

    Attributes:
        channels: which channels belong together, and what is frozen.
        profile: what it costs.
        example_inputs: what it was traced with.
        classes: resolved labels; for surgery.
        steps: every operation with the labels that went through it; for surgery.
        sites: every call in which Python code passed numbers; for surgery.
        declared: module path -> labels of the size it declares (norms); for surgery.
    """

    channels: ChannelMap
    profile: Profile
    example_inputs: ExampleInputs
    classes: Classes = field(repr=False)
    steps: tuple[Step, ...] = field(repr=False)
    sites: tuple[Site, ...] = field(repr=False, default=())
    declared: dict[str, Any] = field(repr=False, default_factory=dict)
    ledger: Ledger = field(repr=False, default_factory=Ledger)

    def loose(self) -> ChannelMap | None:
        """The channel map without regularity, where rows of channels (groups, halves) lose equally many and could each choose which."""
        return resolve(self.ledger, regular=False).channels if has_free_rows(self.ledger, self.classes) else None

    def reordered(self, loose: ChannelMap, scores: Tensor) -> Trace:
        """The same trace with rows coupled by importance instead of by position, where that leaves as much choice.

        The least important channel of one row then leaves with the least important of each other row: never a larger loss than by position.

        Args:
            loose: from `loose`.
            scores: importance of its classes, shape ``(loose.num_classes,)``.
        """
        of = resolve(self.ledger, regular=False).of
        value = np.concatenate([scores.double().numpy(), [0.0]])[of]  # label 0 has class -1
        classes = resolve(self.ledger, order=value)
        if sum(len(g.classes) for g in classes.channels.groups) < sum(len(g.classes) for g in self.channels.groups):
            return self
        classes = replace(classes, channels=replace(classes.channels, unvisited=self.channels.unvisited))
        return replace(self, channels=classes.channels, classes=classes)


ATTENTION = ("heads", "head_dim")
"""What leaves an attention: whole heads, or the same positions of all heads."""


def trace(model: nn.Module, example_inputs: ExampleInputs, *, attention: str = "heads") -> Trace:
    """Watch one forward pass: which channels belong together, what cannot be pruned and why, what each layer costs.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 2))
        >>> traced = trace(net, (torch.zeros(1, 3, 8, 8),))
        >>> [(g.name, len(g.classes)) for g in traced.channels.groups], traced.profile.macs
        ([('0', 8), ('2', 4)], 9216)

    Args:
        model: the network; it is left as it is, mode, buffers and random state included.
        example_inputs: a tuple of positional inputs, or a dict of keyword inputs.
        attention: what can leave an attention: ``"heads"`` (whole ones), or ``"head_dim"`` (the same positions of all of them).

    Returns:
        A `Trace`; the same network and inputs give the same class ids.

    Raises:
        TraceError: the forward pass fails on the inputs.
        UsageError: another value of ``attention``.
    """
    if attention not in ATTENTION:
        raise UsageError(f"attention={attention!r}: known are {', '.join(ATTENTION)}{near(str(attention), ATTENTION)}")
    example_inputs = check_inputs(example_inputs)
    columns = attention == "head_dim"
    ledger, steps, watch, out = _watched(model, example_inputs, {}, columns)
    if watch.written:  # tensors that are filled part by part: once more, with labels for those
        ledger, steps, watch, out = _watched(model, example_inputs, watch.written, columns)
    sites = tuple(watch.sites)
    _freeze_outputs(watch, ledger, out)
    profile = _profile(model, watch)
    unvisited = _watch_unvisited(model, example_inputs, watch, ledger)
    classes = resolve(ledger)
    classes = replace(classes, channels=replace(classes.channels, unvisited=unvisited))
    return Trace(classes.channels, profile, example_inputs, classes, tuple(steps), sites, ledger.declared, ledger)


def _watched(
    model: nn.Module, example_inputs: ExampleInputs, written: dict[int, set[int]], columns: bool
) -> tuple[Ledger, list[Step], Watch, Any]:
    ledger, steps = Ledger(columns=columns), list[Step]()
    watch = Watch(model, ledger, steps.append, written)
    return ledger, steps, watch, _run(model, example_inputs, watch)


def _freeze_outputs(watch: Watch, ledger: Ledger, out: Any) -> None:
    for t in outputs(out):
        watch.blur_used(t)
        for plane in watch.planes(t):
            ledger.freeze(plane, "the network's output")


def _watch_unvisited(model: nn.Module, example_inputs: ExampleInputs, watch: Watch, ledger: Ledger) -> dict[str, str]:
    """Watch modules that run only in train mode (auxiliary heads) in a second pass; returns those that no pass reaches, with the reason."""

    def left() -> list[str]:
        return [
            n
            for n, m in model.named_modules()
            if n not in watch.visited
            and any(True for _ in m.parameters(recurse=False))
            and not any(f"{n}.{p}" in watch.used for p, _ in m.named_parameters(recurse=False))  # its weights, used without calling it
        ]

    if not left():
        return {}
    watch.on_step = None
    reason = "runs neither in eval nor in train mode"
    try:
        _freeze_outputs(watch, ledger, _run(model, example_inputs, watch, training=True))
    except TraceError as e:
        reason = f"does not run in eval mode, and train mode cannot be watched: {e}"
    return dict.fromkeys(left(), reason)


def channels(model: nn.Module, example_inputs: ExampleInputs, *, attention: str = "heads") -> ChannelMap:
    """Which channels of a network live and die together, and which must stay and why.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = channels(net, (torch.zeros(1, 4),))
        >>> [g.name for g in found.groups], [(g.name, g.frozen) for g in found.frozen][-1]
        (['0'], ('2', "the network's output"))

    Args:
        model: the network; it is left as it is.
        example_inputs: a tuple of positional inputs, or a dict of keyword inputs.
        attention: what can leave an attention: ``"heads"``, or ``"head_dim"`` (the same positions of all heads).

    Returns:
        A `ChannelMap`; it prints as a table.

    Raises:
        TraceError: the forward pass fails on the inputs.
        UsageError: another value of ``attention``.
    """
    return trace(model, example_inputs, attention=attention).channels


def costs(model: nn.Module, example_inputs: ExampleInputs) -> Profile:
    """What a network costs, without labels: see `gossamer.profile`."""
    example_inputs = check_inputs(example_inputs)
    watch = Watch(model, None)
    _run(model, example_inputs, watch)
    return _profile(model, watch)


def _run(model: nn.Module, example_inputs: ExampleInputs, watch: Watch, *, training: bool = False) -> Any:
    values = example_inputs.values() if isinstance(example_inputs, dict) else example_inputs
    leaves = [t for t in torch.utils._pytree.tree_leaves(tuple(values)) if isinstance(t, Tensor)]
    with plain_forward(model, training=training):
        try:
            with free_attention(model), watch.watching(leaves):
                return call(model, example_inputs)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as e:
            shapes = ", ".join(str(tuple(t.shape)) for t in leaves)
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise TraceError(f"the network fails on example inputs of shape {shapes}: {reason}") from e


@contextmanager
def plain_forward(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Eval mode (or train mode), no gradients, no fused fast path, a random state of its own; everything is put back.

    Modules that keep tensors between passes (biases looked up once for eval mode) drop them when they change modes, so both modes are entered.
    """
    modules = list(model.modules())
    modes = [m.training for m in modules]
    buffers = [(m, n, b, b.clone()) for m in modules for n, b in m._buffers.items() if b is not None]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for mode in (not training, training):
        _enter_mode(model, modules, mode)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.no_grad():
            for m, name, buffer, value in buffers:
                if not torch.equal(buffer, value):  # a batch norm in train mode leaves the version as it is
                    buffer.copy_(value)
                m._buffers[name] = buffer
        _enter_mode(model, modules, True)
        for m, training in zip(modules, modes, strict=True):
            m.__dict__["training"] = training


def _enter_mode(model: nn.Module, modules: Sequence[nn.Module], training: bool) -> None:
    """As `nn.Module.train` does; without its cost for every attribute where no module has a way of its own."""
    if any(type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval for m in modules):
        model.train(training)
        return
    for m in modules:
        m.__dict__["training"] = training


def _profile(model: nn.Module, watch: Watch) -> Profile:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    integers = {n for n, b in model.named_buffers() if not b.is_floating_point()}  # weights of a quantised network
    return Profile(
        params=sum(p.numel() for p in model.parameters()) + sum(layer.params for layer in watch.costs if layer.weight in integers),
        macs=sum(layer.macs for layer in watch.costs),
        weight_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        peak_activation_bytes=watch.memory.peak(),
        layers=tuple(watch.costs),
    )
