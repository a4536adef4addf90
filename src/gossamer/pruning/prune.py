"""Structured pruning: trace, score, choose, cut with a proof, compensate, re-estimate batch norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.calibration import reestimate_batch_norm
from gossamer.errors import BudgetError, NothingToDo, SelectorError, UsageError, WeightsError, near
from gossamer.plan import AsGraph, Plan, StructureEdit, input_specs
from gossamer.profiling.targets import latency_fraction, measured_fraction
from gossamer.pruning.allocation import Family, choose, everything, families
from gossamer.pruning.compensation import compensate as fold_back
from gossamer.pruning.costs import CostModel, channel_costs, mac_costs, parameter_costs
from gossamer.pruning.importance import Importance, importance_scores
from gossamer.pruning.latency import STEP, LatencyModel, latency_costs
from gossamer.result import Profile, Result, network_of
from gossamer.sources.batches import check_inputs
from gossamer.surgery import Cut, cut
from gossamer.trace import ChannelMap, Trace, costs, trace
from gossamer.trace.capture import capture

FORMS = ("module", "graph")
_ATTEMPTS = 4  # times that classes are chosen again where some turn out to be frozen, or the target is not quite met


def prune(
    model: nn.Module | Result,
    example_inputs: Any,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | str | None = None,
    importance: Importance = "l2",
    calibration: Iterable[Any] | None = None,
    compensate: bool = True,
    reestimate_bn: bool = True,
    ignore: Sequence[str] = (),
    round_to: int = 1,
    scope: str = "global",
    floor: float = 0.1,
    attention: str = "heads",
    form: str = "module",
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Remove whole channels until a target is met, and prove that the result computes what the plan says.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 2))
        >>> result = prune(net.eval(), (torch.zeros(1, 3, 8, 8),), ratio=0.5, scope="layer")
        >>> result.model[0].out_channels, result.model[3].in_channels, result.proof.holds
        (8, 8, True)

    Args:
        model: the network, or a `Result`, whose plan is continued; it is not changed.
        example_inputs: a tuple of positional inputs, or a dict of keyword inputs.
        ratio: fraction of the channels to remove, in (0, 1).
        macs: fraction of the multiply-adds to keep, in (0, 1).
        params: fraction of the parameters to keep, in (0, 1).
        latency: fraction of the original's latency in ONNX Runtime to keep, in (0, 1), or milliseconds (``"5ms"``). Every layer is timed at
            several widths first, and the pruned network itself at the end, beside the original. Exactly one of the four is given.
        importance: ``"l1"``, ``"l2"``, ``"bn_scale"``, ``"fpgm"``, ``"random"``; ``"taylor"``, ``"fisher"``, ``"activation"`` (these need
            calibration); or a callable ``(model, channels) -> scores``. See `gossamer.pruning.importance_scores`.
        calibration: batches; 100 samples do. Without them neither compensation nor re-estimation takes place, which a note says.
        compensate: fold what the removed channels carried into the layers that consumed them (ridge regression on calibration data).
        reestimate_bn: measure batch-norm statistics again on calibration data.
        ignore: patterns on module paths; channels that a matching module produces stay.
        round_to: channel counts that change become multiples of this; 8 for a latency target where it is left at 1.
        scope: ``"global"`` lets layers compete, ``"layer"`` takes the same fraction of each.
        floor: fraction of each family that stays at least, in [0, 1].
        attention: what leaves an attention: ``"heads"`` (whole ones), or ``"head_dim"`` (the same positions of all of them).
        form: ``"module"``, a network of the caller's own classes, or ``"graph"``: one graph of tensor operations (a `torch.fx.GraphModule`
            from `torch.export`), with every size a constant. A graph computes as in eval mode: train the module, not the graph.
        threads: of ONNX Runtime, for a latency target.
        seed: of ``importance="random"``.
        progress: called with stages done and all.

    Returns:
        A `Result`; its proof was taken before compensation.

    Raises:
        UsageError: an option out of range, or NaN weights.
        SelectorError: an ``ignore`` pattern matches nothing.
        BudgetError: the target cannot be reached; it says the lowest that can.
        NothingToDo: nothing can be pruned; the reasons are listed.
        TraceError: the network fails on the example inputs.
        ExportError: ``form="graph"`` of a network whose forward branches on a tensor's value.
    """
    given, model = model, network_of(model, "prune")
    target, kind = one_target(ratio=ratio, macs=macs, params=params, latency=latency)
    if scope not in ("global", "layer"):
        raise UsageError(f"scope={scope!r}: known are global, layer{near(str(scope), ('global', 'layer'))}")
    check_form(form)
    if round_to < 1 or not 0 <= floor <= 1:
        raise UsageError(f"round_to={round_to} must be at least 1 and floor={floor} within [0, 1]")
    _check_finite(model)
    example_inputs = check_inputs(example_inputs)
    if kind == "latency":
        target = within(latency_fraction(target, model, example_inputs, threads=threads), latency)
        round_to = round_to if round_to > 1 else STEP
    assert isinstance(target, float)
    traced = trace(model, example_inputs, attention=attention)
    if not traced.channels.groups:
        raise NothingToDo("nothing can be pruned: " + _reasons(traced))

    def score(channels: ChannelMap) -> Tensor:
        return importance_scores(model, channels, importance, example_inputs=example_inputs, calibration=calibration, seed=seed)

    loose = traced.loose()
    if loose is not None:
        traced = traced.reordered(loose, score(loose))
    kept = _ignored(model, traced, ignore)
    scores = score(traced.channels)
    made, after = _cut_to(
        model, traced, kept, scores, kind, target, scope=scope, round_to=round_to, floor=floor, threads=threads, progress=progress
    )
    edits: list[StructureEdit] = list(made.edits)
    notes = list(made.notes)
    if calibration is None:
        if compensate or reestimate_bn:
            notes.append("no calibration data: neither compensated nor were batch norms re-estimated")
    else:
        if compensate:
            masks = traced.channels.keep_masks(made.removed)
            added, left = fold_back(model, made.model, masks, calibration, example_inputs, progress=progress)
            edits += added
            notes += left
        if reestimate_bn:
            reestimate_batch_norm(made.model, calibration, example_inputs)
    result = Result(
        model=made.model,
        plan=Plan(edits=tuple(edits), inputs=input_specs(example_inputs)),
        before=traced.profile,
        after=after,
        proof=made.proof,
        example_inputs=example_inputs,
        notes=tuple(notes),
    )
    return in_form(given.then(result) if isinstance(given, Result) else result, form)


