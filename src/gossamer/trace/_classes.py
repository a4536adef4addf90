"""From a ledger to classes: union-find over all pairs at once, regularity to a fixed point, families, and what is frozen and why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from gossamer.trace._ledger import Array, Ledger, Rectangle
from gossamer.trace.channels import Axis, ChannelGroup, ChannelMap

_MOST_ROUNDS = 64  # of regularity; every round merges classes, so that a fixed point is always reached


@dataclass(frozen=True)
class Classes:
    """Resolved labels.

    Attributes:
        of: class id of every label, -1 for label 0.
        channels: the public map.
        consumers: ``(tensor, dim)`` of every axis that consumes channels, those that also produce them included.
        inexact: bool for every class.
    """

    of: Array
    channels: ChannelMap
    consumers: frozenset[tuple[str, int]]
    inexact: Array


def resolve(ledger: Ledger, *, regular: bool = True, order: Array | None = None) -> Classes:
    """Merge what belongs together and describe what is left.

    Args:
        ledger: of a trace.
        regular: whether what must stay rectangular is seen to; without it classes are as fine as the operations alone make them.
        order: a value for every label: rows that must lose equally many are coupled in this order instead of by position.
    """
    root, blurred = _regular(ledger, order) if regular else (_merge(ledger.size, ledger.pairs), [])
    present, of = np.unique(root[1:], return_inverse=True)
    n = len(present)
    of = np.concatenate([[-1], of.reshape(-1)])
    frozen = _reasons(ledger.frozen, of)
    inexact = _reasons([*ledger.inexact, *blurred, *_broken_rows(ledger, of)], of)
    return _describe(ledger, of, n, frozen, inexact)


def _merge(size: int, pairs: list[tuple[Array, Array]]) -> Array:
    """Component of every label under all pairs; label 0 stays by itself."""
    if not pairs:
        return np.arange(size)
    x, y = np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])
    graph = coo_array((np.ones(len(x), dtype=np.int8), (x, y)), shape=(size, size))
    return connected_components(graph, directed=False)[1]


def _regular(ledger: Ledger, order: Array | None) -> tuple[Array, list[tuple[Array, str]]]:
    """Components once every rectangle stays rectangular, whichever classes are removed; and labels that this makes inexact."""
    pairs = list(ledger.pairs)
    root = _merge(ledger.size, pairs)
    for _ in range(_MOST_ROUNDS):
        new: list[tuple[Array, Array]] = []
        for rectangle in ledger.rectangles:
            new += _couple(rectangle, root, order)
        if not new:
            break
        pairs = [*pairs, *new]
        root = _merge(ledger.size, pairs)
    blurred = [
        (part.reshape(-1), r.note)
        for r in ledger.rectangles
        if r.kind == "group" and r.note and not _whole_rows(r.parts, root)
        for part in r.parts
    ]
    return root, blurred


def _couple(rectangle: Rectangle, root: Array, order: Array | None) -> list[tuple[Array, Array]]:
    """Pairs that make one rectangle regular; none where it is.

    Rows that lose equally many may each make a choice of their own: the k-th of one row, in the order given, goes with the k-th of the others.
    """
    if rectangle.kind == "box":
        return _couple_box(rectangle.parts[0], root)
    if rectangle.kind == "group" and _whole_rows(rectangle.parts, root):
        return []
    pairs = []
    for part in rectangle.parts:
        if not _even(part, root):
            if order is not None and bool((part != 0).all()):
                part = np.take_along_axis(part, np.argsort(order[part], axis=1, kind="stable"), axis=1)
            pairs.append((np.broadcast_to(part[:1], part.shape).reshape(-1), part.reshape(-1)))
    return [(x[keep], y[keep]) for x, y in pairs if (keep := (x != 0) & (y != 0)).any()]


def _couple_box(plane: Array, root: Array) -> list[tuple[Array, Array]]:
    """A box must lose whole slabs along one dimension: the one that leaves the most classes."""
    box = plane.squeeze()
    if box.ndim < 2:
        return []
    roots = root[box]
    options = []
    for d in range(box.ndim):
        slabs = np.moveaxis(roots, d, 0).reshape(box.shape[d], -1)
        if (slabs == slabs[:, :1]).all():
            return []
        index = np.repeat(np.arange(box.shape[d]), slabs.shape[1])
        known, local = np.unique(slabs.reshape(-1), return_inverse=True)
        graph = coo_array(
            (np.ones(len(index), dtype=np.int8), (index, local.reshape(-1) + box.shape[d])), shape=(box.shape[d] + len(known),) * 2
        )
        options.append((connected_components(graph, directed=False)[0], d))
    _, best = max(options)
    rows = np.moveaxis(box, best, 0).reshape(box.shape[best], -1)
    return [(np.broadcast_to(rows[:, :1], rows.shape).reshape(-1), rows.reshape(-1))]


def _whole_rows(parts: tuple[Array, ...], root: Array) -> bool:
    """Whether every class takes whole rows, the same ones in every part."""
    first = root[parts[0]][:, :1]
    return all(bool((root[p] == first).all()) for p in parts) and len(np.unique(first)) > 1


def _even(part: Array, root: Array) -> bool:
    """Whether every class takes equally many elements of each row."""
    rows = np.sort(root[part], axis=1)
    return bool((rows == rows[:1]).all())


def has_free_rows(ledger: Ledger, classes: Classes) -> bool:
    """Whether rows lose equally many channels, so that each could choose its own."""
    root = _merge(ledger.size, ledger.pairs)
    return any(
        r.kind != "box" and not all(_even(p, root) for p in r.parts) and not (r.kind == "group" and _whole_rows(r.parts, classes.of + 1))
        for r in ledger.rectangles
    )


def _reasons(entries: list[tuple[Array, str]], of: Array) -> dict[int, str]:
    """The first reason given for each class."""
    reasons: dict[int, str] = {}
    for labels, reason in entries:
        for c in np.unique(of[labels]):
            if c >= 0:
                reasons.setdefault(int(c), reason)
    return reasons


def _broken_rows(ledger: Ledger, of: Array) -> list[tuple[Array, str]]:
    """Rows that are normalised as a whole and can lose a part."""
    out = []
    for rows, reason in ledger.rows:
        classes = of[rows]
        broken = (classes != classes[:, :1]).any(1)
        if broken.any():
            out.append((rows[broken].reshape(-1), reason))
    return out


def _describe(ledger: Ledger, of: Array, n: int, frozen: dict[int, str], inexact: dict[int, str]) -> Classes:
    owner = np.concatenate([[-1], np.repeat(np.arange(len(ledger.origins)), [o.count for o in ledger.origins])])
    roles = [ledger.roles.get((o.tensor, o.dim), set()) for o in ledger.origins]
    produces, consumes = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    for role, mark in (("out", produces), ("in", consumes)):
        which = np.array([role in r for r in roles], dtype=bool)
        mark[of[1:][which[owner[1:]]]] = True
    for eaten in ledger.consumed:
        inside = of[eaten]
        consumes[inside[inside >= 0]] = True
    axes = []
    for o, r in zip(ledger.origins, roles, strict=True):
        if not o.tensor:
            continue
        labels = torch.from_numpy(of[o.start : o.start + o.count].reshape(o.shape).copy())
        axes.append(Axis(o.tensor, o.dim, labels, "out" if "out" in r else "in" if "in" in r else "pointwise"))
    groups, stay = [], []
    names: dict[str, int] = {}
    for first, classes, width in _families(ledger, of, n, owner):
        c = int(classes[0])
        if not ledger.origins[first].tensor:
            continue
        reason = frozen.get(c)
        if reason is None and not produces[c]:
            reason = "no layer produces these channels"
        if reason is None and not consumes[c]:
            reason = "no layer with weights consumes these channels"
        name = ledger.origins[first].tensor.rpartition(".")[0] or ledger.origins[first].tensor
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}#{names[name]}"
        blurred = tuple(dict.fromkeys(inexact[int(k)] for k in classes if int(k) in inexact))
        group = ChannelGroup(name, torch.from_numpy(classes.copy()), width, reason, blurred)
        if reason is None and len(classes) > 1:
            groups.append(group)
        elif produces[c] or consumes[c]:
            stay.append(
                group
                if reason
                else ChannelGroup(name, group.classes, width, "a single class: removing it would remove everything", blurred)
            )
    consumers = frozenset((o.tensor, o.dim) for o, r in zip(ledger.origins, roles, strict=True) if "in" in r)
    blur = np.zeros(n, dtype=bool)
    blur[list(inexact)] = True
    return Classes(of, ChannelMap(tuple(groups), tuple(stay), tuple(axes), n), consumers, blur)


def _families(ledger: Ledger, of: Array, n: int, owner: Array) -> list[tuple[int, Array, int]]:
    """Classes with the same signature: which origins and slots they appear in, how often, and whether and why they are frozen.

    Returns:
        First producing origin, classes in its channel order, channels of it per class; in execution order.
    """
    signature = np.zeros(n, dtype=np.uint64)
    random = np.random.default_rng(0)
    keys = random.integers(1, 2**63, size=len(ledger.origins) + len(ledger.slots), dtype=np.int64).astype(np.uint64)
    pairs, counts = np.unique(of[1:].astype(np.int64) * len(ledger.origins) + owner[1:], return_counts=True)
    klass, origin = pairs // len(ledger.origins), pairs % len(ledger.origins)
    with np.errstate(over="ignore"):
        np.add.at(signature, klass, keys[origin] * (2 * counts.astype(np.uint64) + np.uint64(1)))
        for i, slot in enumerate(ledger.slots):
            inside = np.unique(of[slot])
            signature[inside[inside >= 0]] += keys[len(ledger.origins) + i]
        for salt, entries in ((3, ledger.frozen), (5, ledger.inexact)):
            for labels, _ in entries:
                mark = np.zeros(n, dtype=bool)
                inside = of[labels]
                mark[inside[inside >= 0]] = True
                signature[mark] |= np.uint64(salt) << np.uint64(60)
    produced = np.array(["out" in ledger.roles.get((o.tensor, o.dim), set()) for o in ledger.origins], dtype=bool)
    nameless = np.array([not o.tensor for o in ledger.origins], dtype=bool)
    rank = np.where(produced[origin], origin, origin + len(ledger.origins)) + 2 * len(ledger.origins) * nameless[origin]
    order = np.lexsort((rank, klass))
    firsts = order[np.unique(klass[order], return_index=True)[1]]
    home, per_class = origin[firsts], counts[firsts]
    position = np.full(n, of.size, dtype=np.int64)
    starts = np.array([o.start for o in ledger.origins], dtype=np.int64)
    at_home = owner[1:] == home[of[1:]]
    labels = np.arange(1, of.size)
    np.minimum.at(position, of[1:][at_home], labels[at_home])
    found = []
    for _, members in _grouped(signature):
        members = members[np.argsort(position[members], kind="stable")]
        found.append((int(home[members[0]]), members.astype(np.int64), int(per_class[members[0]])))
    found.sort(key=lambda f: (int(starts[f[0]]), int(position[f[1][0]])))
    return list(found)


def _grouped(keys: Array) -> list[tuple[int, Array]]:
    """Indices of equal keys."""
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(np.diff(keys[order])) + 1
    return [(int(i[0]), i) for i in np.split(order, edges) if len(i)]
