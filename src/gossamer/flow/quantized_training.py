"""Quantisation-aware training as one call: quantise after training, then train on what was rounded, taught by the float network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Unpack

import torch
from torch import nn

from gossamer.errors import UsageError
from gossamer.result import ExampleInputs, Result
from gossamer.sources.batches import check_inputs
from gossamer.training import FitOptions, fit
from gossamer.training.feeding import count_batches, own_randomness, seed_epoch, take_apart

_CALIBRATION = 512  # samples of the training data, where nothing else is named


def qat(
    model: nn.Module | Result,
    data: Iterable[Any],
    *,
    calibration: Iterable[Any] | None = None,
    weight_bits: int = 8,
    activation_bits: int = 8,
    target: str = "auto",
    ignore: Sequence[str] = (),
    teacher: nn.Module | Result | None = None,
    loss: str = "kd",
    alpha: float | None = None,
    tau: float | None = None,
    freeze_norms: float = 0.5,
    **options: Unpack[FitOptions],
) -> Result:
    """Train a network with its weights and activations rounded, so that it is better than one that is only calibrated.

    Examples:
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> result = qat(net, [(x, (x[:, 0] > 0).long())] * 10, weight_bits=2, epochs=2, lr=0.01)
        >>> result.plan.counts(), result.model.state_dict()["0.weight"].unique().numel() <= 4
        ({'quantize_weight': 2, 'quantize_activation': 2}, True)

    Args:
        model: a float network, a `Result` whose plan is continued, or the `Result` of `gossamer.quantize`, whose bits and steps are
            started from. It is not changed.
        data: batches as in `gossamer.fit`; labels may be missing with ``alpha=1``.
        calibration, weight_bits, activation_bits, target, ignore: of `gossamer.quantize`, which comes first where the model is not
            quantised yet, with ``rounding="gptq"``, whose codes training starts from. Calibration: by default some 512 samples of ``data``.
        teacher: default: the float network itself.
        loss, alpha, tau: of `gossamer.distill`; for ``"kd"`` by default 0.5 and 2, which is more of the labels than there: the teacher is the
            same network.
        freeze_norms: part of the training, in [0, 1], after which folded batch norms keep their running statistics.
        **options: of `gossamer.fit`: ``epochs``, ``lr``, ``checkpoint``, ``resume``, ...; with ``objective`` there is no teacher.
            ``example_inputs``, by default those of the `Result`, else the inputs of the first batch, are what the network is captured with.

    Returns:
        A `Result` as `gossamer.quantize` gives it, with learned steps.

    Raises:
        UsageError: bits or steps are named and the model is quantised already; and what `gossamer.quantize` and `gossamer.fit` raise.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153; Hinton et al., arXiv:1503.02531.
    """
    from gossamer.distillation import distill
    from gossamer.quantization import quantize
    from gossamer.quantization.training import train_quantized

    start = model if isinstance(model, Result) and "quantize_weight" in model.plan.counts() else None
    if start is None:
        inputs = options.get("example_inputs") or (model.example_inputs if isinstance(model, Result) else None)
        inputs = check_inputs(inputs) if inputs is not None else _inputs_of(data)
        seed = options.get("seed", 0)
        start = quantize(
            model,
            inputs,
            calibration=calibration if calibration is not None else _samples(data, inputs, seed),
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            rounding="gptq",
            target=target,
            ignore=ignore,
        )
    elif (calibration, weight_bits, activation_bits, target, tuple(ignore)) != (None, 8, 8, "auto", ()):
        raise UsageError("the network is quantised already: bits, target, ignore and calibration are those of its plan; leave them out")
    if "objective" in options and options["objective"] is not None:
        if teacher is not None or alpha is not None or tau is not None:
            raise UsageError("an objective takes no teacher, alpha and tau: leave out either")
        return train_quantized(start, data, freeze_norms=freeze_norms, train=fit, **options)
    options.pop("objective", None)
    if loss == "kd":
        alpha, tau = 0.5 if alpha is None else alpha, 2.0 if tau is None else tau
    teaching = teacher if teacher is not None else start.floating

    def train(network: Any, batches: Any, **more: Any) -> Any:
        return distill(network, teaching, batches, loss=loss, alpha=alpha, tau=tau, **more)

    return train_quantized(start, data, freeze_norms=freeze_norms, train=train, **options)


def _inputs_of(data: Iterable[Any]) -> ExampleInputs:
    """The inputs of the first batch."""
    count_batches(data)
    with own_randomness(data, torch.device("cpu")):
        batch = take_apart(next(iter(data)), None)
    return batch.kwargs or batch.args


def _samples(data: Iterable[Any], example_inputs: ExampleInputs, seed: int) -> list[Any]:
    """Leading batches of the training data, in the order of the first epoch."""
    total = count_batches(data)
    with own_randomness(data, torch.device("cpu")):
        seed_epoch(data, seed, 0, torch.device("cpu"))
        found: list[Any] = []
        samples = 0
        for raw in islice(data, total):
            batch = take_apart(raw, example_inputs)
            found.append(batch.kwargs or batch.args)
            samples += next((len(t) for t in (batch.args or batch.kwargs.values()) if isinstance(t, torch.Tensor) and t.dim()), 1)
            if samples >= _CALIBRATION:
                break
    return found
