"""Decoupling: dense convolutions become depthwise-separable terms, grouped convolutions or bottlenecks, at given sizes or to a budget of MACs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from gossamer.calibration import MOST_INPUTS, Batches, Halves, following_norms, reestimate_batch_norm, samples_of
from gossamer.decoupling.choice import fit_all, slower, some, within_budget
from gossamer.decoupling.fitting import Fitted
from gossamer.decoupling.forms import FORMS, Sizes, convolutions, cost, exchange, inner, most_terms, sizes_of, unfit
from gossamer.errors import NothingToDo, UsageError, near
from gossamer.exchange import Place, check_finite, find_places
from gossamer.plan import Decouple, Plan, apply_structure, input_specs
from gossamer.profiling import profile
from gossamer.result import ExampleInputs, Result, network_of
from gossamer.sources.batches import Batch, check_inputs

_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Form = Literal["depthwise_separable", "grouped", "bottleneck"]


def decouple(
    model: nn.Module | Result,
    example_inputs: ExampleInputs = None,
    *,
    form: Form = "depthwise_separable",
    terms: int = 1,
    groups: int | None = None,
    width: float | None = None,
    macs: float | None = None,
    calibration: Iterable[Any] | None = None,
    ignore: Sequence[str] = (),
    reestimate_bn: bool = True,
    runtime: Literal["onnxruntime"] | None = "onnxruntime",
    samples: int = 64,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Replace dense convolutions by cheaper kinds of convolution that do nearly the same, and are trained on from there.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"))
        >>> result = decouple(net, (torch.zeros(1, 3, 8, 8),), terms=2, ignore=["0"], runtime=None)
        >>> [type(m).__name__ for m in result.model[2]], result.model[2][1].groups, result.after.macs < result.before.macs
        (['ChannelRepeat', 'Conv2d', 'Conv2d'], 64, True)

    Args:
        model: the network, which stays as it is, or a `Result`, whose plan is continued.
        example_inputs: a tuple or dict of inputs; a `Result` brings its own.
        form: ``"depthwise_separable"`` (k x k on each channel alone, then pointwise), ``"grouped"`` (channels in another order, a convolution in
            groups, and the order back; the orders that lose least are searched for), ``"bottleneck"`` (pointwise, k x k, pointwise).
        terms: kernels for each input channel, at most the kernel's positions, which would be exact.
        groups: of a grouped one, 2 or more, within each group that a layer has.
        width: of a bottleneck, fraction of the channels inside, in (0, 1).
        macs: fraction of the network's to keep, in (0, 1): terms, groups or widths are then allocated, each layer's loss judged alone as the
            divergence of the network's outputs. In place of the three.
        calibration: batches; weights then minimise the error of the layers' outputs, and biases (or the batch norm that follows) make up for the
            means. Without them weights stand for the original's alone. Two batches or more: where a layer sees little of its inputs, its losses on
            every other batch are those of a fit to the rest.
        ignore: patterns of module paths that stay as they are.
        reestimate_bn: measure batch-norm statistics again on calibration data.
        runtime: layers are timed there, so that notes can tell which got slower; None times nothing.
        samples: of the calibration data, on which losses are judged.
        threads: of ONNX Runtime.
        seed: of the search for groups.
        progress: called with steps done and all.

    Returns:
        A `Result` whose plan holds a `Decouple` for each layer. Notes tell what was left alone, and which layers got slower.

    Raises:
        UsageError: options that contradict each other or lie out of range.
        SelectorError: a pattern matches no module.
        BudgetError: the budget cannot be reached; it says the lowest that can.
        NothingToDo: no convolution is decoupled; the reasons are listed.

    Source: see `gossamer.decoupling.fits` and `gossamer.decoupling.partition`.
    """
    given = model if isinstance(model, Result) else None
    network = network_of(model, "decouple")
    if example_inputs is None and given is not None:
        example_inputs = given.example_inputs
    if given is not None and "as_graph" in given.plan.counts():
        raise NothingToDo(
            "no convolution can be decoupled: the plan wrote the network down as a graph; decouple before prune(form='graph')"
        )
    inputs = check_inputs(example_inputs)
    _check(form, terms, groups, width, macs, runtime, samples)
    check_finite(network)
    before = profile(network, inputs)
    work = apply_structure(network, [])
    places, notes = find_places(work, inputs, ignore, kinds=_ConvNd)
    named = {p.name: p for p in places}
    options, remarks = _options(places, form, terms, groups, width, macs)
    notes += remarks
    if not options:
        raise NothingToDo("no convolution is decoupled" + (f" ({'; '.join(notes)})" if notes else ": it has none"))
    batches = Batches(calibration, inputs, work) if calibration is not None else None
    example = Batch((), inputs, None) if isinstance(inputs, dict) else Batch(tuple(inputs), {}, None)
    norms = following_norms(work, list(options), [example], biased=True)
    large = [n for n in options if named[n].dims.ins * named[n].dims.taps > MOST_INPUTS] if batches is not None else []
    if large:
        notes.append(f"fitted without data, too many inputs for their moments: {some(large)}")
    if batches is None:
        notes.append("no calibration data: weights stand for the original's alone")
    if macs is not None:
        fitted = within_budget(
            work,
            named,
            form,
            options,
            macs,
            before,
            batches,
            per_sample=before.macs / samples_of(inputs),
            samples=samples,
            seed=seed,
            progress=progress,
        )
    else:
        fitted = {}
        halves = Halves(work, {n: named[n].layer for n in options}, batches)
        for name, sizes, (found, _) in fit_all(halves, named, form, options, seed=seed):
            fitted[name] = sizes, found
            if progress is not None:
                progress(len(fitted), len(options))
    if runtime is not None:
        notes += slower(named, fitted, threads)
    work, edits = _exchange(work, named, form, fitted, norms)
    if reestimate_bn and calibration is not None:
        seen = reestimate_batch_norm(work, calibration, inputs)
        notes += [f"{seen} batch norms re-estimated"] if seen else []
    done = Result(
        model=work,
        plan=Plan(edits=edits, inputs=input_specs(inputs)),
        before=before,
        after=profile(work, inputs),
        example_inputs=inputs,
        notes=(f"{len(edits)} of {len(places)} convolutions decoupled: {form.replace('_', ' ')}", *notes),
    )
    return given.then(done) if given is not None else done


