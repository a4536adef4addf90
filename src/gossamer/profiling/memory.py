"""Peak activation memory of an ONNX file, by the liveness of the values in the graph that the runtime really executes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ALIASES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})  # the output shares the input's buffer


def peak_activation_bytes(path: str | Path, example_inputs: Any) -> int:
    """The largest set of live activations while ONNX Runtime executes a file, in bytes.

    The runtime's own optimised graph is taken (fusions done, layout unchanged), each value's size is measured by running it, and
    a value lives from the node that makes it to the last that reads it. Inputs and outputs count, weights and kernels' scratch do not.

    Args:
        path: an ONNX file.
        example_inputs: a tuple of tensors in the order of the graph's inputs, or a dict by name.

    Returns:
        Bytes; for the batch of ``example_inputs``.
    """
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = onnx.load(optimised)
    graph = model.graph
    made = [name for node in graph.node for name in node.output if name]
    final = [o.name for o in graph.output]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in final)
    plain = ort.SessionOptions()
    plain.log_severity_level = 3
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), plain, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    values = example_inputs if isinstance(example_inputs, Mapping) else dict(zip(names, example_inputs, strict=False))
    feeds = {name: np.asarray(value) for name, value in values.items() if name in names}
    outputs = [o.name for o in session.get_outputs()]
    sizes = {name: value.nbytes for name, value in zip(outputs, session.run(outputs, feeds), strict=True) if isinstance(value, np.ndarray)}
    sizes.update({name: value.nbytes for name, value in feeds.items()})
    nodes = [(node.op_type, [n for n in node.input if n], [n for n in node.output if n]) for node in graph.node]
    return largest_live_set(nodes, sizes, inputs=list(feeds), outputs=final)


def largest_live_set(
    nodes: list[tuple[str, list[str], list[str]]], sizes: Mapping[str, int], *, inputs: list[str], outputs: list[str]
) -> int:
    """Peak of the summed sizes of live buffers over a node order.

    Example:
        >>> chain = [("Conv", ["x"], ["a"]), ("Reshape", ["a"], ["b"]), ("Conv", ["b"], ["y"])]
        >>> largest_live_set(chain, {"x": 10, "a": 30, "b": 30, "y": 5}, inputs=["x"], outputs=["y"])
        40

    Args:
        nodes: ``(op, inputs, outputs)`` in execution order.
        sizes: bytes of each activation; a name that is absent (a weight) costs nothing.
        inputs, outputs: of the graph; inputs live from the start, outputs to the end.
    """
    buffer = {name: name for name in inputs}
    for op, reads, writes in nodes:
        for name in writes:
            shared = op in ALIASES and reads and reads[0] in buffer
            buffer[name] = buffer[reads[0]] if shared else name
    last = dict.fromkeys(inputs, -1)
    for i, (_, reads, writes) in enumerate(nodes):
        for name in (*reads, *writes):
            if name in buffer:
                last[buffer[name]] = i
    for name in outputs:
        if name in buffer:
            last[buffer[name]] = len(nodes)
    live = {name: sizes.get(name, 0) for name in inputs}
    peak = sum(live.values())
    for i, (_, _, writes) in enumerate(nodes):
        live.update({buffer[n]: sizes.get(buffer[n], 0) for n in writes})
        peak = max(peak, sum(live.values()))
        live = {name: size for name, size in live.items() if last[name] > i}
    return peak
