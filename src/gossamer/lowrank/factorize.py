"""Low rank: layers of a network become sequences of smaller ones, where that pays, at ranks that are given, found or allocated to a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.calibration import MOST_INPUTS, Batches, Divergence, Halves, following_norms, reestimate_batch_norm
from gossamer.errors import NothingToDo, UsageError, near
from gossamer.exchange import check_finite
from gossamer.lowrank.allocation import Budget, allocate
from gossamer.lowrank.choice import RankSpec, chosen_ranks
from gossamer.lowrank.fitting import Fitted
from gossamer.lowrank.layers import Site, find_sites
from gossamer.lowrank.options import Option, fit_all, timed
from gossamer.lowrank.structure import METHODS
from gossamer.plan import Factorize, Plan, apply_structure, input_specs, replace_module
from gossamer.profiling import profile
from gossamer.result import ExampleInputs, Result, network_of
from gossamer.sources.batches import check_inputs

AUTO = ("svd", "spatial_svd", "tucker2")
"""Methods that ``method="auto"`` chooses from: CP takes seconds to minutes a layer, and its factors are hard to train."""
Method = Literal["auto", "svd", "spatial_svd", "tucker2", "cp"]


def factorize(
    model: nn.Module | Result,
    example_inputs: ExampleInputs = None,
    *,
    method: Method | Sequence[str] = "auto",
    rank: RankSpec | Mapping[str, RankSpec] | None = None,
    energy: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | str | None = None,
    calibration: Iterable[Any] | None = None,
    ignore: Sequence[str] = (),
    round_to: int | None = None,
    reestimate_bn: bool = True,
    runtime: Literal["onnxruntime"] | None = "onnxruntime",
    samples: int = 64,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Replace layers by products of smaller ones: fewer multiply-adds and parameters, for an error that calibration data keep small.

    Dense k x k convolutions and large linear layers have low rank to give; the pointwise layers of compact networks have little.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.Flatten(), nn.Linear(1024, 10))
        >>> result = factorize(net, (torch.zeros(1, 3, 4, 4),), method="spatial_svd", rank={"2": 16}, runtime=None)
        >>> [tuple(m.weight.shape) for m in result.model[2]], result.after.macs < result.before.macs
        ([(16, 64, 3, 1), (64, 16, 1, 3)], True)

    Args:
        model: the network, which stays as it is, or a `Result`, whose plan is continued.
        example_inputs: a tuple or dict of inputs; a `Result` brings its own.
        method: ``"svd"`` (two layers; the kernel goes with the first), ``"spatial_svd"`` (k x 1, then 1 x k), ``"tucker2"`` (pointwise, k x k,
            pointwise), ``"cp"`` (pointwise, one depthwise layer for each kernel axis, pointwise), or several of them: at given ranks
            each layer takes the first that saves work, else the best. ``"auto"`` is all but CP, and only where a layer gets faster in ONNX Runtime. Layers that a method is not
            made for are left alone.
        rank: of each group: an integer, a fraction of the full rank, two of either for Tucker-2, ``"evbmf"`` (what stands out of noise, by
            variational Bayes; for experts: trained weights have no noise), or a dict from patterns of module paths to ranks.
        energy: fraction of the squared singular values to keep, in (0, 1]; of the outputs, where there are calibration data.
        macs, params: fraction of the network's to keep, in (0, 1). Each layer's loss is judged alone at several ranks, as the divergence of
            the network's outputs; ranks are allocated over all layers together.
        latency: fraction of the network's latency in ONNX Runtime to keep, in (0, 1), or milliseconds (``"5ms"``). Exactly one of the five
            is given.
        calibration: batches; factors then minimise the error of the layers' outputs, and biases (or the batch norm that follows) make up for the
            means. Without them factors are those of the weights alone. Two batches or more: where a layer sees little of its inputs, its losses
            on every other batch are those of factors fitted to the rest.
        ignore: patterns of module paths that stay as they are.
        round_to: ranks that are not given are multiples of this; None for 8, less in narrow layers, and not where that measured slower.
        reestimate_bn: measure batch-norm statistics again on calibration data.
        runtime: layers are timed there; None times nothing: the plan then depends on seed and data alone.
        samples: of the calibration data, on which losses are judged.
        threads: of ONNX Runtime.
        seed: of CP's start.
        progress: called with steps done and all; under a budget each option is fitted, then judged.

    Returns:
        A `Result` whose plan holds a `Factorize` for each layer. Notes tell what was left alone, and which layers got slower.

    Raises:
        UsageError: targets that contradict each other or lie out of range.
        SelectorError: a pattern matches no layer.
        BudgetError: the budget cannot be reached; it says the lowest that can.
        NothingToDo: no layer is factorised; the reasons are listed.

    Source: see `gossamer.lowrank.decompositions`; allocation: one-at-a-time sensitivity and a multiple-choice knapsack.
    """
    given = model if isinstance(model, Result) else None
    network = network_of(model, "factorize")
    if example_inputs is None and given is not None:
        example_inputs = given.example_inputs
    if given is not None and "as_graph" in given.plan.counts():
        raise NothingToDo("no layer can be factorised: the plan wrote the network down as a graph; factorise before prune(form='graph')")
    inputs = check_inputs(example_inputs)
    methods, auto = _methods(method)
    budget = _target(rank=rank, energy=energy, macs=macs, params=params, latency=latency)
    if runtime not in ("onnxruntime", None):
        raise UsageError(f"runtime={runtime!r}: known are 'onnxruntime' and None")
    if runtime is None and latency is not None:
        raise UsageError("a latency target needs runtime='onnxruntime'")
    if (round_to is not None and round_to < 1) or samples < 1:
        raise UsageError(f"round_to={round_to} and samples={samples} must be at least 1")
    check_finite(network)
    before = profile(network, inputs)
    work = apply_structure(network, [])
    sites, notes = find_sites(work, inputs, ignore)
    if not sites:
        raise NothingToDo("no layer can be factorised" + _because(notes))
    batches = Batches(calibration, inputs, work) if calibration is not None else None
    norms = following_norms(work, [s.name for s in sites], batches) if batches is not None else {}
    named = {s.name: replace(s, gains_bias=batches is not None and s.layer.bias is None and s.name not in norms) for s in sites}
    if batches is not None:
        large = [n for n, s in named.items() if s.dims.ins * s.dims.taps > MOST_INPUTS]
        notes += [f"plain factors, too many inputs for their moments: {', '.join(large)}"] if large else []
    else:
        notes.append("no calibration data: factors of the weights alone")
    fast = runtime is not None
    if budget is None:
        picks, remarks = chosen_ranks(
            work, named, methods, auto, rank, energy, batches, round_to=round_to, threads=threads if fast else None
        )
        fitted: dict[str, Fitted] = {}
        halves = Halves(work, {n: named[n].layer for n in picks}, batches)
        for name, _, (found, _) in fit_all(halves, {n: [o] for n, o in picks.items()}, named, seed):
            fitted[name] = found
            if progress is not None:
                progress(len(fitted), len(picks))
    else:
        far = Divergence(work, batches, samples=samples) if batches is not None else None
        picks, fitted, remarks = allocate(
            work, named, methods, budget, before, inputs, batches, far,
            only_faster=auto, unit=round_to, threads=threads if fast else None, seed=seed, progress=progress,
        )  # fmt: skip
    notes += remarks
    if not picks:
        raise NothingToDo("no layer is factorised" + _because(notes))
    if fast:
        notes += _slower({n: timed(named[n], [o], threads=threads)[0] if o.ms is None else o for n, o in picks.items()})
    work, edits = _exchange(work, named, picks, fitted, norms)
    if reestimate_bn and calibration is not None:
        seen = reestimate_batch_norm(work, calibration, inputs)
        notes += [f"{seen} batch norms re-estimated"] if seen else []
    degenerate = [n for n, f in fitted.items() if f.cp is not None and f.cp.degenerate]
    if degenerate:
        notes.append(f"CP degenerate, terms cancel one another; a lower rank or another method is safer: {_some(degenerate)}")
    lines = (f"{len(picks)} of {len(sites)} layers factorised: {_by_method(picks.values())}", *notes)
    done = Result(
        model=work,
        plan=Plan(edits=edits, inputs=input_specs(inputs)),
        before=before,
        after=profile(work, inputs),
        example_inputs=inputs,
        notes=lines,
    )
    return given.then(done) if given is not None else done


