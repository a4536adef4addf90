"""Apply the edits that change a network's structure and weights to a copy of it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from gossamer.errors import PlanError, near
from gossamer.plan.edits import AdaptAttention, AddBias, BaseEdit, Decouple, Factorize, Keep, Mask, RescaleCall, SetAttribute, Share
from gossamer.plan.weights import snap, unpack_mask


def apply_structure(model: nn.Module, edits: Sequence[BaseEdit], *, copied: bool = False, values: bool = True) -> nn.Module:
    """Apply the edits that change a network's structure to a copy of ``model``, and return the copy; ``copied`` says it already is one.

    Without ``values`` the weights of factorised and decoupled layers are zero, for a caller that fills them in.
    """
    from gossamer.adapters import adapt_attention, rescale_calls

    if not copied:  # tensors are cut on the way into the copy, so that no whole copy is ever held
        first = next((i for i, e in enumerate(edits) if not isinstance(e, Keep)), len(edits))
        memo = _cut_tensors(model, [e for e in edits[:first] if isinstance(e, Keep)])
        model = copy.deepcopy(model, memo | _empty_containers(model) | _computed_tensors(model))
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
            case Factorize():
                model = replace_module(model, _module(model, edit.module), _factorised(model, edit, values))
            case Decouple():
                model = _decoupled(model, edit, values)
            case Mask():
                tensor = _tensor(model, edit.tensor)
                if tuple(tensor.shape) != edit.shape:
                    raise PlanError(f"{edit.tensor} has shape {tuple(tensor.shape)}, the plan's mask {edit.shape}")
                tensor.detach().masked_fill_(~unpack_mask(edit.kept, edit.shape).to(tensor.device), 0)
            case Share():
                for name in edit.tensors:
                    tensor = _tensor(model, name)
                    tensor.detach().copy_(snap(tensor, edit.codebooks, zeros=edit.zeros))
            case _:
                raise PlanError(f"an edit of kind {getattr(edit, 'kind', type(edit).__name__)!r} changes no structure")
    return model


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise PlanError(f"the network has no module {name!r}{near(name, (n for n, _ in model.named_modules()))}") from None


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` is registered, in place; the network itself where that is ``old``."""
    if model is old:
        return new
    for module in list(model.modules()):
        for name in [n for n, child in module._modules.items() if child is old]:
            module._modules[name] = new
    return model


def _factorised(model: nn.Module, edit: Factorize, values: bool) -> nn.Module:
    from gossamer.lowrank import check_ranks, dims, factorize_layer, skeleton

    layer = _module(model, edit.module)
    if not isinstance(layer, nn.Linear | _ConvNd):
        raise PlanError(f"module {edit.module!r} is a {type(layer).__name__}, neither a linear layer nor a convolution")
    check_ranks(edit.method, dims(layer), edit.ranks, edit.module)
    if not values:
        return skeleton(layer, edit.method, edit.ranks, bias=edit.bias)
    return factorize_layer(layer, method=edit.method, ranks=edit.ranks, bias=edit.bias)


def _decoupled(model: nn.Module, edit: Decouple, values: bool) -> nn.Module:
    from gossamer.decoupling import check, decouple_layer, exchange, skeleton

    layer = _module(model, edit.module)
    check(layer, edit.form, edit.sizes, edit.inputs, edit.outputs, edit.module)
    assert isinstance(layer, _ConvNd)
    norm = None if edit.norm is None else _module(model, edit.norm)
    if norm is not None and (not isinstance(norm, _BatchNorm) or norm.num_features != len(edit.outputs)):
        raise PlanError(f"module {edit.norm!r} is not a batch norm of the {len(edit.outputs)} channels that {edit.module!r} orders")
    make = decouple_layer if values else skeleton
    made = make(layer, form=edit.form, sizes=edit.sizes, inputs=edit.inputs, outputs=edit.outputs, bias=edit.bias)
    return exchange(model, layer, made, norm=norm, outputs=edit.outputs)


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


def _computed_tensors(model: nn.Module) -> dict[int, torch.Tensor]:
    """Copies of tensors that modules computed and keep (the older weight norm's weight), as a memo: `copy.deepcopy` refuses them."""
    return {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
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
