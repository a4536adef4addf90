"""The plan: what was done to a network, as plain data. Applied to a copy, saved as JSON, loaded again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from gossamer.errors import PlanError
from gossamer.plan.application import apply_structure
from gossamer.plan.edits import (
    QUANTIZE,
    AdaptAttention,
    AddBias,
    AsGraph,
    BaseEdit,
    Decouple,
    Edit,
    Factorize,
    InputSpec,
    Keep,
    Mask,
    QuantizeActivation,
    QuantizeGroups,
    QuantizeInput,
    QuantizeWeight,
    RescaleCall,
    SetAttribute,
    Share,
    StructureEdit,
)

_SIZES = {"depthwise_separable": "terms", "grouped": "groups", "bottleneck": "width"}


class Plan(BaseModel):
    """A list of edits from a source network to a compressed one.

    Examples:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> plan = Plan(edits=(Keep(tensor="0.weight", dim=0, index=(0, 2)), Keep(tensor="0.bias", dim=0, index=(0, 2)),
        ...                    Keep(tensor="1.weight", dim=1, index=(0, 2)), SetAttribute(module="0", name="out_features", value=2),
        ...                    SetAttribute(module="1", name="in_features", value=2)))
        >>> plan.apply(net)
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): Linear(in_features=2, out_features=2, bias=True)
        )

    Attributes:
        edits: applied in order; quantisation comes last.
        inputs: what the network was traced with.
        version: of this format.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    edits: tuple[Edit, ...] = ()
    inputs: tuple[InputSpec, ...] = ()
    version: Literal[1] = 1

    def apply(self, model: nn.Module, *, values: bool = True) -> nn.Module:
        """Apply every edit to a copy of ``model``.

        Args:
            model: the source network; it is not changed.
            values: without them the weights of factorised and decoupled layers are zero, for a caller that fills them in. Else they are factors of the
                weights alone: those that were fitted to data are in the saved weights, not in the plan.

        Returns:
            The edited copy, in the mode (train or eval) of ``model``. A quantised one is in eval mode.

        Raises:
            PlanError: an edit names a tensor or module that ``model`` does not have, or does not fit it.
        """
        edited, structure = model, list[StructureEdit]()
        for edit in (e for e in self.edits if not isinstance(e, QUANTIZE)):
            if isinstance(edit, AsGraph):
                from gossamer.trace.capture import capture

                edited, structure = capture(apply_structure(edited, structure, values=values), self.example_inputs()), []
            else:
                structure.append(edit)
        edited = apply_structure(edited, structure, values=values)
        quantize = [e for e in self.edits if isinstance(e, QUANTIZE)]
        if quantize:
            from gossamer.quantization import apply_edits

            edited = apply_edits(edited, quantize, self.example_inputs())
        return edited

    def example_inputs(self) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor]:
        """Inputs of the recorded shapes: zeros, as a tuple or, where they are named, a dict."""
        tensors = [torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in self.inputs]
        if self.inputs and all(s.name is not None for s in self.inputs):
            return {str(s.name): t for s, t in zip(self.inputs, tensors, strict=True)}
        return tuple(tensors)

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, atomically."""
        from gossamer.run_folder import write_text

        return write_text(path, self.model_dump_json(indent=None) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by `save`; PlanError where it is missing or not valid."""
        try:
            return cls.model_validate_json(Path(path).read_text())
        except FileNotFoundError:
            raise PlanError(f"no plan at {path}") from None
        except ValidationError as e:
            first = e.errors()[0]
            raise PlanError(f"{path} is not a plan: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def __add__(self, other: Plan | Sequence[BaseEdit]) -> Plan:
        more = other.edits if isinstance(other, Plan) else tuple(other)
        return self.model_copy(update={"edits": (*self.edits, *more)})

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(self.edits)

    def counts(self) -> dict[str, int]:
        """Number of edits of each kind."""
        out: dict[str, int] = {}
        for e in self.edits:
            out[e.kind] = out.get(e.kind, 0) + 1
        return out

    def __str__(self) -> str:
        lines = [f"plan: {len(self.edits)} edits" + "".join(f", {n} {kind}" for kind, n in self.counts().items())]
        for e in self.edits:
            match e:
                case Keep():
                    n = sum(len(i) for i in e.index if isinstance(i, tuple)) or len(e.index)
                    lines.append(f"  keep      {e.tensor} dim {e.dim}: {n} channels")
                case SetAttribute():
                    lines.append(f"  set       {e.module}.{e.name} = {e.value}")
                case RescaleCall():
                    sizes = ", ".join(f"{down} -> {up}" for _, up, down in e.ratios)
                    lines.append(f"  rescale   {e.module or 'the network'}: {e.call} #{e.ordinal}, {sizes}")
                case AdaptAttention():
                    lines.append(f"  adapt     {e.module}: attention with any number of heads")
                case AddBias():
                    lines.append(f"  add bias  {e.module} [{e.size}]")
                case Factorize():
                    lines.append(f"  factorise {e.module or 'the network'}: {e.method}, rank {' and '.join(map(str, e.ranks))}")
                case Decouple():
                    sizes = " and ".join(map(str, e.sizes))
                    lines.append(f"  decouple  {e.module or 'the network'}: {e.form.replace('_', ' ')}, {_SIZES[e.form]} {sizes}")
                case Mask():
                    lines.append(f"  mask      {e.tensor}: {e.nonzeros:,} of {prod(e.shape):,} stay")
                case Share():
                    values = sum(map(len, e.codebooks))
                    lines.append(f"  share     {', '.join(e.tensors)}: {values} values{', and zero' if e.zeros else ''}")
                case AsGraph():
                    lines.append("  as graph  the network: one graph of tensor operations")
                case QuantizeWeight():
                    where = "whole tensor" if e.axis is None else f"{len(e.steps)} steps along {e.axis}"
                    lines.append(f"  quantise  {e.tensor}: {e.bits} bit {'signed' if e.signed else 'unsigned'}, {where}")
                case QuantizeActivation():
                    lines.append(f"  quantise  {e.point}: {e.bits} bit, step {e.step:.4g}, zero point {e.zero_point}")
                case QuantizeInput():
                    lines.append(f"  quantise  inputs of {e.tensor}: {e.bits} bit, when it runs")
                case QuantizeGroups():
                    lines.append(f"  quantise  {e.tensor}: {e.bits} bit signed, a step for each {e.group} inputs")
        return "\n".join(lines)


def input_specs(example_inputs: Any) -> tuple[InputSpec, ...]:
    """Shapes and dtypes of example inputs (a tuple, or a dict of keyword inputs); anything but tensors is left out.

    Examples:
        >>> input_specs((torch.zeros(1, 3),))
        (InputSpec(shape=(1, 3), dtype='float32', name=None),)
    """
    items = example_inputs.items() if isinstance(example_inputs, dict) else [(None, t) for t in example_inputs]
    return tuple(
        InputSpec(shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."), name=name)
        for name, t in items
        if isinstance(t, torch.Tensor)
    )
