"""Peak activation memory of an ONNX file: the arena planned for the values of the graph that the runtime really executes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.memory.arena import place
from gossamer.memory.liveness import Life, peak

ALIASES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})  # the output shares the input's buffer
IN_PLACE = frozenset(
    {
        "Add", "BatchNormalization", "Clip", "Elu", "Exp", "FusedConv", "Gelu", "HardSigmoid", "HardSwish", "LayerNormalization", "LeakyRelu", "Mul",
        "QuickGelu", "Relu", "Sigmoid", "Softmax", "Sqrt", "Sub", "Sum", "Tanh",
    }
)  # fmt: skip
RESIDUAL = {"FusedConv": 3}  # only what is added to the convolution


def peak_activation_bytes(path: str | Path, example_inputs: Any) -> int:
    """The arena that the activations of a file need, in bytes, planned as `gossamer.plan_memory` plans.

    The runtime's own optimised graph is taken (fusions done, layout unchanged), each value's size is measured by running it, and
    a value lives from the node that makes it to the last that reads it. Results of operations element by element lie on an input that ends
    there. Inputs and outputs count, weights and kernels' scratch do not.

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
    return planned_bytes(nodes, sizes, inputs=list(feeds), outputs=final)


def planned_bytes(nodes: list[tuple[str, list[str], list[str]]], sizes: Mapping[str, int], *, inputs: list[str], outputs: list[str]) -> int:
    """The smallest arena found for the activations of a node order.

    Examples:
        >>> chain = [("Conv", ["x"], ["a"]), ("Relu", ["a"], ["b"]), ("Conv", ["b"], ["y"])]
        >>> planned_bytes(chain, {"x": 10, "a": 30, "b": 30, "y": 5}, inputs=["x"], outputs=["y"])
        40

    Args:
        nodes: ``(op, inputs, outputs)`` in execution order.
        sizes: bytes of each activation; a name that is absent (a weight) costs nothing.
        inputs, outputs: of the graph; inputs live from the start, outputs to the end.
    """
    buffer = {name: name for name in inputs}
    last = dict.fromkeys(inputs, -1)
    for i, (op, reads, writes) in enumerate(nodes):
        for name in writes:
            buffer[name] = buffer[reads[0]] if op in ALIASES and reads and reads[0] in buffer else name
        last.update({buffer[name]: i for name in (*reads, *writes) if name in buffer})
    kept = {buffer[name] for name in outputs if name in buffer}
    last.update(dict.fromkeys(kept, len(nodes)))
    root = {name: name for name in last}
    first = dict.fromkeys(inputs, -1)
    for i, (op, reads, writes) in enumerate(nodes):
        made = [buffer[n] for n in writes if buffer[n] not in first]
        first.update(dict.fromkeys(made, i))
        ends = [root[buffer[n]] for n in reads[RESIDUAL.get(op, 0) :] if n in buffer]
        taken = next((b for b in ends if made and last[b] == i and sizes.get(b, 0) == sizes.get(made[0], 0)), None)
        if op in IN_PLACE and taken is not None:
            root[made[0]], last[taken] = taken, last[made[0]]
    found = [Life(b, (k,), sizes.get(b, 0), first[b], last[b]) for k, b in enumerate(last) if root[b] == b and sizes.get(b, 0)]
    return place(found, peak(found, len(nodes))).size
