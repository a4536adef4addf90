"""Matrix products, attention, norms, and a norm before a pointwise convolution."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.memory.kernels.calls import Call, activation, carve, room
from gossamer.memory.program import Step

ATTENTION_SCRATCH = 1 << 17


STRIP_BYTES = 1 << 17


def matrix(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """A product of two matrices or of batches of them, with a bias where there is one."""
    (a, b, bias), (out,) = reads, writes
    if step.options["batch"]:
        return [lambda: torch.bmm(a, b, out=out)]
    if bias is None:
        return [lambda: torch.mm(a, b, out=out)]
    return [lambda: torch.addmm(bias, a, b, out=out)]


def heads_at_once(heads: int, queries: int, keys: int) -> int:
    """Heads whose scores fit into `ATTENTION_SCRATCH` together; at least one."""
    return max(1, min(heads, ATTENTION_SCRATCH // (4 * queries * keys)))


def attention_scratch(step: Step) -> int:
    """Scores of as many heads as are done at once."""
    q, k = step.reads[:2]
    assert q is not None and k is not None
    at_once = heads_at_once(q.shape[1], q.shape[2], k.shape[2]) if q.shape[1] == k.shape[1] else 1
    return room(at_once * q.shape[2] * k.shape[2])


def attention(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """Scaled dot-product attention, some heads at a time; heads may share keys and values."""
    (q, k, v, mask), (out,) = reads, writes
    n, heads, length, _ = q.shape
    shared = heads // k.shape[1]
    at_once = heads_at_once(heads, length, k.shape[2]) if shared == 1 else 1
    (scores,) = carve(scratch, [(at_once, length, k.shape[2])])
    calls: list[Call] = []
    for i, h in itertools.product(range(n), range(0, heads, at_once)):
        end = min(heads, h + at_once)
        kv = slice(h // shared, h // shared + end - h)
        parts = (q[i, h:end], k[i, kv], v[i, kv], out[i, h:end], None if mask is None else mask[i, h:end])
        calls += _attend(*parts, scores[: end - h], step.options["scale"])
    return calls


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Any, scores: Tensor, scale: float) -> list[Call]:
    """Some heads: scores, mask, softmax in place, and the product with the values."""
    keys = k.transpose(1, 2)
    calls: list[Call] = [lambda: torch.baddbmm(scores, q, keys, beta=0, alpha=scale, out=scores)]
    if mask is not None:
        calls.append(lambda: scores.add_(mask))
    calls.append(lambda: torch.ops.aten._softmax.out(scores, -1, False, out=scores))
    return [*calls, lambda: torch.bmm(scores, v, out=out)]


def norm_shape(shape: Sequence[int], dims: Sequence[int]) -> list[int]:
    """Shape of what is left of a tensor when dimensions are reduced and kept."""
    return [1 if d in dims else n for d, n in enumerate(shape)]


def norm_scratch(step: Step) -> int:
    """A mean and a spread for each row."""
    count = torch.Size(norm_shape(step.writes[0].shape, step.options["dims"])).numel()
    return room(count, count)


def norm(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """A layer or group norm: mean and spread in scratch, the rest where the output lies."""
    (x, w, b), (out,) = reads, writes
    dims, eps = step.options["dims"], step.options["eps"]
    shape = norm_shape(x.shape, dims)
    mean, spread = carve(scratch, [shape, shape])
    count = 1
    for d in dims:
        count *= x.shape[d]

    def run() -> None:
        torch.mean(x, dim=dims, keepdim=True, out=mean)
        torch.sub(x, mean, out=out)
        torch.linalg.vector_norm(out, dim=dims, keepdim=True, out=spread)
        spread.mul_(spread).mul_(1 / count).add_(eps).rsqrt_()
        out.mul_(spread)
        if w is not None and b is not None:
            torch.addcmul(b, out, w, out=out)
        elif w is not None:
            out.mul_(w)
        elif b is not None:
            out.add_(b)

    return [run]


def strips_scratch(step: Step) -> int:
    """One strip of normed pixels."""
    x = step.reads[0]
    assert x is not None
    n, c, h, w = x.shape
    return room(c * strip_rows(c, n * h * w))


def strips(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """A norm, its activation and a 1x1 convolution, for some pixels at a time."""
    x, scale, shift, w, b = reads
    (out,) = writes
    pixels, channels = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), x.shape[1]
    assert pixels.data_ptr() == x.data_ptr()
    target = out.permute(0, 2, 3, 1).view(-1, out.shape[1])
    scale, shift, weight = scale.flatten(), shift.flatten(), w.flatten(1).t()
    length = strip_rows(channels, len(pixels))
    (strip,) = carve(scratch, [(length, channels)])
    calls: list[Call] = []
    for start in range(0, len(pixels), length):
        part, goal = pixels[start : start + length], target[start : start + length]
        calls += _strip(part, goal, strip[: len(part)], scale, shift, weight, b, step.options)
    return calls


def _strip(
    part: Tensor, goal: Tensor, strip: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, b: Any, options: Any
) -> list[Call]:  # fmt: skip
    """One strip: normed into scratch, then multiplied into its place."""
    calls: list[Call] = [lambda: torch.addcmul(shift, part, scale, out=strip)]
    calls += activation(options["norm_act"], strip, strip)
    calls.append((lambda: torch.mm(strip, weight, out=goal)) if b is None else (lambda: torch.addmm(b, strip, weight, out=goal)))
    return calls + (activation(options["act"], goal, goal) if options["act"] is not None else [])


def strip_rows(channels: int, pixels: int) -> int:
    """Pixels of a strip: as many as fit into `STRIP_BYTES`, at least 16 of those there are."""
    return min(pixels, max(16, STRIP_BYTES // (4 * channels)))
