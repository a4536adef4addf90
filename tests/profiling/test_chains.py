"""Chains of layers as the runtime sees them: what is timed computes the shapes of the modules, and costs what it should."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from gossamer.profiling.chains import _graph, chain, time_chains

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CHAINS = [
    ([nn.Linear(6, 3, bias=False), nn.Linear(3, 8)], (2, 5, 6)),
    ([nn.Conv2d(4, 5, (3, 1), stride=(2, 1), padding=(1, 0), bias=False), nn.Conv2d(5, 6, (1, 3), padding=(0, 1))], (1, 4, 9, 8)),
    ([nn.Conv2d(4, 6, 4, padding="same", dilation=2), nn.Conv2d(6, 6, 3, groups=6)], (1, 4, 9, 8)),
    ([nn.Conv1d(4, 6, 3, padding="valid")], (2, 4, 9)),
    ([nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)], (1, 4, 5, 6)),
    ([nn.Conv3d(2, 4, 3, dilation=(1, 2, 1))], (1, 2, 5, 7, 5)),
]


@pytest.mark.parametrize(("layers", "shape"), CHAINS, ids=str)
def test_the_graph_gives_the_shapes_of_the_modules_and_their_values(layers, shape):
    graph, feeds = _graph(chain(layers), shape)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, feeds)
    import onnx
    from onnx import numpy_helper

    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in onnx.load_from_string(graph).graph.initializer}
    x = torch.from_numpy(feeds["x"])
    with torch.no_grad():
        for i, layer in enumerate(layers):
            w = weights[f"w{i}"]
            layer.weight.copy_(w.T if isinstance(layer, nn.Linear) else w)
            if layer.bias is not None:
                layer.bias.copy_(weights[f"b{i}"])
            x = layer(x)
    np.testing.assert_allclose(got, x.numpy(), rtol=1e-3, atol=1e-3)


def test_a_tenth_of_the_work_is_faster_and_a_question_asked_twice_has_one_answer():
    big, small = chain([nn.Linear(1024, 1024)]), chain([nn.Linear(1024, 32, bias=False), nn.Linear(32, 1024)])
    first = time_chains([big, small], (64, 1024))
    assert first[1] < 0.5 * first[0]
    assert time_chains([big, small], (64, 1024)) == first
