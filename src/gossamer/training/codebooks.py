"""Trained codebooks: entries that share a value move together, and gradients reach the value from all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.errors import PlanError, UsageError, near
from gossamer.plan import Share, snap


class Codebook(nn.Module):
    """Parametrization of a weight: what is trained are the values of the codebook, and each entry has a code.

    Args:
        tensor: name of the weight in the network.
        codes: position of each entry's value, in the weight's shape; codebooks of blocks follow one another, a zero comes after them all.
        edit: whose codebooks these are.
        order: names of the module's parameters before any was shared.
    """

    codes: Tensor

    def __init__(self, tensor: str, codes: Tensor, edit: Share, order: tuple[str, ...]) -> None:
        super().__init__()
        self.tensor, self.shape, self.order = tensor, codes.shape, order
        self.bits, self.zeros, self.sizes = edit.bits, edit.zeros, tuple(map(len, edit.codebooks))
        self.register_buffer("codes", codes.reshape(-1).to(torch.int32))

    def forward(self, values: Tensor) -> Tensor:
        """The weight, from the values of all codebooks one after another."""
        if self.zeros:
            values = torch.cat([values, values.new_zeros(1)])
        return values.index_select(0, self.codes).view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The values that a weight has; where a code is not used, 0 until the codebook is put in place."""
        values = weight.new_zeros(sum(self.sizes) + self.zeros)
        return values.index_copy(0, self.codes.long(), weight.detach().reshape(-1))[: sum(self.sizes)]


def share_parameters(model: nn.Module, edits: Iterable[Share]) -> tuple[str, ...]:
    """Make the codebooks of edits the trained parameters of a network, in place: copy it first.

    Each tensor of the edits becomes its codebook's values, looked up by codes, for as long as `unshare` is not called; tensors of one edit
    train one codebook. Zeros stay zero where the edit says so. Entries are set to the nearest value, as the edit does.

    Examples:
        >>> net = nn.Linear(3, 2, bias=False)
        >>> edit = Share(tensors=("weight",), bits=1, codebooks=((-1.0, 1.0),), zeros=False)
        >>> share_parameters(net, [edit]), [tuple(p.shape) for p in net.parameters()]
        ((), [(2,)])

    Args:
        model: a network; its modules stay in place, their classes become subclasses (`torch.nn.utils.parametrize`).
        edits: of its plan; of several for one tensor the last counts.

    Returns:
        Names of tensors that cannot be parametrised and stay as they are, without a gradient: what a weight is computed from, as weight norm does.

    Raises:
        PlanError: an edit names a tensor that the network does not have, or does not fit it.
    """
    fixed: list[str] = []
    last = {name: edit for edit in edits for name in edit.tensors}
    for edit in {id(e): e for e in last.values()}.values():
        values: nn.Parameter | None = None
        for name in (n for n in edit.tensors if last[n] is edit):
            places = _places(model, name)
            weight = model.get_parameter(name)
            if any(not _can_be_parametrised(module) for module, _ in places):
                weight.detach().copy_(snap(weight, edit.codebooks, zeros=edit.zeros))
                weight.requires_grad_(False)
                fixed.append(name)
                continue
            codes = _codes(weight, edit)
            if values is None:
                flat = [v for book in edit.codebooks for v in book]
                values = nn.Parameter(torch.tensor(flat, dtype=weight.dtype, device=weight.device), requires_grad=weight.requires_grad)
            for module, attribute in places:
                order = next((c.order for _, c in _codebooks(module)), tuple(module._parameters))
                module._parameters[attribute] = nn.Parameter(weight.detach().clone())  # torch would turn the tied one into its codebook
                parametrize.register_parametrization(module, attribute, Codebook(name, codes, edit, order), unsafe=True)
                _originals(module, attribute).original = values
                if isinstance(module, nn.RNNBase):
                    _read_weights_when_used(module)
    return tuple(fixed)


