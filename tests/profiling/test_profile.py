"""gs.profile against closed formulas, and the file's bytes and activations against what is known of them."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
import torch
from onnx_cases import write_linear
from torch import nn

import gossamer as gs
from gossamer.errors import UsageError
from gossamer.plan import Plan
from gossamer.profiling import disk_bytes
from gossamer.profiling.memory import peak_activation_bytes, planned_bytes
from gossamer.result import Result


@pytest.fixture
def linear_onnx(tmp_path):
    """Writes a hand-made file into the test's own folder."""
    return partial(write_linear, tmp_path)


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    )


def test_macs_and_params_of_a_known_network():
    net = _net()
    costs = gs.profile(net, (torch.zeros(2, 3, 8, 8),))
    assert costs.macs == 2 * (8 * 3 * 9 * 16 + 8 * 16 * 5)
    assert costs.params == sum(p.numel() for p in net.parameters())
    assert net.training


def test_a_result_brings_its_inputs():
    net, x = _net().eval(), (torch.zeros(1, 3, 8, 8),)
    costs = gs.profile(net, x)
    assert gs.profile(Result(model=net, plan=Plan(), before=costs, after=costs, example_inputs=x)) == costs


def test_inputs_are_needed():
    with pytest.raises(UsageError, match="needs example_inputs"):
        gs.profile(_net())
    with pytest.raises(UsageError, match="not str"):
        gs.profile("net")  # type: ignore[arg-type]


def test_a_quantised_network_counts_the_same_macs():
    net, x = _net().eval(), (torch.randn(1, 3, 8, 8),)
    quantised = gs.quantize(net, x, calibration=[torch.randn(4, 3, 8, 8)])
    assert gs.profile(quantised).macs == gs.profile(net, x).macs


def test_bytes_include_weights_kept_beside_the_file(linear_onnx):
    path = linear_onnx(np.ones((64, 64)))
    alone = disk_bytes(path)
    assert alone == path.stat().st_size
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert path.stat().st_size < 1000
    assert disk_bytes(path) == path.stat().st_size + (path.parent / "weights.bin").stat().st_size >= 64 * 64 * 4


def test_activations_of_a_file(linear_onnx):
    assert peak_activation_bytes(linear_onnx(np.ones((6, 4))), (torch.zeros(3, 6),)) == 3 * (6 + 4) * 4


def test_planned_bytes_against_brute_force():
    rng = np.random.default_rng(0)
    exact = 0
    for _ in range(50):
        names, nodes = ["x"], []
        for i in range(8):
            reads = list(rng.choice(names, size=min(len(names), int(rng.integers(1, 3))), replace=False))
            nodes.append(("Conv", reads, [f"t{i}"]))
            names.append(f"t{i}")
        sizes = {n: int(rng.integers(1, 100)) for n in names}
        peak = sizes["x"]
        for t in range(len(nodes)):  # alive at t: made by then, and read at t or later, or made at t, or an end
            alive = {
                n
                for n in names
                if (n == "x" or int(n[1:]) <= t) and (n == names[-1] or any(n in r for _, r, _ in nodes[t:]) or n == f"t{t}")
            }
            peak = max(peak, sum(sizes[n] for n in alive))
        assert peak <= planned_bytes(nodes, sizes, inputs=["x"], outputs=[names[-1]]) <= 1.1 * peak
        exact += planned_bytes(nodes, sizes, inputs=["x"], outputs=[names[-1]]) == peak
    assert exact >= 40  # elsewhere no arena may reach it


def test_what_ends_is_written_over_by_operations_element_by_element():
    sizes = {"x": 100, "a": 300, "b": 300, "c": 300, "y": 300}
    nodes = [("Conv", ["x"], ["a"]), ("Sigmoid", ["a"], ["b"]), ("Mul", ["a", "b"], ["c"]), ("FusedConv", ["c", "w", "z", "c"], ["y"])]
    assert planned_bytes(nodes, sizes, inputs=["x"], outputs=["y"]) == 600  # a lives on beside b; c lies on one of them
    nodes[3] = ("FusedConv", ["x", "w", "z", "c"], ["y"])
    assert planned_bytes(nodes, sizes, inputs=["x"], outputs=["y"]) == 700
