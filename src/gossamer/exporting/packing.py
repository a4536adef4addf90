"""Weights of fewer than 8 bits packed in an ONNX file, and unpacked when a runtime loads it.

Codes are cut into planes of 4, 2 and 1 bits (5 bits are a plane of 4 and one of 1). Each plane is stored at its width; nodes on constants alone
put the planes together again. ONNX Runtime computes such nodes once, while it loads the file, and then has 8-bit weights as if they had been stored so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

_OVERHEAD = {4: 150}  # bytes that the nodes take, of a plane of 4 bits alone
_MOST_OVERHEAD = 1200  # of any other width


def pack_weights(model: ModelProto) -> dict[str, int]:
    """Pack the weights of an ONNX model, in place, whose codes need fewer than 8 bits.

    Args:
        model: with weights as int8 or uint8 initialisers read by DequantizeLinear alone.

    Returns:
        Bits of each packed weight.
    """
    graph = model.graph
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for i in node.input:
            readers.setdefault(i, []).append(node)
    packed: dict[str, int] = {}
    nodes: list[NodeProto] = []
    kept: list[TensorProto] = []
    for tensor in graph.initializer:
        reading = readers.get(tensor.name, [])
        integer = tensor.data_type in (TensorProto.INT8, TensorProto.UINT8) and len(tensor.dims) > 1
        weight = integer and reading and all(n.op_type == "DequantizeLinear" and n.input[0] == tensor.name for n in reading)
        codes = numpy_helper.to_array(tensor) if weight else np.zeros(0, np.int8)
        bits = _bits(codes) if weight else 8
        if codes.size * (8 - bits) // 8 <= _OVERHEAD.get(bits, _MOST_OVERHEAD):
            kept.append(tensor)
            continue
        made, stored = _unpacking(tensor.name, codes, bits)
        nodes += made
        kept += stored
        packed[tensor.name] = bits
    if packed:
        rest = list(graph.node)
        del graph.node[:], graph.initializer[:]
        graph.node.extend([*nodes, *rest])
        graph.initializer.extend(kept)
    return packed


def planes(codes: np.ndarray, bits: int) -> list[tuple[int, np.ndarray]]:
    """Codes of ``bits`` bits, 0 or more, as (width, bytes) from the highest bits down; each byte holds the first code in its lowest bits.

    Examples:
        >>> [(width, packed.tolist()) for width, packed in planes(np.array([7, 1, 4]), 3)]
        [(2, [35]), (1, [3])]
    """
    out, left = [], bits
    for width in (4, 2, 1):
        if width > left:
            continue
        left -= width
        part = (codes.reshape(-1).astype(np.int64) >> left) & ((1 << width) - 1)
        each = 8 // width
        part = np.concatenate([part, np.zeros(-len(part) % each, np.int64)]).reshape(-1, each)
        out.append((width, (part << (width * np.arange(each))).sum(1).astype(np.uint8)))
    return out


def _bits(codes: np.ndarray) -> int:
    """The least number of bits, at least 2, that the codes fit in, around 0 or around the middle that a uint8 has for that width."""
    for bits in range(2, 8):
        low, high = _limits(bits, codes.dtype)
        if low <= int(codes.min()) and int(codes.max()) <= high:
            return bits
    return 8


def _limits(bits: int, dtype: np.dtype) -> tuple[int, int]:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dtype == np.int8 else (0, (1 << bits) - 1)


def _unpacking(name: str, codes: np.ndarray, bits: int) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes that give a weight its name again, and what they read."""
    low = _limits(bits, codes.dtype)[0]
    kind = TensorProto.INT8 if codes.dtype == np.int8 else TensorProto.UINT8
    make = onnx.helper.make_node
    if bits == 4:
        native = TensorProto.INT4 if codes.dtype == np.int8 else TensorProto.UINT4
        ((_, data),) = planes(codes.astype(np.int64) & 15, 4)
        stored = TensorProto(name=f"{name}.packed", data_type=native, dims=codes.shape, raw_data=data.tobytes())
        return [make("Cast", [stored.name], [name], to=kind)], [stored]
    nodes: list[NodeProto] = []
    tensors: list[TensorProto] = []

    def constant(key: str, values: np.ndarray) -> str:
        tensors.append(numpy_helper.from_array(values, f"{name}.{key}"))
        return f"{name}.{key}"

    def node(op: str, inputs: list[str], key: str, **attributes: Any) -> str:
        nodes.append(make(op, inputs, [f"{name}.{key}"], **attributes))
        return f"{name}.{key}"

    count, start, flat = (constant(k, np.array([v], np.int64)) for k, v in (("count", codes.size), ("start", 0), ("flat", -1)))
    total = constant("low", np.array(low, np.int32))
    shift = bits
    for width, data in planes(codes.astype(np.int64) - low, bits):
        shift -= width
        places = constant(f"places{width}", (width * np.arange(8 // width)).astype(np.uint8))
        moved = node("BitShift", [constant(f"plane{width}", data[:, None]), places], f"moved{width}", direction="RIGHT")
        part = node("BitwiseAnd", [moved, constant(f"mask{width}", np.array((1 << width) - 1, np.uint8))], f"masked{width}")
        part = node("Slice", [node("Reshape", [part, flat], f"row{width}"), start, count], f"part{width}")
        part = node("Cast", [part], f"wide{width}", to=TensorProto.INT32)
        if shift:
            part = node("Mul", [part, constant(f"shift{width}", np.array(1 << shift, np.int32))], f"shifted{width}")
        total = node("Add", [total, part], f"sum{width}")
    whole = node("Reshape", [total, constant("shape", np.array(codes.shape, np.int64))], "whole")
    nodes.append(make("Cast", [whole], [name], to=kind))
    return nodes, tensors
