"""A rank's share of a network: the network cut to the rank's channels, with sums where a split part ends."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from gossamer.adapters import free_attention
from gossamer.errors import NothingToDo, ProofError, UsageError
from gossamer.parallel.tensor.choice import Choice, Unit, choose
from gossamer.parallel.tensor.collectives import Ranks, Traffic
from gossamer.parallel.tensor.layout import Layout
from gossamer.parallel.tensor.regions import Region, Streams, mark
from gossamer.parallel.tensor.uses import partial_parameters, sum_gradients
from gossamer.result import ExampleInputs
from gossamer.sources.batches import call, check_inputs, outputs
from gossamer.surgery import cut
from gossamer.trace import Trace, plain_forward, trace

TOLERANCE = 1e-6
"""Largest relative difference of outputs and gradients from those of the whole network, in float64."""


@dataclass(frozen=True)
class SplitNetwork:
    """A rank's share of a network.

    Attributes:
        model: what this rank trains; parameters and buffers have the names they have in the whole network.
        units: what is split.
        whole: channel family -> why every rank has all of it.
        partial: parameters that every rank has whole and whose gradients are summed, since they meet split channels.
        layout: which entries this and the other ranks have.
        ranks: that share the network.
        difference: largest relative difference of outputs and gradients from the whole network, on the example inputs.
        share: fraction of the whole network's multiply-adds that is split.
    """

    model: nn.Module
    units: tuple[Unit, ...]
    whole: Mapping[str, str]
    partial: tuple[str, ...]
    layout: Layout = field(repr=False)
    ranks: Ranks = field(repr=False)
    difference: float
    share: float

    def state_dict(self) -> dict[str, Tensor]:
        """The whole network's state dict; all ranks call it together."""
        return self.layout.gather(self.model.state_dict(), self.ranks)

    def load_state_dict(self, whole: Mapping[str, Tensor]) -> None:
        """Take this rank's share of a whole network's state dict."""
        self.model.load_state_dict(self.layout.share(whole, self.ranks.rank))

    def __str__(self) -> str:
        lines = [f"{len(self.units)} parts split among {self.ranks.degree} ranks, {self.share:.0%} of the multiply-adds"]
        lines += [f"  {u.name}: {', '.join(u.begins)} -> {', '.join(u.ends)}" for u in self.units]
        lines += [f"  whole: {name}, because: {why}" for name, why in self.whole.items()]
        return "\n".join(lines)


def split_network(
    model: nn.Module, example_inputs: ExampleInputs, group: dist.ProcessGroup | None = None, *, agreeing: dist.ProcessGroup | None = None
) -> SplitNetwork:
    """Split a network's channels among the ranks of a group; every rank calls it with the same network and inputs.

    A rank's share is the network cut to the rank's channels (see `gossamer.surgery`): of layers that make split channels the outputs, of
    layers that use them up the inputs, of everything between both. What a layer at the end gives is summed over the ranks, one sum for each;
    its bias is added after that. Attention is split by heads. What cannot be split is whole on every rank. Outputs and gradients are held
    against those of the whole network before anything is returned.

    Args:
        model: the whole network, the same on every rank; it stays as it is.
        example_inputs: a tuple of positional inputs, or a dict of keyword inputs; the same on every rank.
        group: the ranks; None stands for all.
        agreeing: ranks that make the same choice, where several groups split the same network; default: the group.

    Returns:
        A `SplitNetwork`.

    Raises:
        UsageError: convolutions with weights that DTensor has split, or a group of one rank.
        NothingToDo: nothing can be split; it says why.
        ProofError: the split network computes something else than the whole one.

    Source: Shoeybi et al. 2019, arXiv:1909.08053 (linear layers and attention).
    """
    refuse_sharded_convolutions(model)
    ranks = Ranks(group, agreeing, next((p.device for p in model.parameters()), None))
    if ranks.degree < 2:
        raise UsageError("one rank alone has nothing to split channels among: start more, or leave tensor parallel out")
    example_inputs = check_inputs(example_inputs)
    traced = trace(model, example_inputs)
    refused: dict[str, str] = {}
    while True:
        choice = choose(model, traced, ranks.degree, refused)
        if not choice.units:
            raise NothingToDo(f"no channels can be split: {_reasons(choice)}")
        found = _attempt(model, traced, choice, ranks)
        if isinstance(found, SplitNetwork):
            return found
        refused |= found


def share_of(model: nn.Module, traced: Trace, degree: int) -> tuple[nn.Module, Choice]:
    """The largest share of a network among ``degree`` ranks, without sums: what costs are counted from. NothingToDo where nothing is split."""
    refused: dict[str, str] = {}
    while True:
        choice = choose(model, traced, degree, refused)
        if not choice.units:
            raise NothingToDo(f"no channels can be split among {degree} ranks: {_reasons(choice)}")
        gone = choice.removed(0, degree, traced.channels.num_classes)
        try:
            made = cut(model, traced, gone)
            left = made.frozen & gone
        except (NothingToDo, ProofError):
            left = gone
        if not bool(left.any()):
            return made.model, choice
        refused |= _refused(traced, choice, left, "its layers do not run with fewer channels")


