"""Rewrites of an ONNX model: exact ones that let a runtime use its integer kernels, and ones that leave out what no runtime reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from gossamer.exporting.packing import pack_weights

_MOVES = {
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Identity",
    "DepthToSpace",
    "SpaceToDepth",
    "MaxPool",
}
_ONE_OUTPUT_MOVES = _MOVES - {"Split", "MaxPool"}


def rewrite(model: ModelProto) -> ModelProto:
    """Apply every rewrite, in place, and return the model: same inputs, outputs and values, fewer bytes and kernels that fit."""
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    _strip(model)
    graph = _Graph(model)
    graph.integer_constants()
    graph.average_pools(ranks)
    graph.weights_transposed()
    graph.float_biases()
    graph.weight_zero_points()
    while graph.dequantize_later() or graph.quantize_earlier():
        pass
    graph.write()
    pack_weights(model)
    _share_initializers(model)
    _name_values(model)
    _batch_dimension(model)
    return model


class _Graph:
    """A model's nodes with their producers and consumers; `write` puts them back in topological order."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.constants: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer}
        for node in [n for n in self.nodes if n.op_type == "Constant" and n.attribute[0].name == "value"]:
            tensor = TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            self.constants[tensor.name] = tensor
            self.nodes.remove(node)
        self.outputs = {o.name for o in model.graph.output}
        self.fresh = 0
        self.index()

    def index(self) -> None:
        self.maker = {o: n for n in self.nodes for o in n.output if o}
        self.readers: dict[str, list[NodeProto]] = {}
        for n in self.nodes:
            for i in n.input:
                self.readers.setdefault(i, []).append(n)

    def name(self) -> str:
        self.fresh += 1
        return f"rewritten_{self.fresh}"

    def array(self, name: str) -> np.ndarray | None:
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def only_reader(self, value: str) -> NodeProto | None:
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.outputs else None

    def activation_dequantized(self, value: str) -> NodeProto | None:
        """The node that gives ``value`` from one step per tensor, where it is one."""
        node = self.maker.get(value)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] in self.constants:
            return None
        scale = self.array(node.input[1])
        return node if scale is not None and scale.ndim == 0 else None

    def integer_constants(self) -> None:
        """Integer weights that are transposed or cast at every run, and biases that are negated: stored so. Steps of blocks, too."""
        for node in list(self.nodes):
            w = self.array(node.input[0]) if node.op_type in ("Transpose", "Cast", "Neg") and node.input else None
            small = w is not None and (w.dtype in (np.int8, np.uint8) or self._scales_blocks(node.output[0]) or node.op_type == "Neg")
            if w is None or not small or node.output[0] in self.outputs:
                continue
            if node.op_type == "Neg":
                w = -w
            elif node.op_type == "Cast":
                kind = next(a.i for a in node.attribute if a.name == "to")
                if kind not in (TensorProto.INT4, TensorProto.UINT4):
                    continue
                w = w.astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
            else:
                w = np.ascontiguousarray(w.transpose(next((list(a.ints) for a in node.attribute), None)))
            self.constants[node.output[0]] = numpy_helper.from_array(w, node.output[0])
            self.nodes.remove(node)
        self.index()

    def _scales_blocks(self, value: str) -> bool:
        """Whether all that reads a value is a DequantizeLinear by blocks, for its steps."""
        readers = self.readers.get(value, [])
        blocks = [any(a.name == "block_size" and a.i for a in r.attribute) and r.input[1] == value for r in readers]
        return bool(blocks) and all(blocks)

    def average_pools(self, ranks: dict[str, int]) -> None:
        """A mean over all positions as GlobalAveragePool, which has an integer kernel."""
        for node in [n for n in self.nodes if n.op_type == "ReduceMean"]:
            axes = self.array(node.input[1]) if len(node.input) > 1 else None
            rank = ranks.get(node.input[0], 0)
            keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
            if axes is None or rank < 3 or sorted(int(a) % rank for a in axes.reshape(-1)) != list(range(2, rank)):
                continue
            pooled = node.output[0] if keep else self.name()
            at = self.nodes.index(node)
            new = [onnx.helper.make_node("GlobalAveragePool", [node.input[0]], [pooled])]
            if not keep:
                new.append(onnx.helper.make_node("Flatten", [pooled], [node.output[0]]))
            self.nodes[at : at + 1] = new
        self.index()

    def weights_transposed(self) -> None:
        """A stored weight that is transposed at every run: stored transposed."""
        for node in [n for n in self.nodes if n.op_type == "Transpose"]:
            source = self.maker.get(node.input[0])
            if source is None or source.op_type != "DequantizeLinear" or self.only_reader(node.input[0]) is not node:
                continue
            w, scale = self.array(source.input[0]), self.array(source.input[1])
            if w is None or scale is None or len(self.readers[source.input[0]]) > 1:
                continue
            perm = list(node.attribute[0].ints) if node.attribute else list(range(w.ndim))[::-1]  # type: ignore[union-attr]
            name = source.input[0]
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(w.transpose(perm)), name)
            if scale.ndim:
                axis = next((a.i for a in source.attribute if a.name == "axis"), 1)
                _set(source, "axis", perm.index(axis % w.ndim))
            source.output[0] = node.output[0]  # type: ignore[union-attr]
            self.nodes.remove(node)
            self.index()

    def float_biases(self) -> None:
        """An int32 bias that no kernel takes as such (the Add after a MatMul): stored in float."""
        for node in [n for n in self.nodes if n.op_type == "DequantizeLinear"]:
            q = self.constants.get(node.input[0])
            if (
                q is None
                or q.data_type != TensorProto.INT32
                or any(r.op_type in ("Conv", "Gemm") for r in self.readers.get(node.output[0], []))
            ):
                continue
            codes, scale = self.array(node.input[0]), self.array(node.input[1])
            if codes is None or scale is None or node.output[0] in self.outputs:
                continue
            self.constants[node.output[0]] = numpy_helper.from_array(codes.astype(np.float32) * scale, node.output[0])
            self.nodes.remove(node)
        self.index()

    def weight_zero_points(self) -> None:
        """Zero points of signed weights, which ONNX lets one leave out and Gemm's and MatMul's integer kernels ask for."""
        for node in self.nodes:
            blocks = any(a.name == "block_size" and a.i for a in node.attribute)
            q = self.constants.get(node.input[0]) if node.op_type == "DequantizeLinear" and len(node.input) == 2 and not blocks else None
            if (
                q is None
                or q.data_type != TensorProto.INT8
                or not any(r.op_type in ("Gemm", "MatMul") for r in self.readers[node.output[0]])
            ):
                continue
            scale, name = self.array(node.input[1]), self.name()
            assert scale is not None
            self.constants[name] = numpy_helper.from_array(np.zeros(scale.shape, np.int8), name)
            node.input.append(name)

    def dequantize_later(self) -> bool:
        """Where dequantised values are only moved, move the integers and dequantise after. True where something changed."""
        for node in self.nodes:
            if node.op_type not in _MOVES or (node.op_type == "MaxPool" and len(node.output) > 1):
                continue
            source = self.activation_dequantized(node.input[0])
            if source is None:
                continue
            node.input[0] = source.input[0]
            at = self.nodes.index(node) + 1
            for i, value in enumerate(node.output):
                node.output[i] = self.name()
                self.nodes.insert(at, onnx.helper.make_node("DequantizeLinear", [node.output[i], *source.input[1:]], [value]))
            self._drop_unread(source)
            self.index()
            return True
        return False

    def quantize_earlier(self) -> bool:
        """Where a value is moved and then quantised, quantise and then move. True where something changed."""
        for node in self.nodes:
            if node.op_type != "QuantizeLinear" or (len(node.input) > 1 and (s := self.array(node.input[1])) is not None and s.ndim):
                continue
            move = self.maker.get(node.input[0])
            if move is None or move.op_type not in _ONE_OUTPUT_MOVES or self.only_reader(node.input[0]) is not node:
                continue
            final, codes = node.output[0], self.name()  # type: ignore[union-attr]
            node.input[0], move.input[0] = move.input[0], codes  # type: ignore[union-attr]
            node.output[0], move.output[0] = codes, final  # type: ignore[union-attr]
            self.nodes.remove(node)
            self.nodes.insert(self.nodes.index(move), node)
            self.index()
            return True
        return False

    def _drop_unread(self, node: NodeProto) -> None:
        self.index()
        if not self.readers.get(node.output[0]) and node.output[0] not in self.outputs:
            self.nodes.remove(node)

    def write(self) -> None:
        """Put nodes and constants back."""
        graph = self.model.graph
        nodes = list(self._sorted())
        del graph.node[:]
        graph.node.extend(nodes)
        read = {i for n in nodes for i in n.input} | {o.name for o in graph.output}
        kept = [t for name, t in self.constants.items() if name in read]
        del graph.initializer[:]
        graph.initializer.extend(kept)

    def _sorted(self) -> Iterator[NodeProto]:
        ready = set(self.constants) | {i.name for i in self.model.graph.input} | {""}
        waiting = list(self.nodes)
        while waiting:
            later = []
            for node in waiting:
                if all(i in ready for i in node.input) or _has_subgraph(node):
                    ready.update(node.output)
                    yield node
                else:
                    later.append(node)
            assert len(later) < len(waiting)
            waiting = later


