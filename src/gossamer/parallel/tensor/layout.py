"""Which entries of each tensor a rank has: from whole to shared out, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gossamer.parallel.tensor.collectives import Ranks
from gossamer.plan import apply_structure
from gossamer.surgery.edits import keep_edits
from gossamer.trace import ChannelMap


class Layout:
    """Where a network's split tensors are.

    Args:
        model: the whole network.
        channels: its channel map.
        removed: for each rank, the classes it does not have; bool, shape ``(num_classes,)``.

    Attributes:
        shapes: of the split tensors, whole.
    """

    def __init__(self, model: nn.Module, channels: ChannelMap, removed: Sequence[Tensor]) -> None:
        names = {tensor for gone in removed for tensor, _ in channels.keep_masks(gone)}
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        self.shapes = {n: tensors[n].shape for n in sorted(names)}
        holder = _holder({n: torch.arange(s.numel(), dtype=torch.float64).reshape(s) for n, s in self.shapes.items()})
        self._entries: list[dict[str, Tensor]] = []
        self._shares: list[dict[str, torch.Size]] = []
        for gone in removed:
            own = _tensors(apply_structure(holder, keep_edits(channels.keep_masks(gone))))
            self._entries.append({n: own[n].long().flatten() for n in self.shapes})
            self._shares.append({n: own[n].shape for n in self.shapes})

    def share(self, whole: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """What a rank has of whole tensors; those that are not split as they are."""
        own, shapes = self._entries[rank], self._shares[rank]
        return {n: t.flatten()[own[n].to(t.device)].reshape(shapes[n]) if n in own else t for n, t in whole.items()}

    def gather(self, shares: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
        """The whole tensors, from what each rank has; all ranks call it together, with the same names.

        Args:
            shares: this rank's tensors; names of split ones are those of the network.
            ranks: that share them.
        """
        whole = {n: t.detach() for n, t in shares.items()}
        split: dict[torch.dtype, list[str]] = {}
        for n, t in shares.items():
            if n in self.shapes:
                split.setdefault(t.dtype, []).append(n)
        for names in split.values():
            sizes = [sum(len(entries[n]) for n in names) for entries in self._entries]
            found = ranks.every(torch.cat([shares[n].detach().flatten() for n in names]), sizes)
            for n in names:
                whole[n] = torch.empty(self.shapes[n], dtype=shares[n].dtype, device=shares[n].device)
            for flat, entries in zip(found, self._entries, strict=True):
                parts = flat.split([len(entries[n]) for n in names])
                for n, part in zip(names, parts, strict=True):
                    whole[n].view(-1)[entries[n].to(part.device)] = part
        return whole


def _holder(values: Mapping[str, Tensor]) -> nn.Module:
    """A module that has nothing but these tensors, under their names."""
    root = nn.Module()
    for name, value in values.items():
        at = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in at._modules:
                at._modules[part] = nn.Module()
            child = at._modules[part]
            assert child is not None
            at = child
        at._buffers[leaf] = value
    return root


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())
