"""Exported files: what is in them, that they run, that they agree, and that a file which does not is never kept."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import gossamer as gs
from conftest import SHARED
from gossamer.errors import ExportError, GossamerError, UsageError
from gossamer.exporting import runtime_ops
from gossamer.sources.batches import outputs


def network() -> nn.Module:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
            self.dw = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
            self.b = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
            self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, 5)

        def forward(self, x):
            x = self.a(x)
            x = x + self.b(self.dw(x))
            return self.head(self.drop(x.mean((2, 3))))

    torch.manual_seed(0)
    return Net().eval()


DATA = [torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(4)]
INPUTS = (DATA[0][:1],)


def run(path, x: torch.Tensor) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def test_a_float_file_agrees_at_any_batch_size(tmp_path):
    net = network()
    file = gs.export(net, tmp_path / "net.onnx", example_inputs=INPUTS)
    model = onnx.load(file.path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 21
    assert "Dropout" not in {n.op_type for n in model.graph.node}
    for n in (1, 3, 8):
        with torch.no_grad():
            assert np.allclose(run(file.path, DATA[0][:n]), net(DATA[0][:n]).numpy(), atol=1e-4)
    assert file.difference <= 1e-4
    assert file.size_bytes == (tmp_path / "net.onnx").stat().st_size


@pytest.mark.parametrize(("target", "dtype"), [("vnni", onnx.TensorProto.INT8), ("avx2", onnx.TensorProto.UINT8)])
def test_an_integer_file_holds_integers_and_is_the_simulation(target, dtype, tmp_path):
    result = gs.quantize(network(), INPUTS, calibration=DATA, target=target)
    file = gs.export(result, tmp_path / "net.onnx", calibration=DATA)
    model = onnx.load(file.path)
    onnx.checker.check_model(model, full_check=True)
    kinds = {t.data_type for t in model.graph.initializer if len(t.dims) > 1}
    assert kinds == {dtype}
    assert any(t.data_type == onnx.TensorProto.INT32 and len(t.dims) == 1 for t in model.graph.initializer)
    if target == "avx2":
        names = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        weights = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in names and names[n.input[0]].ndim > 1]
        assert weights
        assert all((names[n.input[2]] == 128).all() for n in weights)
    assert file.sqnr_db > 25
    with torch.no_grad():
        assert np.abs(run(file.path, DATA[1]) - result.model(DATA[1]).numpy()).max() < 0.1
        assert run(file.path, DATA[1][:3]).shape == (3, 5)


def test_the_runtime_really_runs_integers(tmp_path):
    result = gs.quantize(network(), INPUTS, calibration=DATA)
    file = gs.export(result, tmp_path / "net.onnx")
    ops = runtime_ops(file.path)
    assert ops["QLinearConv"] == 3
    assert ops["QLinearAdd"] == 1
    assert ops["Conv"] == 0


def test_equal_networks_give_equal_bytes_and_nothing_of_the_machine(tmp_path):
    for name in ("a", "b"):
        gs.export(gs.quantize(network(), INPUTS, calibration=DATA), tmp_path / name)
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    assert b"site-packages" not in data
    assert b".py" not in data


def test_a_file_that_disagrees_is_refused_and_not_kept(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return x * (2.0 if torch.compiler.is_exporting() else 1.0)

    (tmp_path / "net.onnx").write_bytes(b"the old one")
    with pytest.raises(ExportError, match="differs"):
        gs.export(Odd(), tmp_path / "net.onnx", example_inputs=(torch.randn(2, 3),))
    assert (tmp_path / "net.onnx").read_bytes() == b"the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="onnx"):
        gs.export(network(), tmp_path / "x", example_inputs=INPUTS, format="onxn")
    with pytest.raises(UsageError, match="example_inputs"):
        gs.export(network(), tmp_path / "x")
    with pytest.raises(UsageError, match="folder"):
        gs.export(network(), tmp_path, example_inputs=INPUTS)
    with pytest.raises(GossamerError) as e:
        gs.export(network(), tmp_path / "x", example_inputs=(torch.randn(1, 4, 8, 8),))
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_several_inputs_and_named_outputs(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)

        def forward(self, left, right):
            y = self.a(left) * self.b(right)
            return {"sum": y.sum(1), "all": y}

    net, inputs = Net().eval(), (torch.randn(2, 4), torch.randn(2, 3))
    file = gs.export(net, tmp_path / "net.onnx", example_inputs=inputs)
    session = ort.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["left", "right"]
    found = session.run(None, {"left": inputs[0].numpy(), "right": inputs[1].numpy()})
    with torch.no_grad():
        for a, b in zip(found, outputs(net(*inputs)), strict=True):
            assert np.allclose(a, b.numpy(), atol=1e-5)


def cases():
    path = SHARED / "cases" / "networks.py"
    if not path.exists():
        return []
    spec = importlib.util.spec_from_file_location("networks_to_export", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ALL


@pytest.mark.skipif(not cases(), reason="the cases are not beside this checkout")
@pytest.mark.parametrize("make", cases(), ids=lambda f: f.__name__)
def test_cases_quantise_and_export_or_say_why_not(make, tmp_path):
    torch.manual_seed(0)
    net, inputs = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a case branches on a tensor's value, which torch warns of
        if make.__name__ == "data_dependent_branch":  # no graph can be captured: it says so
            with pytest.raises(ExportError) as e:
                gs.quantize(net, inputs, calibration=[inputs] * 2)
            assert "\n" not in str(e.value)
            return
        result = gs.quantize(net, inputs, calibration=[inputs] * 2)
        file = gs.export(result, tmp_path / "net.onnx")
    assert file.sqnr_db > 12
    assert result.plan.counts()["quantize_weight"] >= 1
