"""What a call takes from torch's allocator, by its profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Taken(NamedTuple):
    """Bytes: the most at any moment, and all together."""

    peak: int
    total: int


def taken(run: Callable[[], Any]) -> Taken:
    """Bytes that a call takes beside what is there before."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        kept = run()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = total = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
        total += max(0, event.nbytes())
    del kept
    return Taken(peak, total)
