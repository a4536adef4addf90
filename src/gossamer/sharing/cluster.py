"""Weight sharing after training: a codebook for each weight, chosen by k-means, as edits of the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gossamer.errors import NothingToDo, SelectorError, UsageError, near
from gossamer.plan import Plan, Share, apply_structure, input_specs
from gossamer.profiling import profile_or_sizes
from gossamer.result import ExampleInputs, Result, network_of
from gossamer.sharing.kmeans import kmeans_1d
from gossamer.sources.batches import check_inputs
from gossamer.sources.layer_weights import layer_weights, other_parameters

SCOPES = ("tensor", "shape", "network")
ZEROS = 0.1
"""Fraction of exact zeros from which on they stay zero and take no value of the codebook."""
PAYS = 4
"""Entries of a weight for each value of its codebook from which on sharing pays."""


def cluster(
    model: nn.Module | Result,
    *,
    bits: int = 4,
    groups: int = 1,
    scope: str = "tensor",
    ignore: Sequence[str] = (),
    example_inputs: ExampleInputs = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Let the entries of each weight share ``2**bits`` values, the ones with the least squared error, without training.

    In memory the weights stay as wide as they were; a saved result holds a code of at most ``bits`` bits for each entry, and the codebooks.
    `gossamer.sharing.fine_tune` trains the values.

    Examples:
        >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> result = cluster(net, bits=2)
        >>> [len(net[i].weight.unique()) for i in (0, 2)], [len(result.model[i].weight.unique()) for i in (0, 2)]
        ([512, 256], [4, 4])

    Args:
        model: a network, or a `Result` whose plan is continued. It is not changed.
        bits: of a code, 2 to 8. Where at least a tenth of a weight is exactly zero, zeros stay zero: they are one code, values the others.
        groups: equal blocks of output channels (dimension 0) with a codebook of their own; 1 for a weight whose dimension 0 they do not
            divide, which a note says.
        scope: what shares a codebook: each ``"tensor"``, all weights of one ``"shape"``, or the whole ``"network"``.
        ignore: patterns (``fnmatch``) of module paths or weight names; those weights stay as they are.
        example_inputs: a tuple of positional inputs, or a dict of keyword inputs, for MACs and activations in the profiles. A `Result` brings
            its own.
        progress: called with codebooks done and in all.

    Returns:
        A `Result`; its notes say what was left alone and why.

    Raises:
        UsageError: an option out of range, NaN in a weight, a network that is already quantised.
        SelectorError: an ``ignore`` pattern matches no weight.
        NothingToDo: no weight would change.

    Source: Han, Mao and Dally, "Deep Compression", ICLR 2016, arXiv:1510.00149.
    """
    if isinstance(ignore, str):
        ignore = (ignore,)
    _check_options(bits=bits, groups=groups, scope=scope)
    result = model if isinstance(model, Result) else None
    network = network_of(model, "cluster")
    if example_inputs is None and result is not None:
        example_inputs = result.example_inputs
    elif example_inputs is not None:
        example_inputs = check_inputs(example_inputs)
    weights, notes = _chosen(network, tuple(ignore))
    edits, more = _edits(weights, bits=bits, groups=groups, scope=scope, progress=progress)
    notes += more
    if not edits:
        raise NothingToDo("nothing to share: the network has no weight that a codebook would change" + "".join(f"; {n}" for n in notes))
    notes.append(_bytes(weights, edits))
    clustered = apply_structure(network, edits)
    after = profile_or_sizes(clustered, example_inputs)
    if result is not None:
        return result.with_(
            model=clustered,
            plan=result.plan + edits,
            after=after,
            example_inputs=example_inputs,
            notes=(*result.notes, *notes),
            report=None,
        )
    plan = Plan(edits=tuple(edits), inputs=input_specs(example_inputs) if example_inputs is not None else ())
    before = profile_or_sizes(network, example_inputs)
    return Result(clustered, plan, before, after, example_inputs=example_inputs, notes=tuple(notes))


def _check_options(*, bits: int, groups: int, scope: str) -> None:
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise UsageError(f"bits={bits!r}: give an integer from 2 to 8")
    if not isinstance(groups, int) or groups < 1:
        raise UsageError(f"groups={groups!r}: give an integer of at least 1")
    if scope not in SCOPES:
        raise UsageError(f"scope={scope!r}: known are {', '.join(SCOPES)}{near(str(scope), SCOPES)}")