def _has_subgraph(node: NodeProto) -> bool:
    return any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute)


def _set(node: NodeProto, name: str, value: int) -> None:
    for attribute in list(node.attribute):
        if attribute.name == name:
            node.attribute.remove(attribute)
    node.attribute.append(onnx.helper.make_attribute(name, value))


def _strip(model: ModelProto) -> None:
    """Leave out stack traces, documentation, names of nodes, shapes of inner values and attributes that say the default."""
    graph = model.graph
    del graph.value_info[:]
    for holder in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del holder.metadata_props[:]
        holder.ClearField("doc_string")
    for node in graph.node:
        node.ClearField("name")
        if node.domain:
            continue
        schema = onnx.defs.get_schema(node.op_type, model.opset_import[0].version, node.domain)
        for attribute in list(node.attribute):
            known = schema.attributes.get(attribute.name)
            if known is not None and known.default_value.type and _same_value(known.default_value, attribute):
                node.attribute.remove(attribute)
    graph.name = "gossamer"
    model.producer_name, model.producer_version = "gossamer", ""


def _same_value(a: onnx.AttributeProto, b: onnx.AttributeProto) -> bool:
    return bool(onnx.helper.get_attribute_value(a) == onnx.helper.get_attribute_value(b))


def _share_initializers(model: ModelProto) -> None:
    """One initialiser for equal ones."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    names: dict[str, str] = {}
    kept = []
    outputs = {o.name for o in model.graph.output}
    for tensor in model.graph.initializer:
        raw = tensor.raw_data if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4) else numpy_helper.to_array(tensor).tobytes()
        key = (tensor.data_type, tuple(tensor.dims), raw)
        if key in first and tensor.name not in outputs:
            names[tensor.name] = first[key]
        else:
            first.setdefault(key, tensor.name)
            kept.append(tensor)
    if names:
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        for node in model.graph.node:
            node.input[:] = [names.get(i, i) for i in node.input]


def _name_values(model: ModelProto) -> None:
    """Short names for inner values; weights keep theirs, shared constants and steps get a number too."""
    graph = model.graph
    if any(map(_has_subgraph, graph.node)):
        return
    kept = {v.name for v in (*graph.input, *graph.output)}
    reads = Counter(i for n in graph.node for i in n.input)
    large = {t.name for t in graph.initializer if len(t.dims) > 1}
    names: dict[str, str] = {"": ""}

    def short(name: str) -> str:
        if name in kept or name in large:
            return name
        if name not in names:
            names[name] = str(len(names))
        return names[name]

    assert reads is not None
    for node in graph.node:
        node.input[:] = [short(i) for i in node.input]
        node.output[:] = [short(o) for o in node.output]
    for tensor in graph.initializer:
        tensor.name = short(tensor.name)


def _batch_dimension(model: ModelProto) -> None:
    """Call the dynamic first dimension of inputs and outputs ``batch``."""
    symbols = {v.type.tensor_type.shape.dim[0].dim_param for v in model.graph.input if v.type.tensor_type.shape.dim}
    for v in (*model.graph.input, *model.graph.output):
        for dim in v.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param in symbols:
                dim.dim_param = "batch"
