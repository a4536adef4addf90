"""Calibration: the captured graph run on real inputs, watched at the points that will be rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gossamer.errors import UsageError
from gossamer.quantization.build import bias_codes
from gossamer.quantization.graph import LINEAR, bias_node, op_name, tensor_at, weighted_nodes
from gossamer.quantization.observers import Histogram
from gossamer.sources.batches import count, split

Progress = Callable[[int, int], None]
_SAMPLE_BYTES = 256 << 20  # the largest single activation of the bias correction pass


class Observer(fx.Interpreter):
    """Runs a graph and feeds the values of some nodes to histograms."""

    def __init__(self, module: fx.GraphModule, watched: Mapping[fx.Node, str]) -> None:
        super().__init__(module)
        self.names = watched
        self.histograms = {node: Histogram() for node in watched}
        self.largest = 1

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; UsageError naming the point where its value is not finite."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
        if n in self.histograms:
            try:
                self.histograms[n].update(result)
            except ValueError:
                raise UsageError(
                    f"calibration gives NaN or infinity at {self.names[n]}: check the network's weights and the inputs"
                ) from None
        return result


def observe(
    module: fx.GraphModule, watched: Mapping[fx.Node, str], batches: Iterable[Any], example_inputs: Any, progress: Progress | None = None
) -> tuple[dict[fx.Node, Histogram], list[Any]]:
    """Run all calibration batches once.

    Returns:
        A histogram for each watched node, and flat inputs for `correct_biases`: leading samples, few enough to be held at once.

    Raises:
        UsageError: there are no batches, one does not fit the network, or a value is not finite.
    """
    observer, kept, room, total = Observer(module, watched), [], 1, count(batches)
    done = 0
    with torch.no_grad():
        for leaves in _flat(batches, example_inputs, module):
            try:
                observer.run(*leaves, enable_io_processing=False)
            except UsageError as e:
                raise UsageError(str(e).splitlines()[0]) from None  # torch.fx appends where in the graph it was
            except RuntimeError as e:
                raise UsageError(f"calibration batch {done + 1} does not run through the network: {str(e).splitlines()[0][:160]}") from None
            samples = _batch_size(leaves)
            if done == 0:
                room = max(1, _SAMPLE_BYTES * max(1, samples) // observer.largest)
            if room > 0 and (module.meta["dynamic_batch"] or done == 0):
                kept.append([x[:room] if _is_batched(x, samples) and module.meta["dynamic_batch"] else x for x in leaves])
                room -= samples
            done += 1
            if progress:
                progress(done, total or done)
    if not done:
        raise UsageError("the calibration data is empty: give at least one batch")
    return observer.histograms, _joined(kept)


def correct_biases(floating: fx.GraphModule, quantised: fx.GraphModule, leaves: list[Any]) -> dict[str, Tensor]:
    """Shift each bias by the mean error of its channel, layer by layer in execution order, each with the ones before it corrected.

    Rounded weights and clipped activations shift a channel's mean; the next layers amplify it. See Nagel et al., "Data-Free
    Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, here with measured means.

    Args:
        floating: the canonical float graph.
        quantised: the graph that `gossamer.quantization.build.quantized` made of a copy of it; its bias codes are changed in place.
        leaves: flat inputs.

    Returns:
        Shift per corrected layer, by node name.
    """
    with torch.no_grad():
        wanted = _Means(floating)
        wanted.run(*leaves, enable_io_processing=False)
        correcting = _Corrector(quantised, wanted.means)
        correcting.run(*leaves, enable_io_processing=False)
    return correcting.shifts


class _Means(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.layers = set(weighted_nodes(module.graph))
        self.means: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.layers:
            self.means[n.name] = _channel_mean(n, result)
        return result


class _Corrector(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, wanted: dict[str, Tensor]) -> None:
        super().__init__(module)
        self.wanted, self.shifts = wanted, {}  # type: tuple[dict[str, Tensor], dict[str, Tensor]]
        self.biases: dict[str, str] = {}
        for layer in weighted_nodes(module.graph):
            bias = bias_node(layer)
            if isinstance(bias, fx.Node) and bias.target is torch.ops.gossamer.dequantize.default and layer.name in wanted:
                self.biases[layer.name] = str(bias.args[0].target)  # type: ignore[union-attr]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = self.biases.get(n.name)
        if name is None:
            return result
        assert isinstance(self.module, fx.GraphModule)
        shift = self.wanted[n.name] - _channel_mean(n, result)
        self.shifts[n.name] = shift
        codes, step = tensor_at(self.module, name), tensor_at(self.module, name + "_step")
        codes.copy_(bias_codes(codes.double() * step.double() + shift, step))
        return result + (shift if op_name(n) in LINEAR else shift.view(-1, *[1] * (result.dim() - 2)))


def _channel_mean(layer: fx.Node, result: Tensor) -> Tensor:
    if op_name(layer) in LINEAR:
        return result.flatten(0, -2).mean(0) if result.dim() > 1 else result
    return result.movedim(1, 0).flatten(1).mean(1)


def _flat(batches: Iterable[Any], example_inputs: Any, module: fx.GraphModule) -> Iterator[list[Any]]:
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
