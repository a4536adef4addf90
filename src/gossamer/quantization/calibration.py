"""Calibration: the captured graph run on real inputs, watched at the points that will be rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gossamer.errors import UsageError
from gossamer.quantization.graph import sample_bytes
from gossamer.quantization.observers import Channels, Histogram
from gossamer.sources.batches import count, split

Progress = Callable[[int, int], None]
_SAMPLE_BYTES = 512 << 20  # the largest single activation, were all samples that are kept run at once
_PART_BYTES = (
    24 << 20
)  # of the largest activation of samples run at once: allocators ask the system for each larger one anew, 3 times as slow on images


class Observer(fx.Interpreter):
    """Runs a graph and feeds the values of some nodes to histograms, of some to statistics of their channels."""

    def __init__(self, module: fx.GraphModule, watched: Mapping[fx.Node, str], by_channel: Iterable[fx.Node] = ()) -> None:
        super().__init__(module)
        self.channels = {node: Channels() for node in by_channel}
        self.names = watched
        self.histograms = {node: Histogram() for node in watched}
        self.largest, self.batch = 1, 1

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; UsageError naming the point where its value is not finite."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
        ends = self.channels[n].update(result) if n in self.channels else None
        if n in self.histograms:
            try:
                self.histograms[n].update(result, ends)
            except ValueError:
                raise UsageError(
                    f"calibration gives NaN or infinity at {self.names[n]}: check the network's weights and the inputs"
                ) from None
        return result


def observe(
    module: fx.GraphModule,
    watched: Mapping[fx.Node, str],
    batches: Iterable[Any],
    example_inputs: Any,
    progress: Progress | None = None,
    *,
    by_channel: Iterable[fx.Node] = (),
    whole: bool = False,
) -> tuple[Observer, list[Any]]:
    """Run all calibration batches once; memory does not grow with their number.

    Args:
        module: a captured graph.
        watched: names of the nodes whose values are counted.
        batches: as they were given.
        example_inputs: tell inputs from targets.
        progress: called with batches done and all.
        by_channel: nodes whose channels are looked at one by one.
        whole: count each batch as one, however large, for what looks at its extremes.

    Returns:
        An observer that holds a histogram of each watched node and the size of the largest batch, and flat inputs: leading samples, few enough to be run at once.

    Raises:
        UsageError: there are no batches, one does not fit the network, or a value is not finite.
    """
    observer, kept, room, total = Observer(module, watched, by_channel), [], 1, count(batches)
    done = 0
    with torch.no_grad():
        for leaves in flat_batches(batches, example_inputs, module):
            try:
                for part in [leaves] if whole else parts(module, leaves):
                    observer.run(*part, enable_io_processing=False)
                    if done == 0:
                        room = max(1, _SAMPLE_BYTES * max(1, _batch_size(part)) // observer.largest)
            except UsageError as e:
                raise UsageError(str(e).splitlines()[0]) from None  # torch.fx appends where in the graph it was
            except RuntimeError as e:
                raise UsageError(f"calibration batch {done + 1} does not run through the network: {str(e).splitlines()[0][:160]}") from None
            samples = _batch_size(leaves)
            observer.batch = max(samples, observer.batch)
            if room > 0 and (module.meta["dynamic_batch"] or done == 0):
                kept.append([x[:room] if _is_batched(x, samples) and module.meta["dynamic_batch"] else x for x in leaves])
                room -= samples
            done += 1
            if progress:
                progress(done, total or done)
    if not done:
        raise UsageError("the calibration data is empty: give at least one batch")
    return observer, _joined(kept)


def observe_again(
    module: fx.GraphModule, watched: Mapping[fx.Node, str], leaves: list[Any], whole: int | None = None
) -> dict[fx.Node, Histogram]:
    """Histograms over samples that `observe` kept, for a graph whose weights have changed since; in batches of ``whole`` for what looks at their extremes."""
    observer = Observer(module, watched)
    with torch.no_grad():
        for part in parts(module, leaves) if whole is None else _divided(module, leaves, whole):
            observer.run(*part, enable_io_processing=False)
    return observer.histograms


def parts(module: fx.GraphModule, leaves: list[Any], most: int = 32) -> list[list[Any]]:
    """Samples in batches of at most ``most``, and of few enough for their values to be reused by the allocator; as they are where the batch size is fixed."""
    samples, step = _batch_size(leaves), max(1, min(most, int(_PART_BYTES / max(sample_bytes(module), default=1))))
    return _divided(module, leaves, -(-samples // -(-samples // step)) if samples > step else step)  # parts alike


def _divided(module: fx.GraphModule, leaves: list[Any], step: int) -> list[list[Any]]:
    samples = _batch_size(leaves)
    if not module.meta["dynamic_batch"] or samples <= step:
        return [leaves]
    return [[x[i : i + step] if _is_batched(x, samples) else x for x in leaves] for i in range(0, samples, step)]


def leading(module: fx.GraphModule, leaves: list[Any], most: int) -> list[Any]:
    """The first kept samples; all where the batch size is fixed."""
    samples = _batch_size(leaves)
    return [x[:most] if _is_batched(x, samples) else x for x in leaves] if module.meta["dynamic_batch"] else leaves


def sample(module: fx.GraphModule, leaves: list[Any], which: int, most: int) -> list[Any]:
    """Every other kept sample, from the one at ``which`` on, at most ``most``; all of them where there are too few or the batch size is fixed."""
    samples = _batch_size(leaves)
    if not module.meta["dynamic_batch"] or samples < 2:
        return leaves
    return [x[which::2][:most] if _is_batched(x, samples) else x for x in leaves]


def flat_batches(batches: Iterable[Any], example_inputs: Any, module: fx.GraphModule) -> Iterator[list[Any]]:
    """Each batch as the flat list of the graph's inputs."""
    known = [n for n in module.graph.nodes if n.op == "placeholder"]
    device = next((t.device for t in module.state_dict().values()), torch.device("cpu"))
    for number, batch in enumerate(batches, start=1):
        args, kwargs, _ = split(batch, example_inputs)
        if kwargs and isinstance(example_inputs, dict):
            missing = [k for k in example_inputs if k not in kwargs]
            if missing:
                raise UsageError(f"calibration batch {number} lacks the input {missing[0]!r}")
            kwargs = {k: kwargs[k] for k in example_inputs}
        leaves = [x.to(device) if isinstance(x, Tensor) else x for x in pytree.tree_leaves((args, kwargs))]
        if len(leaves) != len(known):
            raise UsageError(f"calibration batch {number} holds {len(leaves)} inputs, but the network takes {len(known)}")
        yield leaves


def _batch_size(leaves: list[Any]) -> int:
    return next((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim()), 1)


def _is_batched(x: Any, samples: int) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == samples


def _joined(kept: list[list[Any]]) -> list[Any]:
    return [
        torch.cat(same) if len(same) > 1 and isinstance(same[0], Tensor) and same[0].dim() else same[0] for same in zip(*kept, strict=True)
    ]
