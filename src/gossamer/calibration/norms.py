"""Which batch norm takes exactly what a layer gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.profiling.runtime import evaluating
from gossamer.sources.batches import Batch


def following_norms(model: nn.Module, names: Sequence[str], batches: Iterable[Batch], *, biased: bool = False) -> dict[str, _BatchNorm]:
    """For each layer without a bias, or ``biased`` ones too: the batch norm whose input is exactly what that layer gave, where there is one."""
    made: dict[int, str] = {}
    alive: list[Tensor] = []
    found: dict[str, list[_BatchNorm]] = {}
    calls: list[nn.Module] = []

    def give(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, out: Tensor) -> None:
            made[id(out)] = name
            alive.append(out)

        return hook

    def take(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append(module)
        name = made.get(id(inputs[0]))
        if name is not None and isinstance(module, _BatchNorm):
            found.setdefault(name, []).append(module)

    layers = {n: model.get_submodule(n) for n in names}
    handles = [m.register_forward_hook(give(n)) for n, m in layers.items() if biased or m.bias is None]
    handles += [m.register_forward_pre_hook(take) for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    try:
        with evaluating(model):
            for batch in batches:
                model(*batch.args, **batch.kwargs)
                break
    finally:
        for h in handles:
            h.remove()
    times = [made[id(t)] for t in alive]
    return {n: norms[0] for n, norms in found.items() if len(norms) == 1 and times.count(n) == calls.count(norms[0]) == 1}
