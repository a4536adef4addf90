"""The plan: what was done to a network, as plain data. Applied to a copy, saved as JSON, loaded again."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from gossamer.errors import PlanError, near


class _Edit(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Keep(_Edit):
    """Keep some channels of one dimension of a parameter or buffer.

    ``index`` is a list of positions, or, for a grouped weight, one list per equal block of dimension 0 (all of the same length).
    """

    kind: Literal["keep"] = "keep"
    tensor: str
    dim: int
    index: tuple[int, ...] | tuple[tuple[int, ...], ...]


class SetAttribute(_Edit):
    """Set what a module declares about its own size (``in_channels``, ``groups``, ``num_heads``, ...)."""

    kind: Literal["set"] = "set"
    module: str
    name: str
    value: int | tuple[int, ...]


class AddBias(_Edit):
    """Give a convolution or linear layer that has no bias a bias of zeros, to hold what compensation or folding adds."""

    kind: Literal["add_bias"] = "add_bias"
    module: str
    size: int


class RescaleCall(_Edit):
    """Rescale numbers that a module's code passes to torch: in the ``ordinal``-th call of ``call`` in its forward, leaf ``position`` times ``up / down``.

    ``ratios`` lists ``(position, up, down)``.
    """

    kind: Literal["rescale_call"] = "rescale_call"
    module: str
    call: str
    ordinal: int
    ratios: tuple[tuple[int, int | float, int | float], ...]


class AdaptAttention(_Edit):
    """Let a `torch.nn.MultiheadAttention` have any number of heads, whatever its width; its parameters keep their names."""

    kind: Literal["adapt_attention"] = "adapt_attention"
    module: str


class AsGraph(_Edit):
    """Write the network down as one graph of tensor operations, its sizes as constants (`torch.export`); parameters keep their names."""

    kind: Literal["as_graph"] = "as_graph"


class QuantizeWeight(_Edit):
    """Store a weight as integers: ``w = (q - zero_point) * step``, along ``axis`` (None: one step for the tensor)."""

    kind: Literal["quantize_weight"] = "quantize_weight"
    tensor: str
    bits: int
    axis: int | None
    signed: bool
    steps: tuple[float, ...]
    zero_points: tuple[int, ...]


class QuantizeActivation(_Edit):
    """Round an activation to ``(clamp(round(x / step) + zero_point) - zero_point) * step`` where it is computed.

    ``point`` names it: ``"module.path:op:n"`` is the n-th call of ``op`` inside that module, ``"input:0"`` the first graph input.
    """

    kind: Literal["quantize_activation"] = "quantize_activation"
    point: str
    bits: int
    signed: bool
    step: float
    zero_point: int


Edit = Annotated[
    Keep | SetAttribute | RescaleCall | AdaptAttention | AddBias | AsGraph | QuantizeWeight | QuantizeActivation,
    Field(discriminator="kind"),
]
StructureEdit = Keep | SetAttribute | RescaleCall | AdaptAttention | AddBias
_QUANTIZE = (QuantizeWeight, QuantizeActivation)


class InputSpec(_Edit):
    """Shape and dtype of one example input, so that a plan can be applied without data. ``name`` is set for keyword inputs."""

    shape: tuple[int, ...]
    dtype: str
    name: str | None = None


class Plan(BaseModel):
    """A list of edits from a source network to a compressed one.

    Example:
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

    def apply(self, model: nn.Module) -> nn.Module:
        """Apply every edit to a copy of ``model``.

        Args:
            model: the source network; it is not changed.

        Returns:
            The edited copy, in the mode (train or eval) of ``model``. A quantised one is in eval mode.

        Raises:
            PlanError: an edit names a tensor or module that ``model`` does not have, or does not fit it.
        """
        edited, structure = model, list[StructureEdit]()
        for edit in (e for e in self.edits if not isinstance(e, _QUANTIZE)):
            if isinstance(edit, AsGraph):
                from gossamer.trace.capture import capture

                edited, structure = capture(apply_structure(edited, structure), self.example_inputs()), []
            else:
                structure.append(edit)
        edited = apply_structure(edited, structure)
        quantize = [e for e in self.edits if isinstance(e, _QUANTIZE)]
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

    def __add__(self, other: Plan | Sequence[_Edit]) -> Plan:
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
                case AsGraph():
                    lines.append("  as graph  the network: one graph of tensor operations")
                case QuantizeWeight():
                    where = "whole tensor" if e.axis is None else f"{len(e.steps)} steps along {e.axis}"
                    lines.append(f"  quantise  {e.tensor}: {e.bits} bit {'signed' if e.signed else 'unsigned'}, {where}")
                case QuantizeActivation():
                    lines.append(f"  quantise  {e.point}: {e.bits} bit, step {e.step:.4g}, zero point {e.zero_point}")
        return "\n".join(lines)