def _chosen(network: nn.Module, ignore: tuple[str, ...]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of layers that are not ignored, and notes on the others."""
    weights: dict[str, Tensor] = {name: p.detach() for name, p in layer_weights(network).items()}
    places: dict[int, list[str]] = {}  # a tied weight can be ignored by any of its names
    for name, p in network.named_parameters(remove_duplicate=False):
        places.setdefault(id(p), []).append(name)
    names = {name: places[id(p)] for name, p in layer_weights(network).items()}
    ignored: dict[str, None] = {}
    for pattern in ignore:
        hits = [name for name, aliases in names.items() if any(_matches(pattern, alias) for alias in aliases)]
        if not hits:
            known = [n for aliases in names.values() for alias in aliases for n in (_path(alias), alias)]
            raise SelectorError(f"ignore pattern {pattern!r} matches no weight of a layer{near(pattern, known)}")
        ignored |= dict.fromkeys(hits)
    notes = [f"left alone, ignored: {_listed(list(ignored))}"] if ignored else []
    others = list(other_parameters(network))
    if others:
        notes.append(f"left alone, no weights of layers: {_listed(others)}")
    for name, w in weights.items():
        if not bool(torch.isfinite(w).all()):
            raise UsageError(f"{name} holds NaN or infinity")
    return {name: w for name, w in weights.items() if name not in ignored}, notes


def _path(name: str) -> str:
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def _matches(pattern: str, name: str) -> bool:
    path = _path(name)
    return fnmatchcase(name, pattern) or fnmatchcase(path, pattern) or path.startswith(pattern + ".")


@dataclass
class _Family:
    """Weights with the same codebooks."""

    blocks: int
    members: dict[str, Tensor]

    def values(self, *, zeros: bool) -> list[NDArray[np.float64]]:
        """Entries of each block of all members; without zeros where those take no value."""
        parts = [w.to("cpu", torch.float64).reshape(self.blocks, -1).numpy() for w in self.members.values()]
        joined = np.concatenate(parts, axis=1)
        return [row[row != 0] if zeros else row for row in joined]


def _edits(
    weights: Mapping[str, Tensor], *, bits: int, groups: int, scope: str, progress: Callable[[int, int], None] | None
) -> tuple[list[Share], list[str]]:
    """The edits, and a note for each kind of thing that is not as asked for."""
    families: dict[object, _Family] = {}
    whole, small, few = list[str](), list[str](), list[str]()
    for name, w in weights.items():
        blocks = groups if w.shape[0] % groups == 0 else 1
        if blocks != groups:
            whole.append(name)
        key = (w.dtype, blocks, {"tensor": name, "shape": tuple(w.shape), "network": ""}[scope])
        families.setdefault(key, _Family(blocks, {})).members[name] = w
    edits = []
    total, done = sum(f.blocks for f in families.values()), 0
    tell = progress or (lambda done, total: None)
    for family in families.values():
        members = family.members
        tell(done, total)
        done += family.blocks
        if sum(w.numel() for w in members.values()) < PAYS * 2**bits * family.blocks:
            small += members
            continue
        zeros = any(float((w == 0).double().mean()) >= ZEROS for w in members.values())
        values, size = family.values(zeros=zeros), 2**bits - zeros
        if all(len(np.unique(v)) <= size for v in values):
            few += members
            continue
        dtype = next(iter(members.values())).dtype
        books = []
        for i, v in enumerate(values):
            tell(done - family.blocks + i, total)
            books.append(kmeans_1d(v, size)[0] if len(v) else np.zeros(1))
        codebooks = tuple(tuple(torch.from_numpy(b).to(dtype).to(torch.float64).tolist()) for b in books)
        edits.append(Share(tensors=tuple(members), bits=bits, codebooks=codebooks, zeros=zeros))
    tell(total, total)
    notes = []
    if small:
        notes.append(f"left alone, fewer than {PAYS * 2**bits} entries for each codebook: {_listed(small)}")
    if few:
        notes.append(f"left alone, no more distinct values than a codebook has: {_listed(few)}")
    if whole := [n for n in whole if n not in {*small, *few}]:
        notes.append(f"one codebook and not {groups}, which do not divide the output channels: {_listed(whole)}")
    return edits, notes


def _bytes(weights: Mapping[str, Tensor], edits: Iterable[Share]) -> str:
    """What the shared weights take as codes with their codebooks, and what they take as they are."""
    coded = held = count = 0
    for edit in edits:
        each = weights[edit.tensors[0]].element_size()
        entries = [weights[name].numel() for name in edit.tensors]
        coded += sum(-(-n * edit.bits // 8) for n in entries) + each * sum(map(len, edit.codebooks))
        held += each * sum(entries)
        count += len(entries)
    return f"shared by {count} weights: {coded:,} bytes as codes with their codebooks, where they take {held:,} in memory, as before"


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
