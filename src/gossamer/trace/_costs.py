"""Multiply-adds of contractions. One multiply-add is one MAC; everything that is not a contraction counts nothing."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from gossamer.trace._watch import Call

Cost = tuple[str, int, tuple[Tensor | None, ...]]


def contraction_cost(call: Call) -> Cost | None:
    """Kind, MACs and operands that may be weights (weight first, bias last) of a contraction; None for any other operation."""
    a = call.args
    match call.op:
        case "convolution" | "_convolution":
            x, w, bias = a[0], a[1], a[2]
            if a[6]:  # transposed: every input position meets the whole kernel
                return "convolution", x.numel() * prod(w.shape[1:]), (w, bias)
            return "convolution", call.outputs[0].numel() * prod(w.shape[1:]), (w, bias)
        case "mm" | "bmm":
            return _matrix(call, a[0], a[1], None)
        case "addmm" | "baddbmm" | "_addmm_activation":
            return _matrix(call, a[1], a[2], a[0])
        case "linear":
            w = a[1]
            return "linear", call.outputs[0].numel() * w.shape[-1], (w, call.arg(2, "bias"))
        case "gossamer::dynamic_linear" | "gossamer::grouped_linear":
            return "linear", call.outputs[0].numel() * a[1].shape[-1], (a[1], None)
        case "gossamer::dynamic_lstm":
            return "lstm", a[0].shape[0] * a[0].shape[1] * (a[3].numel() + a[4].numel()), (a[3], None)
        case "mv":
            return "linear", a[0].numel(), (a[0], None)
        case "addmv":
            return "linear", a[1].numel(), (a[1], a[0])
        case "dot" | "vdot":
            return "matmul", a[0].numel(), ()
        case op if op.startswith("_scaled_dot_product"):
            q, k, v = a[0], a[1], a[2]
            return "attention", prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1]), ()
    return None


def _matrix(call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> Cost:
    macs = a.numel() * b.shape[-1]
    return ("linear" if call.op in ("mm", "addmm", "_addmm_activation") else "matmul"), macs, (b, a, bias)
