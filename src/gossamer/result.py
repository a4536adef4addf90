"""Value types that every stage hands on: layer costs, profiles, proofs, results. One multiply-add is one MAC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from gossamer.plan import Plan

ExampleInputs = Any  # a tuple of positional inputs, or a dict of keyword inputs


@dataclass(frozen=True)
class LayerCost:
    """What one call of one layer costs on the example inputs.

    Attributes:
        name: module path of the call, ``"features.0.0"`` (``""`` is the network itself).
        op: the operation, ``"convolution"``, ``"linear"``, ``"matmul"``, ...
        weight: state-dict name of the weight it contracts with, or None (attention scores, for example).
        macs: multiply-adds of this call.
        params: elements of the weight and bias, counted at their first use only.
        activation_bytes: bytes of the output.
        output_shape: shape of the output, batch included.
    """

    name: str
    op: str
    weight: str | None
    macs: int
    params: int
    activation_bytes: int
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """What a network costs on its example inputs (batch included as given).

    Attributes:
        params: elements of all parameters, tied ones counted once.
        macs: multiply-adds of one pass.
        weight_bytes: bytes of parameters and buffers in memory, tied ones counted once.
        peak_activation_bytes: what lives together at the worst moment, input included, in the order executed, once outputs lie on inputs that
            end and batch norms are folded: what an arena takes, planned from one forward pass. `gossamer.plan_memory` plans it exactly.
        layers: every contraction in execution order.
    """

    params: int
    macs: int
    weight_bytes: int
    peak_activation_bytes: int
    layers: tuple[LayerCost, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether a forward pass was watched; without one only parameters and bytes are known."""
        return bool(self.macs or self.peak_activation_bytes)

    def __str__(self) -> str:
        from gossamer.report.text import profile_table

        return profile_table(self)


@dataclass(frozen=True)
class Proof:
    """How a transformed network was compared with the original.

    Attributes:
        method: ``"zeroed"`` (removed channels' outgoing weights set to zero), or ``"none"``.
        difference: largest relative difference ``max|a - b| / max|a|`` over all outputs; None where nothing was compared.
        tolerance: what it had to stay within.
        exact: names of the channel groups that were compared exactly.
        inexact: group name -> why the zeroed network differs there by construction.
    """

    method: str
    difference: float | None
    tolerance: float = 1e-4
    exact: tuple[str, ...] = ()
    inexact: Mapping[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether something was compared and the difference stays within the tolerance."""
        return self.difference is not None and self.difference <= self.tolerance

    def __str__(self) -> str:
        if self.difference is None:
            return "proof: nothing was compared" + (f" ({len(self.inexact)} groups are inexact)" if self.inexact else "")
        verdict = "holds" if self.holds else "FAILS"
        tail = f"; {len(self.inexact)} inexact groups left out" if self.inexact else ""
        return f"proof {verdict}: relative difference {self.difference:.1e} <= {self.tolerance:.0e} on {len(self.exact)} groups{tail}"


ORDER = {
    "keep": "prune",
    "factorize": "factorize",
    "decouple": "decouple",
    "mask": "sparsify",
    "share": "cluster",
    "quantize_weight": "quantize",
    "quantize_activation": "quantize",
    "quantize_input": "quantize",
    "quantize_groups": "quantize",
}
"""Kinds of edits, and the step each comes from, in the order in which steps can follow each other: a later one would be undone."""
_EITHER = {"decouple": "factorize"}
"""Steps that may come before or after one another."""


def network_of(model: nn.Module | Result, step: str) -> nn.Module:
    """The network to go on from with a step: ``"prune"``, ``"factorize"``, ``"decouple"``, ``"sparsify"``, ``"cluster"`` or ``"quantize"``.

    Raises:
        UsageError: what was given is neither a network nor a `Result`, or the step would undo what was done already: cutting channels fills
            zeros, zeros break up codebooks, and integers cannot be changed any more.
    """
    from torch import nn

    from gossamer.errors import UsageError

    if isinstance(model, Result):
        steps = list(dict.fromkeys(ORDER.values()))
        done = {ORDER.get(k) for k in model.plan.counts()} - {_EITHER.get(step), *(s for s, other in _EITHER.items() if other == step)}
        later = [s for s in steps if s in done and steps.index(s) > steps.index(step)]
        if later or (step == "quantize" and "quantize_weight" in model.plan.counts()):
            raise UsageError(
                f"{step} would undo {(later or [step])[0]}, which was done already: {step} comes first, before "
                + ", ".join(later or [step])
            )
        return model.model
    if not isinstance(model, nn.Module):
        raise UsageError(f"{step} takes a torch.nn.Module or a Result, not {type(model).__name__}")
    return model


@dataclass(frozen=True)
class Result:
    """A transformed network with what was done to it and what that did.

    Attributes:
        model: the new network; the caller's own is untouched.
        plan: every edit from the original network to this one.
        before: profile of the original network.
        after: profile of this network.
        proof: how equality with the original was checked; None where no structure was cut.
        example_inputs: the inputs it was traced with.
        notes: one line for each thing that was left alone, with the reason.
        source: the model specification it came from, where there is one.
        report: figures of the exported artefact, filled in by `gossamer.compress`.
        floating: of a quantised network, the float graph that was rounded; `gossamer.qat` trains on from it. It is not saved.
    """

    model: nn.Module
    plan: Plan
    before: Profile
    after: Profile
    proof: Proof | None = None
    example_inputs: ExampleInputs = None
    notes: tuple[str, ...] = ()
    source: str | None = None
    report: Mapping[str, Any] | None = None
    floating: nn.Module | None = None

    def save(self, folder: str | Path) -> Path:
        """Write ``plan.json`` and ``model.safetensors`` into ``folder``; `gossamer.load` reads them back.

        Args:
            folder: made where it does not exist; must not hold another result.

        Returns:
            The folder.

        Raises:
            RunFolderError: the folder is occupied or cannot be written.
        """
        from gossamer.run_folder import save_result

        return save_result(self, folder)

    def then(self, step: Result) -> Result:
        """This result followed by a further step that was made from its network: one plan, before and source from here."""
        return replace(
            step,
            plan=self.plan + step.plan,
            before=self.before,
            proof=step.proof or self.proof,
            notes=tuple(dict.fromkeys([*self.notes, *step.notes])),
            source=self.source,
        )

    def with_(self, **changes: Any) -> Result:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def __str__(self) -> str:
        from gossamer.report.text import result_table

        return result_table(self)