def unshare(model: nn.Module) -> list[Share]:
    """Turn codebooks back into plain weights, in place, and say what they are now.

    Examples:
        >>> net = nn.Linear(3, 2, bias=False)
        >>> edit = Share(tensors=("weight",), bits=1, codebooks=((-1.0, 1.0),), zeros=False)
        >>> _ = share_parameters(net, [edit])
        >>> unshare(net) == [edit], type(net).__name__, net.weight.shape
        (True, 'Linear', torch.Size([2, 3]))

    Returns:
        An edit for each codebook, its values ascending: they are what the weights hold now.

    Raises:
        UsageError: no codebook is trained in the network.
    """
    found = [(m, attribute, codebook) for m in model.modules() for attribute, codebook in _codebooks(m)]
    if not found:
        raise UsageError("the network trains no codebook: call share_parameters first")
    edits: dict[int, Share] = {}
    plain: dict[str, nn.Parameter] = {}  # a tied weight is one parameter again
    for module, attribute, codebook in found:
        if codebook.tensor in plain:
            continue
        values = _values(module, attribute)
        plain[codebook.tensor] = nn.Parameter(getattr(module, attribute).detach().clone(), requires_grad=values.requires_grad)
        tensors = (*edits[id(values)].tensors, codebook.tensor) if id(values) in edits else (codebook.tensor,)
        codebooks = tuple(tuple(v.double().sort().values.tolist()) for v in values.detach().split(codebook.sizes))
        edits[id(values)] = Share(tensors=tensors, bits=codebook.bits, codebooks=codebooks, zeros=codebook.zeros)
    for module, attribute, codebook in found:
        own = nn.Parameter(_values(module, attribute).detach().clone())  # torch makes a weight of it; others still need theirs
        _originals(module, attribute).original = own
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        module._parameters[attribute] = plain[codebook.tensor]
        if all(n in module._parameters for n in codebook.order):
            module._parameters = {n: module._parameters[n] for n in (*codebook.order, *module._parameters)}
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
    return list(edits.values())


def replaced(old: Sequence[Any], trained: Sequence[Share]) -> Iterator[Any]:
    """A plan's edits with trained codebooks in the place of those that they were."""
    last = {name: edit for edit in old if isinstance(edit, Share) for name in edit.tensors}
    now = {name for edit in trained for name in edit.tensors}
    for edit in old:
        if not isinstance(edit, Share):
            yield edit
            continue
        rest = tuple(name for name in edit.tensors if last[name] is not edit or name not in now)
        if rest:
            yield edit if rest == edit.tensors else edit.model_copy(update={"tensors": rest})
        yield from (t for t in trained if last[t.tensors[0]] is edit)


def _places(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Every module and attribute that holds a parameter: a tied one has several."""
    try:
        parameter = model.get_parameter(name)
    except AttributeError:
        raise PlanError(f"the network has no parameter {name!r}{near(name, (n for n, _ in model.named_parameters()))}") from None
    return [(module, leaf) for module in model.modules() for leaf, p in module._parameters.items() if p is parameter]


def _can_be_parametrised(module: nn.Module) -> bool:
    return not isinstance(module, (parametrize.ParametrizationList, torch.jit.ScriptModule))


def _read_weights_when_used(module: nn.RNNBase) -> None:
    """Let a recurrent module look its weights up each time: the list of them that it keeps would be stale, and cannot be copied."""
    kind = type(module)  # of this module alone: torch made it for the parametrization, and takes it away again
    module.__dict__.pop("_flat_weights", None)
    kind._flat_weights = property(  # type: ignore[assignment]
        lambda self: [getattr(self, name, None) for name in self._flat_weights_names], lambda self, value: None
    )


def _codes(weight: Tensor, edit: Share) -> Tensor:
    """Position of the nearest value of each entry among all values of the edit's codebooks; the position after them is zero's."""
    if weight.shape[0] % len(edit.codebooks):
        raise PlanError(f"{len(edit.codebooks)} codebooks do not fit a weight of shape {tuple(weight.shape)}")
    parts, first = [], 0
    for block, book in zip(weight.detach().chunk(len(edit.codebooks)), edit.codebooks, strict=True):
        values = torch.tensor(book, dtype=weight.dtype, device=weight.device)
        parts.append(first + torch.bucketize(block.contiguous(), (values[1:] + values[:-1]) / 2))
        first += len(book)
    codes = torch.cat(parts)
    return torch.where(weight.detach() == 0, first, codes) if edit.zeros else codes


def _originals(module: nn.Module, attribute: str) -> nn.Module:
    return module.get_submodule(f"parametrizations.{attribute}")


def _values(module: nn.Module, attribute: str) -> nn.Parameter:
    return _originals(module, attribute).get_parameter("original")


def _codebooks(module: nn.Module) -> Iterator[tuple[str, Codebook]]:
    """Attributes of a module that are looked up in a codebook."""
    if parametrize.is_parametrized(module):
        for attribute, holder in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
            if isinstance(holder[0], Codebook):
                yield attribute, holder[0]
