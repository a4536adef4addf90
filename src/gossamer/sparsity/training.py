"""Sparse training: zeros that come on a schedule, grow back elsewhere, or are projected after every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import UsageError
from gossamer.plan import Mask, unpack_mask
from gossamer.result import ExampleInputs, Result, network_of
from gossamer.sparsity.hooks import Projection, Sparsifier
from gossamer.sparsity.selection import select
from gossamer.sparsity.sparsify import as_result, chosen_weights, sparsify
from gossamer.training import fit
from gossamer.training.feeding import count_batches


class _Snapshot(nn.Module):
    """The network's state after some steps; part of the checkpoints."""

    count: Tensor

    def __init__(self, model: nn.Module, step: int) -> None:
        super().__init__()
        self._step, self._names = step, tuple(model.state_dict())
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        for i, tensor in enumerate(model.state_dict().values()):
            self.register_buffer(f"state_{i}", tensor.detach().clone())

    def forward(self, model: nn.Module) -> None:
        self.count += 1
        if int(self.count) == self._step:
            for i, tensor in enumerate(model.state_dict().values()):
                getattr(self, f"state_{i}").copy_(tensor)

    def state(self) -> dict[str, Tensor]:
        return {n: getattr(self, f"state_{i}").clone() for i, n in enumerate(self._names)}