def _methods(method: str | Sequence[str]) -> tuple[tuple[str, ...], bool]:
    if method == "auto":
        return AUTO, True
    chosen = (method,) if isinstance(method, str) else tuple(method)
    for m in chosen:
        if m not in METHODS:
            raise UsageError(f"method={m!r}: known are auto, {', '.join(METHODS)}{near(str(m), ('auto', *METHODS))}")
    if not chosen:
        raise UsageError("method=(): name at least one")
    return tuple(dict.fromkeys(chosen)), False


def _target(**given: Any) -> Budget | None:
    """The budget, or None where ranks are given or found by energy."""
    named = {k: v for k, v in given.items() if v is not None}
    if len(named) != 1:
        raise UsageError(f"give exactly one of {', '.join(given)}, not {len(named)}")
    ((kind, value),) = named.items()
    if kind == "rank":
        return None
    if kind == "energy":
        if not 0 < value <= 1:
            raise UsageError(f"energy={value}: the fraction to keep lies in (0, 1]")
        return None
    if not isinstance(value, str) and not 0 < value < 1:
        raise UsageError(f"{kind}={value}: give a fraction between 0 and 1 (exclusive)")
    if isinstance(value, str) and kind != "latency":
        raise UsageError(f"{kind}={value!r}: give a fraction between 0 and 1 (exclusive)")
    return Budget(kind, value)


def _exchange(
    work: nn.Module, sites: Mapping[str, Site], picks: Mapping[str, Option], fitted: Mapping[str, Fitted], norms: Mapping[str, _BatchNorm]
) -> tuple[nn.Module, tuple[Factorize, ...]]:
    """Put the factorised layers into the network, in place; what their outputs' means lost goes into a batch norm that follows."""
    edits = []
    for name, one in picks.items():
        layer, found = sites[name].layer, fitted[name]
        norm, last = norms.get(name), found.module[-1]
        if norm is not None and norm.running_mean is not None and found.shift is not None:
            norm.running_mean -= found.shift.to(norm.running_mean)
            last.register_parameter("bias", None)
        work = replace_module(work, layer, found.module)
        edits.append(Factorize(module=name, method=one.method, ranks=one.ranks, bias=last.bias is not None))
    return work, tuple(edits)


def _slower(picks: Mapping[str, Option]) -> list[str]:
    slow = {n: o.ms / o.before_ms for n, o in picks.items() if o.ms and o.before_ms and o.ms > o.before_ms}
    if not slow:
        return []
    worst = sorted(slow, key=lambda n: -slow[n])
    return [f"slower in ONNX Runtime than the layer before: {_some([f'{n} ({slow[n]:.2f} times)' for n in worst])}"]


def _by_method(options: Iterable[Option]) -> str:
    names = [o.method for o in options]
    return ", ".join(f"{names.count(m)} by {m}" for m in METHODS if m in names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _because(notes: Sequence[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ": it has no linear layer or convolution"
