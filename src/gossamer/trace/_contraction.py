"""Rules for contractions: input labels meet, output labels are emitted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.trace._planes import Operand, Planes, collapse, join, varies
from gossamer.trace._rules import rule
from gossamer.trace._watch import Call, Watch


@rule("convolution _convolution")
def convolution(watch: Watch, call: Call) -> list[Planes]:
    """Any convolution: grouped, depthwise, transposed, of one to three dimensions."""
    x, weight, bias, groups, transposed = call.args[0], call.args[1], call.args[2], call.args[8], call.args[6]
    ledger, nd = watch.ledger, x.dim()
    passed, channels = _over_space(watch, call, watch.operand(x), range(2, nd))
    in_planes, out_planes = _conv_weight(watch, call, weight, groups, transposed)
    c_in, c_out = x.shape[1], call.outputs[0].shape[1]
    ids_in = _vector(watch, call, channels, c_in)
    what = watch.operand(x).what

    def meeting() -> str:
        return call.where() if channels else f"reads {what} ({call.where()})"

    if in_planes is None or out_planes is None:  # the weight carries labels in another arrangement
        for p in (*watch.planes(weight), *channels):
            ledger.freeze(p, lambda: f"used with other groups before {call.where()}")
        return [()]
    if c_in > groups:  # several inputs for each group
        ledger.unify(ids_in.reshape(groups, -1), in_planes, meeting)
    out = out_planes.expand(groups, -1) if out_planes.shape[0] == 1 and groups > 1 else out_planes
    if c_in == groups > 1:
        ledger.unify(out.reshape(groups, -1), ids_in.reshape(groups, 1), meeting)
    elif c_out == groups > 1:
        ledger.unify(out.reshape(groups, 1), ids_in.reshape(groups, -1), meeting)
    elif groups > 1:
        ledger.rectangle("group", ids_in.reshape(groups, -1), out.reshape(groups, -1))
    made = out.reshape([1, c_out] + [1] * (nd - 2))
    produced = [made] if c_out > 1 else []
    operands = [Operand((1, c_out) + (1,) * (nd - 2), tuple(produced), "its own output")]
    if bias is not None and watch.planes(bias):
        o = watch.operand(bias)
        operands.append(
            Operand((1, c_out) + (1,) * (nd - 2), tuple(p.reshape([1, -1] + [1] * (nd - 2)) for p in o.planes), o.what),
        )
    return [(*passed, *join(ledger, operands, nd, call.where))]


def _over_space(watch: Watch, call: Call, x: Operand, space: Sequence[int]) -> tuple[Planes, Planes]:
    """Planes that pass along the batch, and planes of the channels; labels that vary over space are coupled there, or stay."""
    passed, channels = [], []
    for p in x.planes:
        if p.shape[1] > 1 and p.shape[0] == 1:
            channels.append(collapse(watch.ledger, p, space, call.where))
        elif p.shape[1] == 1 and not any(p.shape[d] > 1 for d in space):
            passed.append(p)
        else:
            watch.ledger.freeze(p, lambda: f"laid out over space or batch in {call.where()}")
    return tuple(passed), tuple(channels)


def _vector(watch: Watch, call: Call, channels: Planes, size: int) -> Tensor:
    """Labels of the input channels, shape ``(size,)``; zeros where there are none."""
    if not channels:
        return torch.zeros(size, dtype=torch.long)
    for p in channels[1:]:
        watch.ledger.freeze(p, lambda: f"independent sets of channels meet in {call.where()}")
        watch.ledger.freeze(channels[0], lambda: f"independent sets of channels meet in {call.where()}")
    return channels[0].reshape(-1)


def _conv_weight(watch: Watch, call: Call, weight: Tensor, groups: int, transposed: bool) -> tuple[Tensor | None, Tensor | None]:
    """Labels of a convolution's weight: inputs and outputs, each ``(groups, size / groups)`` or ``(1, size / groups)``."""
    ledger = watch.ledger
    full, blocked = (0, 1)
    tracked = watch.tracked(weight)
    if tracked is not None:
        first = watch.labels_of(tracked, full) if weight.shape[0] > 1 else torch.zeros(1, dtype=torch.long)
        second: Tensor | None = torch.zeros((1, weight.shape[1]), dtype=torch.long)
        if weight.shape[1] > 1:
            if groups > 1 and blocked not in tracked.labels:
                second = watch.blocks_of(tracked, blocked, groups)
            elif blocked in tracked.blocks:
                second = None
            else:
                second = watch.labels_of(tracked, blocked).reshape(1, -1)
    else:
        first, second = torch.zeros(weight.shape[0], dtype=torch.long), torch.zeros((1, weight.shape[1]), dtype=torch.long)
        for p in watch.planes(weight):
            dims = varies(p)
            if dims == [0]:
                first = p.reshape(-1)
            elif dims == [1]:
                second = p.reshape(1, -1)
            elif dims == [0, 1] and groups > 1 and weight.shape[0] % groups == 0:
                blocks = p.reshape(groups, weight.shape[0] // groups, -1)
                ledger.unify(blocks[:, :1], blocks, call.where)
                second = blocks[:, 0]
            else:
                ledger.freeze(p, lambda: f"a dimension of the kernel in {call.where()}")
    if second is None:
        return None, None
    roles = ("in", "out") if transposed else ("out", "in")
    if first.numel() > 1:
        ledger.mark(first, "out" if transposed and weight.shape[1] == 1 and groups > 1 else roles[0])  # type: ignore[arg-type]
    if second.numel() > 1 and weight.shape[1] > 1:
        ledger.mark(second, roles[1])  # type: ignore[arg-type]
    rows = first.reshape(groups, -1) if weight.shape[0] % groups == 0 else None
    if transposed and weight.shape[1] == 1 and groups > 1:
        return rows, rows  # depthwise: one output for each group, named after its inputs
    return (rows, second) if transposed else (second, rows)


@rule("mm bmm")
def matrix(watch: Watch, call: Call) -> list[Planes]:
    """A matrix product."""
    a, b = call.args[0], call.args[1]
    return [contract(watch, call, watch.operand(a), watch.operand(b), watch.is_weight(a), watch.is_weight(b))]


@rule("addmm baddbmm _addmm_activation")
def matrix_and_bias(watch: Watch, call: Call) -> list[Planes]:
    """A matrix product and something added to it."""
    bias, a, b = call.args[0], call.args[1], call.args[2]
    planes = contract(watch, call, watch.operand(a), watch.operand(b), watch.is_weight(a), watch.is_weight(b))
    out = call.outputs[0]
    return [join(watch.ledger, [Operand(tuple(out.shape), planes, "the product"), watch.operand(bias)], out.dim(), call.where)]


@rule("linear")
def linear(watch: Watch, call: Call) -> list[Planes]:
    """A linear layer that was not taken apart into a matrix product."""
    x, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    w, o = watch.operand(weight), watch.operand(x)
    turned = Operand(w.shape[::-1], tuple(p.transpose(0, 1) for p in w.planes), w.what)
    planes = contract(watch, call, o, turned, watch.is_weight(x), watch.is_weight(weight))
    if bias is None:
        return [planes]
    out = call.outputs[0]
    return [join(watch.ledger, [Operand(tuple(out.shape), planes, "the product"), watch.operand(bias)], out.dim(), call.where)]


@rule("mv")
def matrix_vector(watch: Watch, call: Call) -> list[Planes]:
    """A matrix times a vector."""
    a, v = watch.operand(call.args[0]), watch.operand(call.args[1])
    column = Operand((*v.shape, 1), tuple(p.unsqueeze(-1) for p in v.planes), v.what)
    planes = contract(watch, call, a, column, watch.is_weight(call.args[0]), watch.is_weight(call.args[1]))
    return [tuple(p.squeeze(-1) for p in planes)]


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math _scaled_dot_product_fused_attention_overrideable"
)
def attention(watch: Watch, call: Call) -> list[Planes]:
    """Scaled dot-product attention: two matrix products. A head's query, key and value channels leave together."""
    q, *rest = (watch.operand(t) for t in call.args[:3])
    k, v = (_for_each_query(o, q) for o in rest)
    turned = Operand((*k.shape[:-2], k.shape[-1], k.shape[-2]), tuple(p.transpose(-1, -2) for p in k.planes), k.what)
    scores = Operand((*q.shape[:-1], k.shape[-2]), contract(watch, call, q, turned, False, False), "attention scores")
    bias = next((t for t in (*call.args[3:4], *(call.kwargs.get(n) for n in ("attn_mask", "attn_bias"))) if isinstance(t, Tensor)), None)
    if bias is not None and watch.planes(bias):  # a table of positions, with a row for each head
        joined = join(watch.ledger, [scores, watch.operand(bias)], len(scores.shape), call.where)
        scores = Operand(scores.shape, joined, scores.what)
    planes = contract(watch, call, scores, v, False, False)
    return [planes, *[()] * (len(call.outputs) - 1)]