def train_sparse(
    model: nn.Module | Result,
    data: Iterable[Any],
    *,
    sparsity: float | None = None,
    l0: int | None = None,
    l1: float | str | None = None,
    pattern: str | None = None,
    schedule: str = "cubic",
    begin: float = 0.0,
    end: float = 0.5,
    updates: int = 100,
    regrow: str | None = None,
    regrow_fraction: float = 0.1,
    scope: str = "global",
    criterion: str = "magnitude",
    calibration: Iterable[Any] | None = None,
    ignore: Sequence[str] = (),
    example_inputs: ExampleInputs = None,
    epochs: int = 1,
    accumulate: int = 1,
    seed: int = 0,
    train: Callable[..., Any] = fit,
    **options: Any,
) -> Result:
    """Train a copy of a network while its weights become sparse.

    Examples:
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> result = train_sparse(net, [(x, (x[:, 0] > 0).long())] * 10, sparsity=0.75, epochs=2, lr=0.01)
        >>> sum(int((p == 0).sum()) for p in result.model.parameters() if p.dim() == 2)
        120

    Args:
        model: a network, or a `Result`, whose plan is continued; stays as it is.
        data: as for `gossamer.fit`.
        sparsity: fraction of zeros at the end; or ``l0`` or ``l1``, on which the weights are then projected after every step; or, with
            ``schedule="one_shot"``, an ``N:M`` pattern.
        l0, l1, scope, pattern, ignore: as for `sparsify`; weights compete over the whole network by default.
        schedule, begin, end, updates, regrow, regrow_fraction: as for `Sparsifier`. ``"one_shot"`` starts from `sparsify`.
        criterion, calibration: of ``"one_shot"``; while training it is the magnitude.
        example_inputs: for MACs in the profiles.
        epochs, accumulate, seed, options: of ``train``.
        train: what trains: `gossamer.fit`, or one with its signature, such as ``lambda m, d, **o: gs.distill(m, teacher, d, **o)``.

    Returns:
        A `Result` whose plan holds the masks at the end.

    Raises:
        UsageError: arguments that contradict each other; and what `gossamer.fit` raises.
    """
    source, model = model, network_of(model, "sparsify")
    if example_inputs is None and isinstance(source, Result):
        example_inputs = source.example_inputs
    options |= {"epochs": epochs, "accumulate": accumulate, "seed": seed}
    if "after_step" in options:
        raise UsageError("train_sparse has its own after_step: use fit with a Sparsifier for another one")
    if sparsity is None and (l0 is not None or l1 is not None):
        if criterion != "magnitude" or pattern is not None or regrow is not None:
            raise UsageError("l0 and l1 are projections: they take neither a criterion, a pattern nor regrowth")
        project = Projection(model, l0=l0, l1=l1, scope=scope, ignore=ignore)
        trained = train(model, data, after_step=project, **options).model
        weights, left = chosen_weights(trained, ignore, None)
        with torch.no_grad():
            project(trained)
        return as_result(source, trained, {n: p.detach() != 0 for n, p in weights.items()}, example_inputs, left)
    if options.get("patience") is not None and (schedule != "one_shot" or regrow is not None):
        raise UsageError("patience may bring weights back from before the masks were final: not with a schedule or regrowth")
    total = epochs * -(-count_batches(data) // accumulate)
    start, notes = model, tuple[str, ...]()
    if schedule == "one_shot":
        options_now: dict[str, Any] = {
            "criterion": criterion,
            "calibration": calibration,
            "example_inputs": example_inputs,
            "ignore": ignore,
        }
        begun = sparsify(model, sparsity=sparsity, l0=l0, l1=l1, pattern=pattern, scope=scope, **options_now)
        start, notes = begun.model, begun.notes
    elif criterion != "magnitude":
        raise UsageError(f"criterion={criterion!r} goes with schedule='one_shot': while training, weights go by their magnitude")
    hold = Sparsifier(
        start,
        sparsity=sparsity,
        steps=total,
        schedule=schedule,
        begin=begin,
        end=end,
        updates=updates,
        regrow=regrow,
        regrow_fraction=regrow_fraction,
        scope=scope,
        pattern=pattern,
        ignore=ignore,
        seed=seed,
    )
    trained = train(start, data, after_step=hold, **options).model
    masks = hold.masks()
    with torch.no_grad():  # an average of weights may be non-zero where the last mask is not
        for name, p in trained.named_parameters():
            if name in masks:
                p.mul_(masks[name].to(p.device))
    return as_result(source, trained, masks, example_inputs, notes[1:])


def lottery_ticket(
    model: nn.Module | Result,
    data: Iterable[Any],
    *,
    sparsity: float,
    rounds: int = 5,
    rewind: float = 0.0,
    scope: str = "global",
    ignore: Sequence[str] = (),
    example_inputs: ExampleInputs = None,
    epochs: int = 1,
    accumulate: int = 1,
    checkpoint: str | Path | None = None,
    train: Callable[..., Any] = fit,
    **options: Any,
) -> Result:
    """Find a sparse network that trains alone: train, prune the smallest, put the others back to where they came from, and train again.

    Examples:
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> ticket = lottery_ticket(net, [(x, (x[:, 0] > 0).long())] * 10, sparsity=0.75, rounds=2, lr=0.01)
        >>> sum(int((p == 0).sum()) for p in ticket.model.parameters() if p.dim() == 2)
        120

    Args:
        model: a network, usually untrained, or a `Result`, whose plan is continued; stays as it is.
        data: as for `gossamer.fit`.
        sparsity: fraction of zeros at the end.
        rounds: after which the same fraction of what is left goes each time.
        rewind: to the weights after this fraction of the first training's steps, in [0, 1); 0 is the start. The learning rate starts anew.
        scope, ignore: as for `sparsify`.
        example_inputs: for MACs in the profiles.
        epochs, accumulate, train, options: of each training.
        checkpoint: a folder; each round has one of its own in it, and ``resume=True`` goes on in the round that was interrupted.

    Returns:
        The last round's trained network.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; rewinding: Frankle et al., ICML 2020.
    """
    if not 0 < sparsity < 1 or rounds < 1 or not 0 <= rewind < 1:
        raise UsageError(f"sparsity={sparsity} lies in (0, 1), rounds={rounds} is at least 1, rewind={rewind} lies in [0, 1)")
    source, model = model, network_of(model, "sparsify")
    if example_inputs is None and isinstance(source, Result):
        example_inputs = source.example_inputs
    options |= {"epochs": epochs, "accumulate": accumulate}
    weights, notes = chosen_weights(model, ignore, None)
    snapshot = _Snapshot(model, round(rewind * epochs * -(-count_batches(data) // accumulate)))

    def run(network: Any, number: int, **more: Any) -> Any:
        place = {"checkpoint": Path(checkpoint) / f"round-{number}"} if checkpoint is not None else {}
        return train(network, data, **options, **place, **more)

    trained = run(model, 0, after_step=snapshot).model
    result = None
    for number in range(1, rounds + 1):
        parameters = dict(trained.named_parameters())
        size = {n: parameters[n].detach().abs().float().cpu() for n in weights}
        masks = select(size, sparsity=1 - (1 - sparsity) ** (number / rounds), scope=scope)
        rewound = _copy_with(trained, snapshot.state())
        with torch.no_grad():
            for name, p in rewound.named_parameters():
                if name in masks:
                    p.masked_fill_(~masks[name].to(p.device), 0)
        result = run(as_result(model, rewound, masks, example_inputs, notes), number)
        trained = result.model
    assert result is not None
    return as_result(
        source, trained, {e.tensor: unpack_mask(e.kept, e.shape) for e in result.plan if isinstance(e, Mask)}, example_inputs, notes
    )


def _copy_with(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    out = copy.deepcopy(model)
    out.load_state_dict(state)
    return out
