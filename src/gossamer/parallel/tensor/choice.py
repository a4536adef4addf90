"""Which channels can be shared out among ranks, found in the channel map.

A *unit* is a set of families that only live and die together in the layers that make them and the layers that use them: all of it is split,
or none of it. A layer that uses one unit up makes another whole, so that it is at the end of the one and cannot be at the beginning of the
other: of units that meet in layers, those are split that together save the most arithmetic for what they send.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gossamer.trace import Axis, ChannelGroup, Trace

_MAKERS = (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.Embedding)
_USERS = (nn.Linear, _ConvNd)
_PARTS = frozenset(["slice", "select", "narrow", "index", "index_select", "split", "split_with_sizes", "unbind"])
"""Operations that leave some channels out without adding any up."""


@dataclass(frozen=True, eq=False)
class Unit:
    """Families that are split together.

    Attributes:
        name: of its first family.
        families: classes of each, in channel order.
        begins: paths of the layers that make its channels from whole inputs.
        ends: paths of the layers that use them up.
        macs: of all its layers, on the example inputs.
        sent_bytes: of the outputs of ``ends``.
    """

    name: str
    families: tuple[Tensor, ...] = field(repr=False)
    begins: tuple[str, ...]
    ends: tuple[str, ...]
    macs: int
    sent_bytes: int

    def share(self, rank: int, degree: int) -> Iterator[Tensor]:
        """The classes of one rank: of each family a run of neighbours, as equal as they come."""
        for classes in self.families:
            yield torch.from_numpy(np.array_split(classes.numpy(), degree)[rank])


@dataclass(frozen=True)
class Choice:
    """What is split and what stays whole on every rank.

    Attributes:
        units: to split.
        whole: family name -> why it stays whole.
    """

    units: tuple[Unit, ...]
    whole: Mapping[str, str]

    def removed(self, rank: int, degree: int, num_classes: int) -> Tensor:
        """bool, shape ``(num_classes,)``: the classes that a rank does not have."""
        gone = torch.zeros(num_classes, dtype=torch.bool)
        for unit in self.units:
            for family, own in zip(unit.families, unit.share(rank, degree), strict=True):
                gone[family] = True
                gone[own] = False
        return gone


def choose(model: nn.Module, traced: Trace, degree: int, refused: Mapping[str, str] | None = None) -> Choice:
    """Choose what to split among ``degree`` ranks.

    Examples:
        >>> from gossamer.trace import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> choice = choose(net, trace(net, (torch.zeros(1, 4),)), 2)
        >>> [(u.name, u.begins, u.ends) for u in choice.units], choice.whole["2"]
        ([('0', ('0',), ('2',))], 'layer 2 is already at the end of a split part')

    Args:
        model: the network.
        traced: of it.
        degree: ranks, at least 2.
        refused: family name -> why it must not be split.

    Returns:
        A `Choice`; the same network and degree give the same.
    """
    channels = traced.channels
    whole = {g.name: g.frozen or "" for g in channels.frozen} | {g.name: g.inexact[0] for g in channels.groups if g.inexact}
    whole |= refused or {}
    found: list[Unit] = []
    for members, axes in _components(traced):
        names = [g.name for g in members]
        why = _why_whole(model, traced, members, axes, degree)
        blocked = next((whole[n] for n in names if n in whole), None)
        if blocked is not None or isinstance(why, str):
            whole |= {n: whole.get(n, blocked or str(why)) for n in names}
            continue
        begins, ends = why
        weights = {a.tensor for a in axes if a.role != "pointwise"}
        macs = sum(layer.macs for layer in traced.profile.layers if layer.weight in weights)
        sent = sum(c.activation_bytes for c in traced.profile.layers if (c.weight or "").rpartition(".")[0] in ends)
        found.append(Unit(names[0], tuple(g.classes for g in members), begins, ends, macs, sent))
    picked = _independent(found)
    taken = {p: "beginning" for u in picked for p in u.begins} | {p: "end" for u in picked for p in u.ends}
    for unit in found:
        if unit not in picked:
            met = next(p for p in (*unit.begins, *unit.ends) if p in taken)
            reason = f"layer {met} is already at the {taken[met]} of a split part"
            whole |= {g.name: reason for g in channels.groups if any(g.classes is c for c in unit.families)}
    order = {g.name: i for i, g in enumerate(channels.groups)}
    return Choice(tuple(sorted(picked, key=lambda u: order[u.name])), whole)


def _independent(units: list[Unit]) -> list[Unit]:
    """Units of which no two meet in a layer, that together save the most arithmetic for what they send: a small integer programme."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not units:
        return []
    layers = sorted({p for u in units for p in (*u.begins, *u.ends)})
    meets = np.array([[p in u.begins or p in u.ends for u in units] for p in layers], dtype=float)
    worth = np.array([max(u.macs - u.sent_bytes, 1) for u in units], dtype=float)
    found = milp(-worth / worth.max(), constraints=LinearConstraint(meets, ub=1), integrality=1, bounds=Bounds(0, 1))
    return [u for u, x in zip(units, found.x, strict=True) if x > 0.5]