def in_form(result: Result, form: str) -> Result:
    """A pruned network as ``"module"``, which it is, or as ``"graph"``."""
    if form == "module":
        return result
    graph = capture(result.model, result.example_inputs)
    return result.with_(model=graph, plan=result.plan + [AsGraph()], notes=(*result.notes, *graph.meta["notes"]))


def check_form(form: str) -> None:
    """UsageError for another form than `FORMS`."""
    if form not in FORMS:
        raise UsageError(f"form={form!r}: known are {', '.join(FORMS)}{near(str(form), FORMS)}")


def one_target(**given: float | str | None) -> tuple[float | str, str]:
    """The one target: fraction to keep (or milliseconds as they were given), and of what."""
    named = {k: v for k, v in given.items() if v is not None}
    if len(named) != 1:
        raise UsageError(f"give exactly one of {', '.join(given)}, not {len(named)}")
    ((kind, value),) = named.items()
    if isinstance(value, str):
        if kind != "latency":
            raise UsageError(f"{kind}={value!r}: give a fraction between 0 and 1 (exclusive)")
        return value, kind
    within(value, value, kind)
    return (1 - value if kind == "ratio" else float(value)), kind


def within(value: float, given: Any, kind: str = "latency") -> float:
    """The fraction, which must lie between 0 and 1; ``given`` is how the caller wrote it."""
    if not 0 < value < 1:
        said = "" if value == given else f" is {value:.2f} of the original's"
        raise UsageError(f"{kind}={given}{said}: give a fraction between 0 and 1 (exclusive)")
    return value


