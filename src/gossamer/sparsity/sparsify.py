"""Zeros in place of weights: the nearest sparse weights, or those that calibration data say matter least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.calibration import Batches, reestimate_batch_norm
from gossamer.errors import NothingToDo, SelectorError, UsageError, near
from gossamer.plan import Mask, Plan, apply_structure, input_specs, pack_mask
from gossamer.profiling import profile_or_sizes
from gossamer.projections import l1_project
from gossamer.result import ExampleInputs, Result, network_of
from gossamer.sources.batches import check_inputs
from gossamer.sources.layer_weights import layer_weights, other_parameters
from gossamer.sparsity.criteria import CRITERIA, needed, owners, scores
from gossamer.sparsity.reconstruction import reconstruct
from gossamer.sparsity.selection import SCOPES, Pattern, select


def sparsify(
    model: nn.Module | Result,
    *,
    sparsity: float | None = None,
    l0: int | None = None,
    l1: float | str | None = None,
    pattern: str | None = None,
    scope: str = "layer",
    ignore: Sequence[str] = (),
    criterion: str = "magnitude",
    calibration: Iterable[Any] | None = None,
    example_inputs: ExampleInputs = None,
    objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    reestimate_bn: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Set the weights of layers to zero where that costs least, without training.

    Zeros make the saved weights smaller, since they are coded; they make neither ONNX Runtime nor PyTorch's dense kernels faster.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> result = sparsify(net, sparsity=0.75)
        >>> [int((p == 0).sum()) for p in result.model.parameters() if p.dim() == 2], result.plan.counts()
        ([96, 48], {'mask': 2})

    Args:
        model: the network, which stays as it is, or a `Result`, whose plan is continued.
        sparsity: fraction of zeros, in (0, 1); exactly one of ``sparsity``, ``l0``, ``l1`` and an ``N:M`` pattern is given.
        l0: how many weights stay: in each tensor, in each output channel, or in all (scope). The nearest such weights are found exactly.
        l1: largest sum of magnitudes, of each tensor, output channel or of all, or a fraction of the present one, ``"50%"``. The nearest
            such weights are found exactly; those that stay are smaller than before.
        pattern: ``"2:4"`` (of 4 neighbours along the inputs 2 stay; any N:M), or blocks of outputs x inputs such as ``"4x1"`` with a
            ``sparsity`` or ``l0``, which then counts blocks. Weights that it does not divide are left alone, and named.
        scope: within what weights compete: ``"layer"``, ``"global"`` or ``"row"`` (each output channel).
        ignore: patterns (``fnmatch``) of module paths or tensor names that stay dense.
        criterion: ``"magnitude"``; with calibration data ``"taylor"``, ``"fisher"``, ``"snip"`` (gradients of the loss), ``"wanda"`` (weight
            times input), ``"second_order"`` (the weights that stay make up for those that go).
        calibration: batches of inputs, followed by labels where there are any.
        example_inputs: a tuple or dict of inputs; needed where a batch holds more than one input, and for MACs in the profiles.
        objective: ``(outputs, target) -> loss`` of the gradient criteria; default: cross-entropy.
        reestimate_bn: measure the statistics of batch norms again, where there are calibration data.
        progress: called with layers done and all, where that takes long.

    Returns:
        A `Result` whose plan holds a `Mask` for each weight. `gossamer.fit` on it keeps the zeros.

    Raises:
        UsageError: targets that contradict each other or do not fit, weights that are not finite, calibration data missing.
        SelectorError: an ``ignore`` pattern matches no weight.
        NothingToDo: no weight of any layer becomes zero.

    Source: l1: Duchi et al., ICML 2008; the criteria: see `gossamer.sparsity.scores` and `gossamer.sparsity.reconstruct`.
    """
    given = model if isinstance(model, Result) else None
    network = network_of(model, "sparsify")
    if example_inputs is None and given is not None:
        example_inputs = given.example_inputs
    wanted = _check(sparsity, l0, l1, pattern, scope, criterion)
    inputs = check_inputs(example_inputs) if example_inputs is not None else None
    needs_data = criterion != "magnitude"
    if needs_data:
        needed(criterion, calibration)
    if inputs is None and calibration is not None:
        inputs = _first_input(calibration)
    sparse = apply_structure(network, [])
    weights, notes = chosen_weights(sparse, ignore, wanted)
    masks: dict[str, Tensor]
    if l1 is not None:
        masks = _project_l1(weights, l1, scope)
    elif criterion == "second_order":
        assert calibration is not None
        batches = Batches(calibration, inputs, network)
        masks, values = reconstruct(
            network,
            list(owners(network, weights)),
            batches,
            sparsity=sparsity,
            pattern=wanted,
            scope=scope,
            norms=reestimate_bn,
            progress=progress,
        )
        with torch.no_grad():
            for name, value in values.items():
                sparse.get_parameter(name).copy_(value)
        rest = [n for n in weights if n not in masks]
        if rest:
            notes.append(f"left alone, not a linear layer or convolution that the data reach: {', '.join(rest)}")
    else:
        found, remarks = scores(sparse, weights, criterion, calibration=calibration, example_inputs=inputs, objective=objective)
        notes += remarks
        masks = select(found, sparsity=sparsity, keep=l0, scope=scope, pattern=wanted)
        with torch.no_grad():
            for name, kept in masks.items():
                weights[name].masked_fill_(~kept, 0)
    emptied = [n for n, kept in masks.items() if not bool(kept.any())]
    if emptied:
        notes.append(f"nothing is left of {', '.join(emptied)}: choose within layers (scope='layer'), or fewer zeros")
    if all(bool(kept.all()) for kept in masks.values()):
        raise NothingToDo("no weight becomes zero: ask for more zeros, or look at what is ignored and left alone: " + "; ".join(notes))
    if reestimate_bn and calibration is not None:
        layers_seen = reestimate_batch_norm(sparse, calibration, inputs)
        notes += [f"{layers_seen} batch norms re-estimated"] if layers_seen else []
    return as_result(given or network, sparse, masks, inputs, notes)


