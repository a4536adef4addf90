"""What is alive in memory during one training step, from the allocator's own events."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gossamer.training.feeding import samples_of
from gossamer.training.stepping import Stepper


@dataclass
class Timeline:
    """Bytes alive over time, those that were alive before the start not counted.

    Attributes:
        times_ns: of each event, rising.
        live_bytes: after each event.
    """

    times_ns: npt.NDArray[np.int64]
    live_bytes: npt.NDArray[np.int64]

    @property
    def peak_bytes(self) -> int:
        """The largest value; at least 0."""
        return max(0, int(self.live_bytes.max(initial=0)))

    def at(self, time_ns: int) -> int:
        """Bytes alive at a moment."""
        index = int(np.searchsorted(self.times_ns, time_ns, side="right")) - 1
        return int(self.live_bytes[index]) if index >= 0 else 0

    def highest(self, start_ns: int, end_ns: int) -> int:
        """The most that is alive between two moments."""
        first, last = np.searchsorted(self.times_ns, [start_ns, end_ns], side="right")
        return max(self.at(start_ns), int(self.live_bytes[first:last].max(initial=0)))


def record(work: Callable[[], None], device: torch.device) -> Timeline:
    """Run something and see what its tensors take on a device.

    Examples:
        >>> record(lambda: torch.zeros(1000).sum(), torch.device("cpu")).peak_bytes >= 4000
        True
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
        work()
    wanted = {"cpu": 0, "cuda": 1}.get(device.type, 0)
    events = [
        (e.start_ns(), e.nbytes())
        for e in profiled.profiler.kineto_results.events()
        if e.name() == "[memory]" and int(e.device_type().value if hasattr(e.device_type(), "value") else e.device_type()) == wanted
    ]
    events.sort(key=lambda event: event[0])
    times, sizes = (np.array([e[i] for e in events], dtype=np.int64) for i in (0, 1))
    return Timeline(times, np.cumsum(sizes))


@dataclass
class Marks:
    """When a module ran, in nanoseconds since the epoch, and what it returned.

    Attributes:
        start_ns, end_ns: of its forward pass.
        backward_ns: when the gradient of its output was there.
        output_bytes: of its output tensors.
        calls: in one forward pass.
        inputs: tensors among its positional inputs.
        nested: names of modules that ran inside it.
    """

    start_ns: int = 0
    end_ns: int = 0
    backward_ns: int | None = None
    output_bytes: int = 0
    calls: int = 0
    inputs: int = 0
    nested: list[str] = field(default_factory=list)


def busy_ns(device: torch.device) -> int:
    """A clock that a busy machine does not disturb: the process's own time on a CPU, else time after what the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter_ns()
    return time.process_time_ns()


@contextmanager
def marking(model: nn.Module, device: torch.device, *, busy: bool = False) -> Iterator[dict[str, Marks]]:
    """Note when each module runs, by the clock on the wall or by `busy_ns`; hooks are gone afterwards."""
    found: dict[str, Marks] = {}
    inside: list[str] = []
    handles = []

    def now() -> int:
        if busy:
            return busy_ns(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.time_ns()

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[object, ...]) -> None:
            mark = found.setdefault(name, Marks())
            mark.calls, mark.inputs, mark.start_ns = mark.calls + 1, sum(isinstance(a, Tensor) for a in args), now()
            for outer in inside:
                found[outer].nested.append(name)
            inside.append(name)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, out: object) -> None:
            mark = found[name]
            mark.end_ns = now()
            inside.pop()
            tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
            mark.output_bytes = sum(t.untyped_storage().nbytes() for t in tensors)

            def begun(_grad: Tensor) -> None:
                mark.backward_ns = mark.backward_ns or now()

            for t in tensors:
                if t.requires_grad:
                    t.register_hook(begun)

        return hook

    try:
        for name, module in model.named_modules():
            if name:
                handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def leaving_no_trace(run: Stepper) -> Iterator[None]:
    """Put back buffers and modes, and drop gradients, after steps that were made to measure."""
    kept = [(b, b.detach().clone()) for b in run.model.buffers()]
    modes = [(m, m.training) for m in run.model.modules()]
    devices = [run.device] if run.device.type == "cuda" else []
    run.model.train()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
        for module, mode in modes:
            module.training = mode
        run.model.zero_grad(set_to_none=True)


def one_step(run: Stepper, raw: object, *, free_gradients: bool, keep_gradients: bool = False) -> Callable[[], None]:
    """A forward and a backward pass without an update.

    Args:
        run: what steps are made with.
        raw: a batch.
        free_gradients: drop each gradient when it is complete, as an optimiser in the backward pass does.
        keep_gradients: add to those of the step before, as accumulation does.
    """
    batch = run.prepare(raw)
    assert samples_of(batch)

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    def work() -> None:
        handles = [p.register_post_accumulate_grad_hook(drop) for p in run.model.parameters() if p.requires_grad and free_gradients]
        try:
            loss = run.loss_of(batch, "the step that measures memory")
            run.backward(loss)
            del loss
        finally:
            for handle in handles:
                handle.remove()
            if not keep_gradients:
                run.model.zero_grad(set_to_none=True)  # what the next recording would see being freed

    return work
