"""From removed classes to edits: what stays of every parameter and buffer, and what modules then declare about their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from gossamer.adapters import original_attention
from gossamer.plan import AdaptAttention, Keep, SetAttribute
from gossamer.trace import Trace

Masks = Mapping[tuple[str, int], Tensor]


def keep_edits(masks: Masks) -> list[Keep]:
    """`Keep` edits of all masks, dimension 0 of a tensor before its others."""
    edits = []
    for (tensor, dim), mask in sorted(masks.items(), key=lambda item: item[0]):
        if mask.dim() == 1:
            edits.append(Keep(tensor=tensor, dim=dim, index=tuple(mask.nonzero().flatten().tolist())))
            continue
        rows = mask[mask.any(1)]
        counts = rows.sum(1)
        assert bool((counts == counts[0]).all()), f"{tensor} would lose unequal numbers of channels in its groups"
        index = rows.nonzero()[:, 1].reshape(len(rows), -1)
        edits.append(Keep(tensor=tensor, dim=dim, index=tuple(tuple(row) for row in index.tolist())))
    return edits


def attribute_edits(original: nn.Module, cut: nn.Module, masks: Masks, traced: Trace, removed: Tensor) -> list[SetAttribute]:
    """What modules that own a cut tensor, or declare a size, must say about themselves now.

    Args:
        original: before the cut.
        cut: after `keep_edits`, attributes still old.
        masks: what was kept.
        traced: of the original.
        removed: bool, shape ``(num_classes,)``.
    """
    edits: list[SetAttribute] = []
    touched = {tensor.rpartition(".")[0] for tensor, _ in masks}
    tied = {id(p): n for n, p in cut.named_parameters()}
    of_module: dict[str, dict[tuple[str, int], Tensor]] = {}
    for (tensor, dim), mask in masks.items():
        path, _, leaf = tensor.rpartition(".")
        of_module.setdefault(path, {})[leaf, dim] = mask
    for path, module in cut.named_modules():
        own = [tied.get(id(p)) for p in module.parameters(recurse=False)]
        if path in touched or any(n and n.rpartition(".")[0] in touched for n in own):
            for kind, describe in _DECLARES:
                if isinstance(module, kind):
                    edits += _changed(
                        path, cast(nn.Module, module), describe(module, original.get_submodule(path), of_module.get(path, {}))
                    )
                    break
            else:
                edits += _changed(path, module, _norm_of_its_own(module, original.get_submodule(path)))
    of = traced.classes.of
    for path, labels in traced.declared.items():
        module = cut.get_submodule(path)
        ids = of[labels]
        left = int((~removed.numpy()[ids] | (ids < 0)).sum())
        if left != len(labels) and len(getattr(module, "normalized_shape", ())) == 1:
            edits += _changed(path, module, {"normalized_shape": (left,)})
    return list(dict.fromkeys(edits))


def attention_edits(network: nn.Module, masks: Masks) -> list[AdaptAttention]:
    """Every `torch.nn.MultiheadAttention` that loses something must no longer tie its heads to its width."""
    cut = {t.rpartition(".")[0] for t, _ in masks}
    return [
        AdaptAttention(module=n)
        for n, m in network.named_modules()
        if original_attention(m) and any(t == n or t.startswith(f"{n}.") for t in cut)
    ]


def _changed(path: str, module: nn.Module, values: dict[str, Any]) -> list[SetAttribute]:
    return [SetAttribute(module=path, name=n, value=v) for n, v in values.items() if hasattr(module, n) and getattr(module, n) != v]


def _convolution(module: Any, old: Any, masks: Masks) -> dict[str, Any]:
    w, before = module.weight, old.weight
    groups = old.groups
    if groups > 1:
        blocks = masks.get(("weight", 1))
        if blocks is not None and blocks.dim() == 2:
            groups = int(blocks.any(1).sum())
        rows = masks.get(("weight", 0))
        if rows is not None and before.shape[0] % old.groups == 0:
            whole = rows.reshape(old.groups, -1)
            if bool((whole.all(1) | ~whole.any(1)).all()):
                groups = int(whole.any(1).sum())
    first, second = (w.shape[0], w.shape[1] * groups)
    ins, outs = (first, second) if old.transposed else (second, first)
    return {"in_channels": ins, "out_channels": outs, "groups": groups}


def _group_norm(module: Any, old: Any, masks: Masks) -> dict[str, Any]:
    mask = masks.get(("weight", 0))
    groups = old.num_groups
    if mask is not None:
        rows = mask.reshape(groups, -1)
        if bool((rows.all(1) | ~rows.any(1)).all()):
            groups = int(rows.any(1).sum())
    return {"num_channels": module.weight.shape[0], "num_groups": groups}


def _norm_of_its_own(module: nn.Module, old: nn.Module) -> dict[str, Any]:
    """A norm that is not torch's, but declares its shape as torch's do."""
    weight, before = getattr(module, "weight", None), getattr(old, "weight", None)
    if isinstance(weight, Tensor) and isinstance(before, Tensor) and tuple(getattr(old, "normalized_shape", ())) == tuple(before.shape):
        return {"normalized_shape": tuple(weight.shape)}
    return {}


_DECLARES: tuple[tuple[type | tuple[type, ...], Callable[[Any, Any, Masks], dict[str, Any]]], ...] = (
    (_ConvNd, _convolution),
    (nn.Linear, lambda m, old, masks: {"in_features": m.weight.shape[1], "out_features": m.weight.shape[0]}),
    (_NormBase, lambda m, old, masks: {"num_features": (m.weight if m.weight is not None else m.running_mean).shape[0]}),
    (nn.GroupNorm, _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), lambda m, old, masks: {"normalized_shape": tuple(m.weight.shape)}),
    (nn.PReLU, lambda m, old, masks: {"num_parameters": m.weight.shape[0]}),
    (nn.Embedding, lambda m, old, masks: {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}),
)