def _components(traced: Trace) -> list[tuple[list[ChannelGroup], list[Axis]]]:
    """Families joined where a layer makes or uses several; frozen ones are in the graph too, since they hold back what they are joined to."""
    groups = (*traced.channels.groups, *traced.channels.frozen)
    of = np.full(traced.channels.num_classes, -1)
    for i, g in enumerate(groups):
        of[g.classes.numpy()] = i
    root = list(range(len(groups)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    members_of: list[tuple[Axis, list[int]]] = []
    for axis in traced.channels.axes:
        labels = axis.labels.unique()
        members = sorted({int(of[c]) for c in labels[labels >= 0].tolist()} - {-1})  # a class may be in no family
        members_of.append((axis, members))
        if axis.role != "pointwise":
            for other in members[1:]:
                root[find(other)] = find(members[0])
    joined: dict[int, list[ChannelGroup]] = defaultdict(list)
    for i, g in enumerate(groups):
        joined[find(i)].append(g)
    axes: dict[int, list[Axis]] = defaultdict(list)
    for axis, members in members_of:
        for r in {find(m) for m in members}:
            axes[r].append(axis)
    return [(joined[r], axes[r]) for r in joined]


def _why_whole(
    model: nn.Module, traced: Trace, members: list[ChannelGroup], axes: list[Axis], degree: int
) -> str | tuple[tuple[str, ...], tuple[str, ...]]:
    """Why a unit cannot be split; or where it begins and ends."""
    fewest = min(len(g.classes) for g in members)
    if fewest < degree:
        return f"{fewest} channel{'s' if fewest != 1 else ''} that stay together for {degree} ranks"
    registered: dict[int, int] = defaultdict(int)
    for _, p in model.named_parameters(remove_duplicate=False):
        registered[id(p)] += 1
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    mine = _classes(traced, members)
    begins, ends = [], []
    for axis in axes:
        path = axis.tensor.rpartition(".")[0]
        layer = model.get_submodule(path)
        if axis.role == "pointwise":
            continue
        if not bool(mine[axis.labels].all()):
            return f"only some channels of {axis.tensor} belong to it"
        if registered[id(tensors[axis.tensor])] > 1:
            return f"{axis.tensor} is used by several modules"
        if axis.role == "in":
            if not isinstance(layer, _USERS):
                return f"a {type(layer).__name__} ({path}) uses it, whose sum over ranks is not known"
            ends.append(path)
        elif not _depthwise(layer):  # which is neither beginning nor end
            if not isinstance(layer, _MAKERS):
                return f"a {type(layer).__name__} ({path}) makes it, whose input may be used otherwise"
            begins.append(path)
    if not begins or not ends:
        return "no layer makes it" if not begins else "no layer uses it up"
    if set(begins) & set(ends):
        return f"{sorted(set(begins) & set(ends))[0]} makes what it uses"
    summed = _summed(traced, members, set(ends))
    return summed if summed is not None else (tuple(dict.fromkeys(begins)), tuple(dict.fromkeys(ends)))


def _classes(traced: Trace, members: list[ChannelGroup]) -> Tensor:
    """bool for every class, and False at the end for what has none."""
    mine = torch.zeros(traced.channels.num_classes + 1, dtype=torch.bool)
    for g in members:
        mine[g.classes] = True
    return mine


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels


def _summed(traced: Trace, members: list[ChannelGroup], ends: set[str]) -> str | None:
    """The first operation outside the layers at the end that sums over a unit's channels, or pairs them with one another."""
    mine = _classes(traced, members)
    of = torch.from_numpy(traced.classes.of)

    def inside(planes: tuple[Tensor, ...]) -> list[Tensor]:
        found = [of[p].unique() for p in planes]
        return [ids for ids in (ids[mine[ids]] for ids in found) if len(ids)]

    for step in traced.steps:
        taken = inside(step.inputs)
        if not taken or step.path in ends:
            continue
        given = [inside(planes) for planes in step.outputs]
        kept = torch.cat([i for planes in given for i in planes]) if any(given) else torch.empty(0, dtype=torch.int64)
        if step.op not in _PARTS and step.outputs and not bool(torch.isin(torch.cat(taken), kept).all()):
            return f"summed over in {step.op} in {step.path or 'the network itself'}"
        if any(len(planes) > 1 for planes in given):
            return f"paired with itself in {step.op} in {step.path or 'the network itself'}"
    return None
