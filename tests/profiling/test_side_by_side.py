"""Artefacts compared: costs against hand counts, accuracy on the exported file, tables and JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from onnx_cases import write_linear
from torch import nn

import gossamer as gs
from gossamer.errors import UsageError
from gossamer.profiling import side_by_side


class Scale(nn.Module):
    """Linear without bias from a given matrix."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight = nn.Parameter(weight.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


RIGHT, WRONG = torch.eye(4), torch.eye(4).roll(1, 0)
DATA = [(torch.eye(4), torch.arange(4)), (torch.eye(4)[:2], torch.tensor([0, 3]))]


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_costs_accuracy_and_time_stand_in_one_row(runtime):
    nets = [Scale(RIGHT), Scale(WRONG)]
    found = side_by_side(*nets, example_inputs=(torch.zeros(1, 4),), data=DATA, runtime=runtime, runs=3, names=["right", "wrong"])
    assert [(r.params, r.macs) for r in found.rows] == [(16, 16), (16, 16)]
    assert [(r.accuracy.correct, r.accuracy.n) for r in found.rows] == [(5, 6), (0, 6)]
    assert found.rows[0].peak_activation_bytes == 4 * (4 + 4)  # input and output
    assert [r.timing for r in found.rows] == list(found.benchmark.rows)
    text = str(found)
    assert "83.33%" in text and "right" in text and "top-1 on 6 items" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_what_is_timed_is_what_is_weighed_and_json_keeps_the_benchmark_s_shape():
    net = Scale(torch.ones(64, 32))
    inputs = (torch.zeros(2, 32),)
    found = side_by_side(net, example_inputs=inputs, runs=3)
    alone = gs.benchmark(net, example_inputs=inputs, runs=3)
    assert found.rows[0].timing.size_bytes == alone.rows[0].size_bytes
    plain = json.loads(json.dumps(found.to_json()))
    assert set(alone.to_json()) < set(plain)
    assert set(alone.to_json()["rows"][0]) < set(plain["rows"][0])
    assert plain["rows"][0]["macs"] == 2 * 64 * 32
    assert plain["rows"][0]["accuracy"] is None
    assert "top-1" not in str(found)


def test_files_have_no_parameters_and_are_said_so(tmp_path):
    path = write_linear(tmp_path, np.ones((4, 2)))
    found = side_by_side(path, Scale(torch.ones(2, 4)), runs=3)
    assert (found.rows[0].params, found.rows[0].macs, found.rows[1].params) == (None, None, 8)
    assert len(found.notes) == 1 and "a file of ONNX operations" in found.notes[0]
    assert "–" in str(found)


def test_data_for_some_of_them():
    asked = []

    def data(number: int) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        asked.append(number)
        return DATA if number else None

    found = side_by_side(Scale(WRONG), Scale(RIGHT), example_inputs=(torch.zeros(1, 4),), data=data, runtime="torch", runs=2)
    assert asked == [0, 1]
    assert found.rows[0].accuracy is None
    assert found.rows[1].accuracy.correct == 5


def test_results_and_their_own_inputs(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()).eval()
    pruned = gs.prune(net, (torch.randn(1, 1, 4, 4),), ratio=0.5)
    found = side_by_side(net, pruned, runtime="torch", runs=2)
    assert [r.params for r in found.rows] == [72 + 36, 36 + 20]
    assert [r.macs for r in found.rows] == [4 * (72 + 32), 4 * (36 + 16)]


def test_activations_of_a_quantised_network_are_those_of_its_file():
    layers = [m for i in (3, 16, 16) for m in (nn.Conv2d(i, 16, 3, padding=1), nn.ReLU())]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    small = gs.quantize(net, (x[:1],), calibration=[x])
    before, after = (row.peak_activation_bytes for row in side_by_side(net, small, example_inputs=(x[:1],), runs=2).rows)
    assert before == 2 * 16 * 16 * 16 * 4  # one value lives while the next is made
    assert after < before / 2
    assert side_by_side(small, example_inputs=(x[:1],), runtime="torch", runs=2).rows[0].peak_activation_bytes > before


@pytest.mark.parametrize(
    ("things", "options", "message"),
    [
        ((), {}, "nothing to compare"),
        ((Scale(RIGHT),), {"names": ["a", "b"]}, "2 names for 1 artefacts"),
        ((Scale(RIGHT),), {}, "brings no inputs"),
        ((Scale(RIGHT),), {"runtime": "onnxruntim"}, "did you mean 'onnxruntime'"),
    ],
)
def test_bad_input_is_one_line(things, options, message):
    if "names" in options:
        options = options | {"example_inputs": (torch.zeros(1, 4),)}
    with pytest.raises(UsageError, match=message) as caught:
        side_by_side(*things, **options)
    assert "\n" not in str(caught.value)