def refuse_sharded_convolutions(model: nn.Module) -> None:
    """UsageError where DTensor has split a convolution's weight: its result would be wrong without a word."""
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and isinstance(module.weight, DTensor) and any(p.is_shard() for p in module.weight.placements):
            raise UsageError(
                f"{name}.weight is split by DTensor, which computes convolutions wrongly: give the whole network, gossamer splits it itself"
            )


def _attempt(model: nn.Module, traced: Trace, choice: Choice, ranks: Ranks) -> SplitNetwork | dict[str, str]:
    """The network split as chosen; or families that cannot be split after all, with the reason."""
    count = traced.channels.num_classes
    removed = [choice.removed(r, ranks.degree, count) for r in range(ranks.degree)]
    mine = removed[ranks.rank]
    share: nn.Module | None = None
    try:
        made = cut(model, traced, mine)
        share, left = made.model, made.frozen & mine
    except (NothingToDo, ProofError):
        left = mine
    left = ranks.largest(left.to(torch.uint8)).bool()
    if bool(left.any()) or share is None:
        return _refused(traced, choice, left, "its layers do not run with fewer channels")
    layout = Layout(model, traced.channels, removed)
    partial = partial_parameters(model, share, set(layout.shapes), traced.example_inputs)
    random = any(_random(m) for m in share.modules())
    streams = Streams(ranks.rank, next(share.parameters()).device) if random else None
    for unit in choice.units:
        region = Region(ranks, streams)
        for path in unit.begins:
            mark(share.get_submodule(path), region, "begin")
        for path in unit.ends:
            mark(share.get_submodule(path), region, "end")
    macs = sum(u.macs for u in choice.units) / max(traced.profile.macs, 1)
    difference = _difference(model, share, partial, layout, ranks, traced.example_inputs)
    if difference <= TOLERANCE:
        sum_gradients(share, partial, ranks.total)
        ranks.traffic = Traffic()
        return SplitNetwork(share, choice.units, choice.whole, partial, layout, ranks, difference, min(macs, 1.0))
    if len(choice.units) == 1:
        return {choice.units[0].name: f"differs from the whole network by {difference:.1e} when split"}
    guilty: dict[str, str] = {}
    for unit in choice.units:
        alone = _attempt(model, traced, Choice((unit,), choice.whole), ranks)
        guilty |= alone if isinstance(alone, dict) else {}
    if not guilty:
        raise ProofError(f"the split network differs from the whole one by {difference:.1e}, and no part of it alone does")
    return guilty


def _refused(traced: Trace, choice: Choice, left: Tensor, why: str) -> dict[str, str]:
    hit = [u.name for u in choice.units if any(bool(left[f].any()) for f in u.families)]
    return dict.fromkeys(hit or [u.name for u in choice.units], why)


def _reasons(choice: Choice) -> str:
    reasons = list(dict.fromkeys(choice.whole.values()))
    return "; ".join(reasons[:4]) if reasons else "it has no layers that make and use channels"


def _random(module: nn.Module) -> bool:
    rates = (getattr(module, n, 0.0) for n in ("p", "dropout", "drop_prob", "dropout_p", "attention_dropout"))
    return (isinstance(module, _DropoutNd) and module.p > 0) or any(isinstance(r, float) and r > 0 for r in rates)


def _difference(whole: nn.Module, share: nn.Module, partial: tuple[str, ...], layout: Layout, ranks: Ranks, example_inputs: Any) -> float:
    """Largest relative difference of outputs and gradients, over all ranks, in float64."""
    found = []
    for model, names in ((whole, ()), (share, partial)):
        exact = copy.deepcopy(model).double()
        sum_gradients(exact, names, ranks.total)
        inputs = pytree.tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, example_inputs)
        found.append(_outputs_and_gradients(exact, inputs))
    expected, got = layout.share(found[0], ranks.rank), found[1]
    worst = torch.zeros((), dtype=torch.float64)
    largest = max((float(t.abs().max()) for t in expected.values() if t.numel()), default=1.0)
    for n, t in expected.items():
        if t.numel():
            scale = max(float(t.abs().max()), 1e-7 * largest)
            off = float((got[n] - t).abs().max()) / scale if n in got and got[n].shape == t.shape else float("inf")
            worst = torch.maximum(worst, torch.tensor(off, dtype=torch.float64).nan_to_num(float("inf")))
    return float(ranks.largest(worst))


def _outputs_and_gradients(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Tensor]:
    with plain_forward(model), free_attention(model), torch.enable_grad():
        given = [t for t in outputs(call(model, example_inputs)) if t.is_floating_point()]
        found = {f"output {i}": t.detach() for i, t in enumerate(given)}
        used = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        draw = torch.Generator().manual_seed(0)
        learned = [t for t in given if t.requires_grad]
        if learned and used:
            towards = [torch.randn(t.shape, generator=draw).to(t) for t in learned]
            gradients = torch.autograd.grad(learned, [p for _, p in used], towards, allow_unused=True)
            found |= {n: g for (n, _), g in zip(used, gradients, strict=True) if g is not None}
    return found
