"""What an operation does to labels: the table from operations to rules, and the rules for pointwise and unknown operations.

A rule is called after the operation ran, with the watcher and the `Call`, and returns the planes of every output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gossamer.trace._planes import Planes, join
from gossamer.trace._watch import Call, Watch

Rule = Callable[[Watch, Call], Sequence[Planes]]

RULES: dict[str, Rule] = {}
_FOUND: dict[Any, tuple[str, Rule, bool]] = {}

# Element by element, but not tagged so.
_POINTWISE = (
    "_fused_dropout _prelu_kernel _to_copy alias bernoulli bernoulli_ clone contiguous copy copy_ detach detach_ dropout elu fill fill_ "
    "float_power hardshrink hardswish hardswish_ hardsigmoid lift lift_fresh lift_fresh_copy log_normal_ log_sigmoid_forward "
    "masked_fill masked_fill_ "
    "native_dropout normal_ ones_like zeros_like empty_like full_like rand_like randn_like random_ rrelu_with_noise softshrink "
    "uniform_ zero_ requires_grad_ frexp"
)

# They make a tensor of a size that Python asked for, the same everywhere.
_FACTORIES = "new_zeros new_ones new_full new_empty new_empty_strided zeros ones full empty empty_strided"

# They change the shape of their first argument in place: its labels are what the rule says.
_RESHAPING = frozenset(
    ["squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "resize_", "resize_as_", "set_", "as_strided_"]
)


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations, by name."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            RULES[name] = function
        return function

    return register


def rule_of(func: Any) -> tuple[str, Rule, bool]:
    """Name of an operation, its rule, and whether it writes into its first argument."""
    found = _FOUND.get(func)
    if found is None:
        space, _, name = func._schema.name.partition("::")
        inplace = name.endswith("_") and not name.endswith("__") and func._schema.is_mutable
        reshapes = name in _RESHAPING
        known = RULES.get(name) if space == "aten" else None
        if known is None and space == "aten":
            if torch.Tag.pointwise in func.tags or (
                inplace and (torch.Tag.pointwise in getattr(getattr(torch.ops.aten, name[:-1], None), "default", func).tags)
            ):
                known = pointwise
        if func._overloadname.endswith("out") and known is pointwise:
            known = None
        found = _FOUND[func] = (name if space == "aten" else f"{space}::{name}", known or unknown, inplace and not reshapes)
    return found


@rule(_POINTWISE)
def pointwise(watch: Watch, call: Call) -> list[Planes]:
    """Operands are broadcast; labels that meet belong together."""
    tensors = call.tensors
    if len(tensors) == 1 or all(t.numel() == 1 for t in tensors[1:]):
        planes = watch.planes(tensors[0]) if tensors else ()
        lead = call.outputs[0].dim() - tensors[0].dim() if tensors else 0
        if not planes or lead == 0:
            return [planes] * len(call.outputs)
    operands = [watch.operand(t) for t in tensors]
    if not any(o.planes for o in operands):
        return [()] * len(call.outputs)
    planes = join(watch.ledger, operands, max(t.dim() for t in (*tensors, *call.outputs)), call.where)
    return [planes if out.dim() else () for out in call.outputs]


@rule(_FACTORIES)
def factory(watch: Watch, call: Call) -> list[Planes]:
    """A tensor of a size that Python asked for carries no labels, unless labelled channels are known to be written into it part by part.

    Whether Python asks for the smaller size once channels are gone shows when the cut network runs.
    """
    return [tuple(watch.blank(out)) if out.is_floating_point() else () for out in call.outputs]


def unknown(watch: Watch, call: Call) -> list[Planes]:
    """Not understood: everything that reaches it stays."""
    reason = f"{call.where()} is not understood"
    for t in call.tensors:
        for plane in watch.planes(t):
            watch.ledger.freeze(plane, reason)
    return [()] * len(call.outputs)


from gossamer.trace import _contraction, _movement, _reduction  # noqa: E402, F401  (they register their rules)