def _for_each_query(o: Operand, q: Operand) -> Operand:
    """Keys or values with a head for every query head, where several share one (grouped-query attention)."""
    if len(q.shape) < 3 or o.shape[-3] == q.shape[-3] or o.shape[-3] == 1:
        return o
    times = q.shape[-3] // o.shape[-3]
    planes = tuple(p.repeat_interleave(times, p.dim() - 3) if p.shape[-3] > 1 else p for p in o.planes)
    return Operand((*o.shape[:-3], q.shape[-3], *o.shape[-2:]), planes, o.what)


def contract(watch: Watch, call: Call, a: Operand, b: Operand, a_is_weight: bool, b_is_weight: bool) -> Planes:
    """Planes of ``a @ b``, shapes ``(..., n, k) @ (..., k, m)``.

    Labels along ``k`` meet. Where they vary along the batch as well (attention heads), all labels of one batch entry are coupled, or, where
    columns leave, all labels at one position.
    """
    ledger = watch.ledger
    nd = max(len(a.shape), len(b.shape))
    columns = ledger.columns and not (a_is_weight or b_is_weight)
    a_passed, a_met = _sides(watch, call, a, -1, -2, columns)
    b_passed, b_met = _sides(watch, call, b, -2, -1, columns)
    for passed, met, weight in ((a_passed, a_met, a_is_weight), (b_passed, b_met, b_is_weight)):
        if weight:
            for p in met:
                ledger.mark(p, "in")
            for p in passed:
                ledger.mark(p, "out")
    if a.shape[-1] > 1:
        meeting = [
            Operand((*a.shape[:-2], a.shape[-1]), tuple(p.squeeze(-2) for p in a_met), a.what, a_is_weight),
            Operand((*b.shape[:-2], b.shape[-2]), tuple(p.squeeze(-1) for p in b_met), b.what, b_is_weight),
        ]
        for p in join(ledger, meeting, nd - 1, call.where):
            if not (a_is_weight or b_is_weight) and varies(p) == [nd - 2]:
                if columns:
                    ledger.consume(p)
                ledger.blur(p, lambda: f"two activations are multiplied over these channels in {call.where()}")
    sides = [
        Operand((*a.shape[:-1], 1), a_passed, a.what),
        Operand((*b.shape[:-2], 1, b.shape[-1]), b_passed, b.what),
    ]
    return join(ledger, sides, nd, call.where)


def _sides(watch: Watch, call: Call, x: Operand, k: int, free: int, columns: bool) -> tuple[Planes, Planes]:
    """Planes that reach the result, and planes that are contracted, of one operand."""
    passed, met = [], []
    for p in x.planes:
        if p.shape[k] > 1 and p.shape[free] > 1:
            watch.ledger.freeze(p, lambda: f"laid out over both sides of {call.where()}")
        elif p.shape[k] > 1:
            if columns:
                p = collapse(watch.ledger, p, [d for d in range(p.dim()) if d != p.dim() + k], call.where)
            met.append(p)
            if p.numel() > p.shape[k]:
                passed.append(collapse(watch.ledger, p, [k], call.where))
        else:
            passed.append(p)
    return tuple(passed), tuple(met)