def input_specs(example_inputs: Any) -> tuple[InputSpec, ...]:
    """Shapes and dtypes of example inputs (a tuple, or a dict of keyword inputs); anything but tensors is left out.

    Example:
        >>> input_specs((torch.zeros(1, 3),))
        (InputSpec(shape=(1, 3), dtype='float32', name=None),)
    """
    items = example_inputs.items() if isinstance(example_inputs, dict) else [(None, t) for t in example_inputs]
    return tuple(
        InputSpec(shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."), name=name)
        for name, t in items
        if isinstance(t, torch.Tensor)
    )


def apply_structure(model: nn.Module, edits: Sequence[_Edit], *, copied: bool = False) -> nn.Module:
    """Apply the edits that change a network's structure to a copy of ``model``, and return the copy; ``copied`` says it already is one."""
    from gossamer.adapters import adapt_attention, rescale_calls

    if not copied:  # tensors are cut on the way into the copy, so that no whole copy is ever held
        first = next((i for i, e in enumerate(edits) if not isinstance(e, Keep)), len(edits))
        memo = _cut_tensors(model, [e for e in edits[:first] if isinstance(e, Keep)])
        model = copy.deepcopy(model, memo | _empty_containers(model))
        edits = edits[first:]
    for edit in edits:
        match edit:
            case Keep():
                for tensor, new in _cut_tensors(model, [edit], by_id=False):
                    _put(model, tensor, new)
            case SetAttribute():
                module = _module(model, edit.module)
                if not hasattr(module, edit.name):
                    raise PlanError(f"module {edit.module!r} ({type(module).__name__}) has no attribute {edit.name!r}")
                setattr(module, edit.name, edit.value)
            case RescaleCall():
                ratios = {position: (up, down) for position, up, down in edit.ratios}
                rescale_calls(_module(model, edit.module), edit.call, edit.ordinal, ratios)
            case AdaptAttention():
                attention = _module(model, edit.module)
                if not isinstance(attention, nn.MultiheadAttention):
                    raise PlanError(f"module {edit.module!r} is a {type(attention).__name__}, not a MultiheadAttention")
                adapt_attention(attention)
            case AddBias():
                module = _module(model, edit.module)
                weight = module.weight
                assert isinstance(weight, torch.Tensor)
                module.bias = nn.Parameter(weight.new_zeros(edit.size))
            case _:
                raise PlanError(f"an edit of kind {getattr(edit, 'kind', type(edit).__name__)!r} changes no structure")
    return model


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise PlanError(f"the network has no module {name!r}{near(name, (n for n, _ in model.named_modules()))}") from None


def _cut_tensors(model: nn.Module, edits: Sequence[Keep], *, by_id: bool = True) -> Any:
    """The cut tensors: as a memo for `copy.deepcopy`, or as pairs of old and new."""
    old: dict[str, torch.Tensor] = {}
    new: dict[int, torch.Tensor] = {}
    for edit in edits:
        tensor = old.setdefault(edit.tensor, _tensor(model, edit.tensor))
        with torch.no_grad():
            new[id(tensor)] = _keep(new.get(id(tensor), tensor.detach()), edit)
    for tensor in old.values():
        if isinstance(tensor, nn.Parameter):
            new[id(tensor)] = nn.Parameter(new[id(tensor)], requires_grad=tensor.requires_grad)
    return dict(new) if by_id else [(t, new[id(t)]) for t in old.values()]


def _empty_containers(model: nn.Module) -> dict[int, Any]:
    """Copies of the many empty dictionaries and sets that modules hold, as a memo: `copy.deepcopy` spends most of its time on them."""
    return {
        id(value): type(value)()
        for module in model.modules()
        for value in vars(module).values()
        if type(value) in (dict, OrderedDict, set) and not value
    }


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    module = _module(model, path)
    found: torch.Tensor | None = module._parameters.get(leaf)
    found = module._buffers.get(leaf) if found is None else found
    if found is None:
        names = [n for n, _ in model.named_parameters()] + [n for n, _ in model.named_buffers()]
        raise PlanError(f"the network has no tensor {name!r}{near(name, names)}")
    return found


def _keep(old: torch.Tensor, edit: Keep) -> torch.Tensor:
    index = torch.tensor(edit.index, dtype=torch.long, device=old.device)
    blocks = index.shape[0] if index.dim() == 2 else 1
    if edit.dim >= old.dim() or (index.numel() and int(index.max()) >= old.shape[edit.dim]) or old.shape[0] % blocks:
        raise PlanError(f"{edit.tensor} has shape {tuple(old.shape)}, which edit keep dim {edit.dim} {tuple(index.shape)} does not fit")
    if index.dim() == 1:
        return old.index_select(edit.dim, index).contiguous()
    parts = old.unflatten(0, (blocks, old.shape[0] // blocks))
    return torch.stack([p.index_select(edit.dim, i) for p, i in zip(parts, index, strict=True)]).flatten(0, 1).contiguous()


def _put(model: nn.Module, old: torch.Tensor, new: torch.Tensor) -> None:
    """Replace a tensor wherever it is held: a tied parameter has several places."""
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name in [n for n, tensor in store.items() if tensor is old]:
                store[name] = new