def _check(form: str, terms: int, groups: int | None, width: float | None, macs: float | None, runtime: Any, samples: int) -> None:
    if form not in FORMS:
        raise UsageError(f"form={form!r}: known are {', '.join(FORMS)}{near(form, FORMS)}")
    for name, value, default, owner in (
        ("terms", terms, 1, "depthwise_separable"),
        ("groups", groups, None, "grouped"),
        ("width", width, None, "bottleneck"),
    ):
        if value != default and (form != owner or macs is not None):
            raise UsageError(f"{name}={value}: " + ("macs= chooses it" if form == owner else f"form {form!r} has no {name}"))
    if macs is not None:
        if isinstance(macs, str) or not 0 < macs < 1:
            raise UsageError(f"macs={macs!r}: give a fraction between 0 and 1 (exclusive)")
    elif form == "grouped" and (groups is None or groups < 2):
        raise UsageError(f"groups={groups}: form 'grouped' needs 2 or more, or macs=")
    elif form == "bottleneck" and (width is None or not 0 < width < 1):
        raise UsageError(f"width={width}: form 'bottleneck' needs a fraction between 0 and 1 (exclusive), or macs=")
    if terms < 1:
        raise UsageError(f"terms={terms} must be at least 1")
    if runtime not in ("onnxruntime", None):
        raise UsageError(f"runtime={runtime!r}: known are 'onnxruntime' and None")
    if samples < 1:
        raise UsageError(f"samples={samples} must be at least 1")


def _options(
    places: Sequence[Place], form: str, terms: int, groups: int | None, width: float | None, macs: float | None
) -> tuple[dict[str, list[Sizes]], list[str]]:
    """Sizes for each layer that pay, descending by cost, and why other layers are left alone."""
    out: dict[str, list[Sizes]] = {}
    left: dict[str, list[str]] = {}
    for place in places:
        d = place.dims
        if macs is not None:
            every = sizes_of(form, d)
        elif form == "depthwise_separable":
            every = [(min(terms, most_terms(d)),)]
        else:
            every = [(groups or 0,)] if form == "grouped" else [inner(d, width or 0.0)]
        reasons = [unfit(form, d, sizes) for sizes in every] or ["nothing divides its channels"]
        fits = [s for s, reason in zip(every, reasons, strict=False) if reason is None]
        assert isinstance(place.layer, _ConvNd)
        paying = [s for s in fits if cost(place.layer, form, s, place.shapes)[0] < place.macs]
        if paying:
            out[place.name] = paying
        else:
            left.setdefault("this saves no multiply-adds there" if fits else str(reasons[0]), []).append(place.name)
    return out, [f"left alone, {reason}: {some(names)}" for reason, names in left.items()]


def _exchange(
    work: nn.Module,
    places: Mapping[str, Place],
    form: Form,
    fitted: Mapping[str, tuple[Sizes, Fitted]],
    norms: Mapping[str, _BatchNorm],
) -> tuple[nn.Module, tuple[Decouple, ...]]:
    """Put what stands in for layers into the network, in place; what their outputs' means lost goes into a batch norm that follows."""
    edits = []
    for name in (n for n in places if n in fitted):
        sizes, found = fitted[name]
        norm, last = norms.get(name), convolutions(found.module)[-1]
        behind = norm if found.outputs and norm is not None and _can_be_wrapped(norm) else None
        where = next(n for n, m in work.named_modules() if m is behind) if behind is not None else None
        if norm is not None and norm.running_mean is not None and found.shift is not None and places[name].layer.bias is None:
            norm.running_mean -= found.shift.to(norm.running_mean)
            last.register_parameter("bias", None)
        work = exchange(work, places[name].layer, found.module, norm=behind, outputs=found.outputs)
        bias = last.bias is not None
        edits.append(Decouple(module=name, form=form, sizes=sizes, bias=bias, inputs=found.inputs, outputs=found.outputs, norm=where))
    return work, tuple(edits)


def _can_be_wrapped(norm: _BatchNorm) -> bool:
    """Whether an order of channels may come after it: classes of its own may be read, or do more than normalise."""
    return type(norm) in _PLAIN_NORMS and not norm._forward_hooks and not norm._forward_pre_hooks
