"""Cutting: from removed classes to a smaller network that was run, and proved; what cannot be cut is frozen, and the rest goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import NothingToDo, ProofError
from gossamer.plan import SetAttribute, StructureEdit, apply_structure
from gossamer.result import Proof
from gossamer.surgery.edits import attention_edits, attribute_edits, keep_edits
from gossamer.surgery.prediction import Prediction
from gossamer.surgery.proof import prove
from gossamer.surgery.repair import Repair, attribute_guesses, call_edits, size, whole_numbers
from gossamer.surgery.replay import Divergence, classes_through, first_divergence
from gossamer.trace import Trace

_ROUNDS = 40  # each freezes at least one class that was to be removed
_BEFORE = 4  # steps before a refusal in which the size that was refused may have been made
_PATIENCE = 3  # attempts after which what fails in one module is left in in all modules of its class


@dataclass(frozen=True)
class Cut:
    """A cut network.

    Attributes:
        model: the new network, in the mode of the original.
        edits: `apply_structure(original, edits)` gives its structure.
        proof: comparison with the zeroed original.
        removed: bool, shape ``(num_classes,)``: what really went.
        frozen: bool, shape ``(num_classes,)``: what was found not to be removable.
        notes: one line for each thing that was left alone.
    """

    model: nn.Module
    edits: tuple[StructureEdit, ...]
    proof: Proof
    removed: Tensor
    frozen: Tensor
    notes: tuple[str, ...] = ()


def cut(model: nn.Module, traced: Trace, removed: Tensor) -> Cut:
    """Remove classes from a copy of a network, run it, and prove it against the zeroed original.

    Where the cut network fails or sees other shapes than the labels predict, the classes that go through the operation in question are
    left in, with the reason, and the rest is cut again.

    Examples:
        >>> from gossamer.trace import trace
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
        >>> traced = trace(net, (torch.ones(1, 4),))
        >>> removed = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
        >>> removed[traced.channels.groups[0].classes[:2]] = True
        >>> made = cut(net, traced, removed)
        >>> made.model[0].out_features, made.proof.holds
        (4, True)

    Args:
        model: the source network; it is not changed.
        traced: its trace.
        removed: bool, shape ``(num_classes,)``; frozen classes among them stay.

    Returns:
        A `Cut`.

    Raises:
        NothingToDo: nothing is left to remove; it says why.
        ProofError: the network still computes something else with everything suspicious left in.
    """
    allowed = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    for group in traced.channels.groups:
        allowed[group.classes] = True
    removed = removed.cpu() & allowed
    frozen = torch.zeros_like(removed)
    notes: list[str] = []
    claims: list[Claim] = []
    last = -1
    for attempt in range(_ROUNDS):
        if not bool(removed.any()):
            raise NothingToDo("nothing can be removed" + (f": {'; '.join(notes[:3])}" if notes else ""))
        network, edits, where = _applied(model, traced, removed, claims)
        if where is None:
            proof = _prove(model, network, traced, removed, claims)
            if proof.difference is None or proof.holds:
                return Cut(network, tuple(edits), proof, removed, frozen, tuple(notes))
            suspects, note = _suspects(model, traced, removed, proof, claims)
        else:
            more = _claims(model, traced, removed, where.step) if where.raised and where.step > last else []
            last = where.step
            if more:  # the code refused a size before it computed anything: an attribute may say what it expects
                claims += more
                continue
            claims = [c for c in claims if c.at != where.step]
            suspects, note = _through(model, traced, removed, where.step, where.what, alike=attempt >= _PATIENCE)
        notes.append(note)
        frozen |= suspects
        removed = removed & ~suspects
    raise ProofError(f"the network could not be cut in {_ROUNDS} attempts: {notes[-1]}")


def cut_once(model: nn.Module, traced: Trace, removed: Tensor) -> tuple[nn.Module, bool]:
    """Cut and hold against the trace, once and without the proof: the network, and whether it ran as predicted. `cut` is what to use."""
    network, _, where = _applied(model, traced, removed)
    return network, where is None


@dataclass(frozen=True)
class Claim:
    """An attribute is taken to be the size of one dimension of what a step makes, because the code refused to go on to step ``at``."""

    module: str
    name: str
    step: int
    dim: int
    at: int


def _claims(model: nn.Module, traced: Trace, removed: Tensor, at: int) -> list[Claim]:
    """Whole-number attributes equal to a size that changes in a step or shortly before, of its module and of the one around it, and of all such."""
    predict = Prediction(traced, removed)
    found: dict[tuple[str, str], Claim] = {}
    for around in (False, True):
        for i in _alike(model, traced, at, around=around):
            path = traced.steps[i].path
            module = path.rpartition(".")[0] if around else path
            holder = model.get_submodule(module)
            own = type(holder).__module__.startswith("torch.nn.") or (around and not module)  # torch's layers tell their sizes anyway
            values = {} if own else whole_numbers(holder)
            before = range(i - 1, max(i - _BEFORE, -1), -1)
            for j in (*before, i) if around else (i, *before):  # the module around refused what it was given
                step = traced.steps[j]
                new = predict.shapes(step)[0] if step.outputs else None
                for d, old in enumerate(step.shapes[0] if new is not None else ()):
                    for name in (n for n, value in values.items() if value == old) if new is not None and new[d] != old else ():
                        found.setdefault((module, name), Claim(module, name, j, d, i))
    return list(found.values())


def _applied(
    model: nn.Module, traced: Trace, removed: Tensor, claims: Sequence[Claim] = ()
) -> tuple[nn.Module, list[StructureEdit], Divergence | None]:
    """The cut network, and where it does something else than its trace predicts: tensors, then what modules declare, then sizes in code."""
    masks = traced.channels.keep_masks(removed)
    kept = keep_edits(masks)
    network = apply_structure(model, kept)
    edits: list[StructureEdit] = [*attribute_edits(model, network, masks, traced, removed), *attention_edits(network, masks)]
    network = apply_structure(network, edits, copied=True)
    predict = Prediction(traced, removed)
    claimed = []
    for claim in claims:
        shape = predict.shapes(traced.steps[claim.step])[0]
        if shape is not None and shape[claim.dim] != getattr(network.get_submodule(claim.module), claim.name):
            claimed.append(SetAttribute(module=claim.module, name=claim.name, value=shape[claim.dim]))
    edits += claimed
    network = apply_structure(network, claimed, copied=True)
    repair = Repair(traced, predict)
    needed, reached, as_predicted = repair.needed(network)
    if as_predicted:
        return network, [*kept, *edits], None
    for guess in attribute_guesses(network, needed) if needed else ():
        before = [SetAttribute(module=e.module, name=e.name, value=getattr(network.get_submodule(e.module), e.name)) for e in guess]
        apply_structure(network, guess, copied=True)
        now, far, _ = repair.needed(network)
        if size(now) < size(needed) and far >= reached:  # and not because another branch was taken
            edits, needed, reached = [*edits, *guess], now, far
        else:
            apply_structure(network, before, copied=True)
    calls = call_edits(needed)
    network = apply_structure(network, calls, copied=True)
    return network, [*kept, *edits, *calls], first_divergence(network, traced, removed)


def _through(model: nn.Module, traced: Trace, removed: Tensor, at: int, what: str, *, alike: bool) -> tuple[Tensor, str]:
    """Classes to be removed that go through the step where the pass diverged, or through the nearest one before it."""
    for i in range(at, -1, -1):
        step = traced.steps[i]
        found = classes_through(step, traced)
        if bool((found & removed).any()):
            for other in _alike(model, traced, i) if alike else ():
                found |= classes_through(traced.steps[other], traced)
            return found, f"left in: channels through {step.op} in {step.path or 'the network itself'}, which {what}"
    return removed.clone(), f"left in: everything, because the cut network {what}"


def _alike(model: nn.Module, traced: Trace, at: int, *, around: bool = False) -> Iterator[int]:
    """The same step in this and all other modules of the same class: the same operation, as many of its kind before it.

    With ``around`` the modules that hold it are of one class, and it has the same name in them.
    """
    kinds = {n: type(m) for n, m in model.named_modules()}
    seen: dict[tuple[str, str], int] = {}
    places: list[tuple[Any, ...]] = []
    for step in traced.steps:
        n = seen[step.path, step.op] = seen.get((step.path, step.op), -1) + 1
        outer, _, own = step.path.rpartition(".")
        places.append((kinds.get(step.path), step.op, n, *((kinds.get(outer), own) if around else ())))
    yield from (i for i, place in enumerate(places) if place == places[at])


def _prove(model: nn.Module, network: nn.Module, traced: Trace, removed: Tensor, claims: Sequence[Claim]) -> Proof:
    inexact = torch.from_numpy(traced.classes.inexact)
    reasons = {g.name: g.inexact[0] for g in traced.channels.groups if g.inexact and bool((removed & inexact)[g.classes].any())}
    exact = removed & ~inexact
    if not bool(exact.any()):
        return Proof("zeroed", None, inexact=reasons)
    if bool((removed & inexact).any()):
        network, _, where = _applied(model, traced, exact, claims)
        if where is not None:
            return Proof("zeroed", float("inf"), inexact=reasons)
    return replace(prove(model, network, traced, exact), inexact=reasons)


def _suspects(model: nn.Module, traced: Trace, removed: Tensor, proof: Proof, claims: Sequence[Claim]) -> tuple[Tensor, str]:
    """The families whose removal alone breaks the proof; all of them where none does."""
    found = torch.zeros_like(removed)
    names = []
    for group in traced.channels.groups:
        alone = torch.zeros_like(removed)
        alone[group.classes] = removed[group.classes]
        if bool(alone.any()):
            network, _, where = _applied(model, traced, alone, claims)
            broken = where is not None
            one = None if broken else _prove(model, network, traced, alone, claims)
            if broken or (one is not None and one.difference is not None and not one.holds):
                found[group.classes] = True
                names.append(group.name)
    if not names:
        return removed.clone(), f"left in: everything, because the proof fails jointly (relative difference {proof.difference:.1e})"
    return found, f"left in: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}, where the zeroed network differs from the cut one"