def as_result(
    source: nn.Module | Result, sparse: nn.Module, masks: Mapping[str, Tensor], inputs: ExampleInputs, notes: Sequence[str]
) -> Result:
    """A `Result` from a sparse network and its masks; the plan of a source that is a `Result` is continued."""
    edits = tuple(
        Mask(tensor=n, shape=tuple(kept.shape), nonzeros=int(kept.sum()), kept=pack_mask(kept))
        for n, kept in masks.items()
        if not bool(kept.all())
    )
    zeros, total = sum(int((~k).sum()) for k in masks.values()), sum(k.numel() for k in masks.values())
    lines = (f"{zeros / max(total, 1):.1%} of {total:,} weights are zero", *notes)
    after = profile_or_sizes(sparse, inputs)
    if isinstance(source, Result):
        return source.with_(model=sparse, plan=source.plan + edits, after=after, notes=(*source.notes, *lines))
    return Result(
        model=sparse,
        plan=Plan(edits=edits, inputs=input_specs(inputs) if inputs is not None else ()),
        before=profile_or_sizes(source, inputs),
        after=after,
        example_inputs=inputs,
        notes=lines,
    )


def chosen_weights(network: nn.Module, ignore: Sequence[str], pattern: Pattern | None) -> tuple[dict[str, nn.Parameter], list[str]]:
    """The weights that may become sparse, and one line for each reason why others do not."""
    weights, notes = layer_weights(network), list[str]()
    for expression in [ignore] if isinstance(ignore, str) else ignore:
        hit = [n for n in weights if fnmatchcase(n, expression) or fnmatchcase(n.rpartition(".")[0], expression)]
        if not hit:
            names = [*weights, *(n.rpartition(".")[0] for n in weights)]
            raise SelectorError(f"ignore={expression!r} matches no weight of a layer{near(expression, names)}")
        notes.append(f"ignored: {', '.join(hit)}")
        weights = {n: p for n, p in weights.items() if n not in hit}
    if pattern is not None:
        misfits = [n for n, p in weights.items() if not pattern.fits(tuple(p.shape))]
        if misfits:
            notes.append(f"left alone, the pattern does not divide them: {', '.join(misfits)}")
        weights = {n: p for n, p in weights.items() if n not in misfits}
    others = other_parameters(network)
    if others:
        notes.append(f"left alone, not weights of layers: {', '.join(others)}")
    for name, p in weights.items():
        if not bool(torch.isfinite(p.detach()).all()):
            raise UsageError(
                f"{name} holds {int((~p.detach().isfinite()).sum())} values that are NaN or infinite: check how it was trained"
            )
    if not weights:
        raise NothingToDo("the network has no weight that may become sparse" + (f" ({'; '.join(notes)})" if notes else ""))
    return weights, notes


