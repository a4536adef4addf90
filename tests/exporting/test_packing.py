"""Packed weights: unpacked by the runtime to the very codes, and by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gossamer.exporting import runtime_ops
from gossamer.exporting.packing import pack_weights, planes
from gossamer.exporting.runtime import run, session

WEIGHT = (37, 401, 1, 1)


def model(codes: np.ndarray) -> onnx.ModelProto:
    """One convolution between quantised activations."""
    constants = {
        "xs": np.float32(0.02), "xz": np.uint8(128), "ys": np.float32(0.2), "yz": np.uint8(128), "w": codes, "ws": np.full(37, 0.01, np.float32),
        "wz": np.full(37, 0 if codes.dtype == np.int8 else 1 << 7, codes.dtype), "b": np.arange(37, dtype=np.int32), "bs": np.full(37, 0.0002, np.float32),
    }  # fmt: skip
    make = helper.make_node
    nodes = [
        make("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        make("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        make("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        make("DequantizeLinear", ["b", "bs"], ["bd"], axis=0),
        make("Conv", ["xd", "wd", "bd"], ["c"]),
        make("QuantizeLinear", ["c", "ys", "yz"], ["cq"]),
        make("DequantizeLinear", ["cq", "ys", "yz"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", c, 4, 4]) for n, c in (("x", 401), ("y", 37))]
    stored = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    return helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], stored), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_the_runtime_unpacks_the_codes_and_keeps_its_integer_kernel(bits, dtype, tmp_path):
    rng = np.random.default_rng(bits)
    low = -(1 << (bits - 1)) if dtype == np.int8 else 0
    codes = rng.integers(low, low + (1 << bits), WEIGHT).astype(dtype)
    codes.flat[0], codes.flat[1] = low, low + (1 << bits) - 1
    plain, packed = model(codes), model(codes)
    assert pack_weights(packed) == {"w": bits}
    onnx.checker.check_model(packed, full_check=True)
    assert packed.ByteSize() < plain.ByteSize() - codes.size * (8 - bits) // 8 + 1700
    paths = []
    for i, m in enumerate((plain, packed)):
        paths.append(tmp_path / f"{i}.onnx")
        onnx.save(m, paths[-1])
    x = rng.normal(size=(2, 401, 4, 4)).astype(np.float32)
    want, got = (run(session(p), {"x": x})[0] for p in paths)
    assert np.array_equal(want, got)
    assert runtime_ops(paths[1]) == runtime_ops(paths[0])
    assert runtime_ops(paths[1])["QLinearConv"] == 1


@pytest.mark.parametrize("bits", range(2, 8))
def test_planes_hold_every_bit_once(bits):
    codes = np.random.default_rng(0).integers(0, 1 << bits, 133)
    found = np.zeros(133, np.int64)
    for width, data in planes(codes, bits):
        each = 8 // width
        part = np.array([(byte >> (width * i)) & ((1 << width) - 1) for byte in data.tolist() for i in range(each)])[:133]
        found = (found << width) | part
    assert np.array_equal(found, codes)
    assert sum(len(d) for _, d in planes(codes, bits)) <= -(-133 * bits // 8) + 3


def test_eight_bits_and_small_weights_stay_as_they_are():
    rng = np.random.default_rng(0)
    whole = model(rng.integers(-128, 128, WEIGHT).astype(np.int8))
    assert pack_weights(whole) == {}