def _check_finite(model: nn.Module) -> None:
    parameters = {n for n, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        # a buffer may hold infinities that mean something: a mask, a clamp that is off
        if tensor.is_floating_point() and not bool((torch.isfinite(tensor) if name in parameters else ~tensor.isnan()).all()):
            raise WeightsError(f"{name} holds NaN or infinite values: importance cannot be measured, check how the network was trained")


def _reasons(traced: Trace) -> str:
    reasons = list(dict.fromkeys(g.frozen for g in traced.channels.frozen if g.frozen))
    return "; ".join(reasons[:3]) + (f" (+{len(reasons) - 3} more)" if len(reasons) > 3 else "") if reasons else "it has no channels"


def _ignored(model: nn.Module, traced: Trace, patterns: Sequence[str]) -> Tensor:
    """Classes that must stay, bool of shape ``(num_classes,)``."""
    if isinstance(patterns, str):
        patterns = (patterns,)
    kept = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    names = [n for n, _ in model.named_modules() if n]
    for pattern in patterns:
        hit = {n for n in names if fnmatchcase(n, pattern)} | {g.name for g in traced.channels.groups if fnmatchcase(g.name, pattern)}
        if not hit:
            raise SelectorError(f"ignore={pattern!r} matches no module{near(pattern, names)}")
        for axis in traced.channels.axes:
            module = axis.tensor.rpartition(".")[0]
            if axis.role == "out" and any(module == h or module.startswith(h + ".") for h in hit):
                kept[axis.labels[axis.labels >= 0]] = True
        for group in traced.channels.groups:
            if group.name in hit:
                kept[group.classes] = True
    return kept


def _cost(model: nn.Module, traced: Trace, kind: str, kept: Tensor) -> CostModel | LatencyModel:
    """What is limited; a ratio is of the channels that can go at all."""
    if kind == "ratio":
        return channel_costs(traced.channels, kept)
    if kind == "macs":
        return mac_costs(traced.channels, traced.profile, {n: tuple(t.shape) for n, t in model.state_dict().items()})
    return parameter_costs(traced.channels, traced.profile, {n: tuple(p.shape) for n, p in model.named_parameters()})


def _cut_to(
    model: nn.Module,
    traced: Trace,
    kept: Tensor,
    scores: Tensor,
    kind: str,
    target: float,
    *,
    scope: str,
    round_to: int,
    floor: float,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Cut, Profile]:
    """Choose and cut; choose again where surgery had to leave classes in, or where the true cost is above the target."""
    none = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    over_by, notes = 0.0, list[str]()
    found: list[tuple[float, Cut, Profile]] = []
    cost: CostModel | LatencyModel | None = None
    for _ in range(_ATTEMPTS):
        fams = families(traced.channels.groups, scores, round_to=round_to, floor=floor, kept=kept)
        if not fams:
            raise NothingToDo(f"nothing can be pruned: every family is at its floor, ignored or frozen ({_reasons(traced)})")
        if kind != "latency":
            cost = _cost(model, traced, kind, kept)
        elif cost is None:
            cost = latency_costs(model, traced.channels, traced.profile, threads=threads, progress=progress)
        assert cost is not None
        start = cost.total(none)
        removed = _chosen(fams, cost, (target - over_by) * start, scope, bool(found))
        if not bool(removed.any()):
            raise NothingToDo("nothing to prune: the target is met by the network as it is, or steps of round_to are too coarse for it")
        made = cut(model, traced, removed)
        notes += [n for n in made.notes if n not in notes]
        after = costs(made.model, traced.example_inputs)
        said = ""
        if kind == "latency":
            true, said = measured_fraction(model, made.model, traced.example_inputs, threads=threads)
        else:
            true = {"macs": after.macs / traced.profile.macs, "params": after.params / traced.profile.params}.get(kind, target)
        found.append((true, replace(made, notes=(*made.notes, said) if said else made.notes), after))
        tolerance = 0.03 if kind == "latency" else 0.005
        if not bool((made.frozen & removed).any()) and true <= target * (1 + tolerance):
            break
        kept = kept | made.frozen
        over_by += max(true - target, 0.0)
    met = [f for f in found if f[0] <= target * 1.03] or [min(found, key=lambda f: f[0])]
    true, made, after = met[-1]
    if kind == "latency":
        notes.append(made.notes[-1] + ("" if true <= target * 1.03 else f", above the target of {target:.2f}"))
    return replace(made, notes=tuple(dict.fromkeys(notes))), after


def _chosen(fams: Sequence[Family], cost: Any, goal: float, scope: str, again: bool) -> Tensor:
    """Classes to remove; where the target became unreachable only because of what turned out to be frozen, as many as can go."""
    try:
        return choose(fams, cost, goal, scope=scope)  # type: ignore[arg-type]
    except BudgetError:
        if not again:
            raise
        return everything(fams, cost.num_classes)
