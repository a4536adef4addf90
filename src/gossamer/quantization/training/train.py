"""Quantisation-aware training: what `gossamer.quantize` made goes on training, rounded as it will be deployed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gossamer.errors import UsageError
from gossamer.plan import Mask, Plan, QuantizeActivation, QuantizeWeight, Share
from gossamer.quantization.build import quantized
from gossamer.quantization.training.norms import FreezeNorms, output_statistics
from gossamer.quantization.training.prepare import as_fitted, finished, trainable, unrounded
from gossamer.result import Result
from gossamer.training import fit
from gossamer.training.feeding import count_batches, own_randomness, seed_epoch, take_apart

_BATCHES = 8  # of the training data, from which norms take their first statistics


def train_quantized(
    result: Result,
    data: Iterable[Any],
    *,
    freeze_norms: float = 0.5,
    epochs: int = 1,
    accumulate: int = 1,
    seed: int = 0,
    train: Callable[..., Any] = fit,
    **options: Any,
) -> Result:
    """Train the network of a `gossamer.quantize` result with its weights and activations rounded, and their steps as parameters.

    Gradients pass straight through the rounding; steps get LSQ's. Norms that were folded normalise by the batch at first, then by
    their running statistics, which is what the deployed kernel computes. Zeros of masks stay zero.

    Examples:
        >>> from torch import nn
        >>> from gossamer.quantization import quantize
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> result = quantize(net, (x,), calibration=[x], weight_bits=2)
        >>> trained = train_quantized(result, [(x, (x[:, 0] > 0).long())] * 10, epochs=2, lr=0.01)
        >>> trained.plan.counts() == result.plan.counts(), trained.plan == result.plan
        (True, False)

    Args:
        result: of `gossamer.quantize`; its plan's edits give bits and first steps. It is not changed.
        data: batches, as `gossamer.fit` takes them.
        freeze_norms: part of the training, in [0, 1], after which folded norms keep their running statistics.
        epochs, accumulate, seed, options: of ``train``. ``val`` judges the network as it is rounded.
        train: what trains: `gossamer.fit`, or one with its signature.

    Returns:
        A `Result` with the integer network and the learned steps in its plan; ``.floating`` is the trained network before rounding.

    Raises:
        UsageError: the result was not quantised or holds no float network, ``freeze_norms`` is out of range; and what ``train`` raises.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153.
    """
    floating = result.floating
    if not isinstance(floating, fx.GraphModule):
        raise UsageError("quantisation-aware training starts from what quantize returned, or from a float network: this result is neither")
    if not 0 <= freeze_norms <= 1:
        raise UsageError(f"freeze_norms={freeze_norms}: a part of the training, in [0, 1]")
    edits = [e for e in result.plan if isinstance(e, QuantizeWeight | QuantizeActivation)]
    steps = epochs * -(-count_batches(data) // accumulate)
    floating = as_fitted(floating, result.model, edits)
    device = next((p.device for p in floating.parameters()), torch.device("cpu"))
    with own_randomness(data, device):
        seed_epoch(data, seed, 0, device)
        statistics = output_statistics(floating, [_leaves(raw, result.example_inputs, device) for raw in islice(data, _BATCHES)])
    network: Any = trainable(floating, edits, statistics)
    masks = tuple(e for e in result.plan if isinstance(e, Mask))
    if masks:
        network = Result(network, Plan(edits=masks), result.before, result.after, example_inputs=result.example_inputs)
    hold = FreezeNorms(round(steps * freeze_norms), options.pop("after_step", None))
    if hold.after == 0:
        hold.freeze(network.model if masks else network)
    options["example_inputs"] = result.example_inputs
    trained = train(network, data, epochs=epochs, accumulate=accumulate, seed=seed, after_step=hold, **options).model
    on_grid, learned = finished(trained, floating)
    integers = quantized(copy.deepcopy(on_grid), learned)
    notes = result.notes
    if any(isinstance(e, Share) for e in result.plan):
        notes = (*notes, "shared values were trained apart: rounding took the place of their codebooks")
    others = tuple(e for e in result.plan if not isinstance(e, QuantizeWeight | QuantizeActivation))
    weight_bytes = sum(t.numel() * t.element_size() for t in integers.state_dict().values())
    return replace(
        result,
        model=integers,
        plan=result.plan.model_copy(update={"edits": (*others, *learned)}),
        after=replace(result.after, weight_bytes=weight_bytes),
        notes=notes,
        report=None,
        floating=unrounded(trained, floating),
    )


def _leaves(raw: Any, example_inputs: Any, device: torch.device) -> list[Any]:
    """The flat inputs of a graph from a batch."""
    batch = take_apart(raw, example_inputs)
    kwargs = {k: batch.kwargs[k] for k in example_inputs} if batch.kwargs and isinstance(example_inputs, dict) else batch.kwargs
    return [x.to(device) if isinstance(x, Tensor) else x for x in pytree.tree_leaves((batch.args, kwargs))]