def _check(
    sparsity: float | None, l0: int | None, l1: float | str | None, pattern: str | None, scope: str, criterion: str
) -> Pattern | None:
    """Targets that go together; the pattern."""
    if criterion not in CRITERIA:
        raise UsageError(f"criterion={criterion!r}: known are {', '.join(CRITERIA)}{near(str(criterion), CRITERIA)}")
    if scope not in SCOPES:
        raise UsageError(f"scope={scope!r}: known are {', '.join(SCOPES)}{near(str(scope), SCOPES)}")
    found = Pattern.parse(pattern) if pattern is not None else None
    regular = found is not None and found.block is None
    if (sparsity is not None) + (l0 is not None) + (l1 is not None) + regular != 1:
        raise UsageError("give exactly one of sparsity, l0, l1 and an N:M pattern")
    if sparsity is not None and not 0 < sparsity < 1:
        raise UsageError(f"sparsity={sparsity}: the fraction of zeros lies in (0, 1)")
    if l0 is not None and (isinstance(l0, bool) or not isinstance(l0, int) or l0 < 0):
        raise UsageError(f"l0={l0!r}: how many weights stay is an integer, 0 or more")
    if l1 is not None and (criterion != "magnitude" or found is not None):
        raise UsageError("l1 is a projection: it takes neither a criterion nor a pattern")
    if criterion == "second_order" and (l0 is not None or scope == "global" or (found is not None and found.block is not None)):
        raise UsageError("criterion='second_order' takes a sparsity or an N:M pattern, with scope 'layer' or 'row'")
    return found


def radius(l1: float | str, total: float) -> float:
    """A radius, absolute or as a percentage of the present sum of magnitudes.

    Examples:
        >>> radius("50%", 8.0), radius(3, 8.0)
        (4.0, 3.0)
    """
    if isinstance(l1, str):
        try:
            part = float(l1.removesuffix("%")) / 100 if l1.endswith("%") else -1.0
        except ValueError:
            part = -1.0
        if not 0 <= part < 1:
            raise UsageError(f"l1={l1!r}: write a number, or a percentage below 100 such as '50%'")
        return part * total
    return float(l1)


def project_l1(weights: Mapping[str, Tensor], l1: float | str, scope: str) -> dict[str, Tensor]:
    """The nearest weights in the L1 ball, of each tensor, row or all."""
    tensors = [p.detach() for p in weights.values()]
    if scope == "global":
        return dict(
            zip(weights, l1_project(tensors, radius(l1, float(sum(t.abs().sum(dtype=torch.float64) for t in tensors)))), strict=True)
        )
    out = {}
    for name, t in zip(weights, tensors, strict=True):
        total = float(t.abs().sum(dtype=torch.float64))
        rows = scope == "row"
        out[name] = l1_project(t, radius(l1, total / len(t) if rows else total), dim=0 if rows else None)
    return out


def _project_l1(weights: Mapping[str, nn.Parameter], l1: float | str, scope: str) -> dict[str, Tensor]:
    projected = project_l1(weights, l1, scope)
    with torch.no_grad():
        for name, new in projected.items():
            weights[name].copy_(new + 0.0)  # no negative zeros
    return {name: new != 0 for name, new in projected.items()}


def _first_input(calibration: Iterable[Any]) -> ExampleInputs:
    """The inputs of the first batch, cut to one sample: all but the last item of a tuple."""
    first = next(iter(calibration), None)
    if isinstance(first, Tensor):
        return (first[:1],)
    if isinstance(first, dict):
        return {k: v[:1] if isinstance(v, Tensor) else v for k, v in first.items()}
    if isinstance(first, tuple | list) and first and isinstance(first[0], Tensor):
        return tuple(t[:1] for t in (first[:-1] if len(first) > 1 else first))
    raise UsageError("cannot tell the inputs from a calibration batch: pass example_inputs")
