"""Files for ExecuTorch: the same codes and steps, run by its own runtime, and what is said where it is missing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.errors import ExportError, UsageError
from gossamer.exporting.executorch_graph import xnnpack_form
from gossamer.exporting.executorch_runtime import check_loads
from gossamer.exporting.parity import fixed_batches
from gossamer.profiling import evaluate

DATA = [torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
INPUTS = (DATA[0][:1],)


@pytest.fixture
def executorch():
    """Skips where ExecuTorch is not installed."""
    pytest.importorskip("executorch", reason="executorch is not installed")


class Net(nn.Module):
    """A residual, a depthwise convolution, a concatenation of parts with unlike ranges, pooling, a clip, a linear head."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.dw = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.b, self.c, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(32, 24, 1), nn.Linear(24, 5)

    def forward(self, x):
        x = self.a(x)
        y = x + self.b(self.dw(x))
        z = torch.cat([F.max_pool2d(y, 2), F.max_pool2d(x, 2)], 1)
        return self.head(F.relu(self.c(z)).mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def quantized(**options):
    return gs.quantize(network(), INPUTS, calibration=DATA, **options)


def calls(model: nn.Module) -> dict[str, list]:
    """Quantise and dequantise calls by name."""
    found: dict[str, list] = {}
    for node in model.graph.nodes:
        if node.op == "call_function" and "quantized_decomposed" in str(node.target):
            found.setdefault(str(node.target).split(".")[1], []).append(node)
    return found


@pytest.mark.parametrize("target", ["vnni", "avx2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_form_for_xnnpack_holds_the_codes_and_steps_of_the_plan(target, bits):
    result = quantized(target=target, weight_bits=bits)
    form, _ = xnnpack_form(result.model)
    state = dict(form.named_buffers())
    weights = {e.tensor: e for e in result.plan if e.kind == "quantize_weight"}
    for name, edit in weights.items():
        codes = result.model.get_buffer(name).to(torch.int16) - edit.zero_points[0]
        assert state[name + "_codes"].dtype == torch.int8
        assert torch.equal(state[name + "_codes"].to(torch.int16), codes)
        assert np.allclose(state[name + "_steps"].numpy(), edit.steps, rtol=1e-7)
    plan = {(f"{e.step:.6g}", e.zero_point - (0 if e.signed else 128)) for e in result.plan if e.kind == "quantize_activation"}
    rounded = {(f"{n.args[1]:.6g}", n.args[2]) for n in calls(form)["quantize_per_tensor"] if not isinstance(n.args[1], torch.fx.Node)}
    assert rounded == plan
    step = max(e.step for e in result.plan if e.kind == "quantize_activation")
    with torch.no_grad():  # the head's input is rounded once more
        assert (form(DATA[1]) - result.model(DATA[1])).abs().max() < 2 * step


def test_every_reader_has_a_dequantise_of_its_own_and_parts_of_a_concatenation_have_one_step():
    form, notes = xnnpack_form(quantized().model)
    made = calls(form)
    assert all(len(n.users) == 1 for n in made["dequantize_per_channel"])
    assert sum(len(n.users) > 1 for n in made["dequantize_per_tensor"]) == 1  # of the head, whose range is chosen when it runs
    assert len(notes) == 1
    (cat,) = [n for n in form.graph.nodes if "cat" in str(n.target)]
    (after,) = cat.users
    assert {p.args[1:3] for p in cat.all_input_nodes} == {after.args[1:3]}


def test_activations_of_fewer_bits_are_held_to_their_codes_and_of_16_are_float():
    for bits, most in ((4, 1e-5), (16, 0.05)):
        result = gs.quantize(network(), INPUTS, calibration=DATA, activation_bits=bits, ignore=["head"])
        form, notes = xnnpack_form(result.model)
        with torch.no_grad():
            wanted = result.model(DATA[1])
            assert (form(DATA[1]) - wanted).abs().max() <= most * wanted.abs().max()
        assert any("16 bits" in n for n in notes) == (bits == 16)
        assert ("quantize_per_tensor" in calls(form)) == (bits == 4)


class Far(nn.Module):
    """A layer and a sum whose outputs are clipped to so little that their steps are a thousandth of their inputs'."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = F.hardtanh(self.a(x), -1e-5, 1e-5) * 1e5
        z = F.hardtanh(y + self.b(y), -1e-5, 1e-5) * 1e5
        return self.c(z)


def far():
    torch.manual_seed(0)
    return gs.quantize(Far().eval(), INPUTS, calibration=DATA, target="vnni")


def test_steps_that_xnnpack_cannot_bridge_are_float():
    result = far()
    form, notes = xnnpack_form(result.model)
    assert any("layers whose steps are too far apart" in n for n in notes)
    assert any("sums and products of steps too far apart" in n for n in notes)
    with torch.no_grad():
        wanted = result.model(DATA[1])
        error = (form(DATA[1]) - wanted).square().mean() / wanted.square().mean()
    assert error < 1e-3


def test_files_with_steps_that_xnnpack_cannot_bridge_load(executorch, tmp_path):
    assert gs.export(far(), tmp_path / "far.pte", calibration=DATA).sqnr_db > 30


def test_a_file_that_does_not_load_is_an_error(executorch, tmp_path):
    (tmp_path / "bad.pte").write_bytes(b"ET12" * 100)
    with pytest.raises(ExportError, match="does not load") as e:
        check_loads(tmp_path / "bad.pte")
    assert "\n" not in str(e.value)


def test_the_network_that_was_given_is_left_as_it_is():
    result = quantized()
    before = result.model(DATA[1])
    names = list(result.model.state_dict())
    xnnpack_form(result.model)
    assert list(result.model.state_dict()) == names
    assert torch.equal(result.model(DATA[1]), before)


def test_an_lstm_on_integers_is_refused():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    result = gs.quantize(Tail().eval(), (torch.randn(2, 5, 4),), dynamic=True)
    with pytest.raises(ExportError, match="LSTM"):
        xnnpack_form(result.model)


def test_data_is_cut_into_batches_of_the_size_that_a_file_takes():
    found = fixed_batches(DATA, (DATA[0][:3],))
    assert [x.shape[0] for (x,) in found] == [3] * 6
    assert torch.equal(torch.cat([x for (x,) in found[:2]]), DATA[0][:6])
    assert torch.equal(fixed_batches(None, INPUTS)[0][0], INPUTS[0])
    named = {"x": DATA[0][:4], "scale": torch.tensor(2.0)}
    cut = fixed_batches([{"x": DATA[1], "scale": torch.tensor(3.0)}], named)
    assert [(d["x"].shape[0], float(d["scale"])) for d in cut] == [(4, 3.0), (4, 3.0)]


def test_without_executorch_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    for call in (
        lambda: gs.export(network(), tmp_path / "net.pte", example_inputs=INPUTS),
        lambda: gs.export(network(), tmp_path / "net", example_inputs=INPUTS, format="executorch"),
        lambda: gs.benchmark(network(), example_inputs=INPUTS, runtime="executorch"),
    ):
        with pytest.raises(UsageError, match=r"pip install 'gossamer\[executorch\]'") as e:
            call()
        assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_files_run_in_executorch_and_agree(executorch, tmp_path):
    net = network()
    file = gs.export(net, tmp_path / "net.pte", example_inputs=INPUTS)
    assert file.difference <= 1e-4
    assert file.runtime == "executorch"
    assert file.opset is None
    assert file.latency_ms > 0
    assert file.size_bytes == (tmp_path / "net.pte").stat().st_size

    result = quantized(target="vnni", rounding="gptq")
    small = gs.export(result, tmp_path / "small.pte", calibration=DATA)
    assert small.sqnr_db > 30
    assert small.top1_agreement >= 0.95
    assert small.size_bytes < file.size_bytes
    assert "ExecuTorch" in str(small)
    assert "dB" in str(small)

    labelled = [(x, torch.zeros(len(x), dtype=torch.long)) for x in (*DATA, DATA[0][:3])]
    seen = evaluate(file, labelled, reference=net, example_inputs=INPUTS)  # batches of 8 and 3, run one by one
    assert (seen.n, seen.agreement, seen.runtime) == (27, 1.0, "executorch")
    assert seen.sqnr_db > 80
    gs.export(net, tmp_path / "net.onnx", example_inputs=INPUTS)
    timed = gs.benchmark(tmp_path / "net.onnx", file, small, runs=5)
    assert (timed.runtime, [r.runs for r in timed.rows]) == ("onnxruntime, executorch", [5, 5, 5])
    with pytest.raises(UsageError, match="no others"):
        gs.benchmark(file, example_inputs=(torch.zeros(2, 3, 12, 12),))
    with pytest.raises(UsageError, match=r"\.pte"):
        gs.benchmark(tmp_path / "net.onnx", runtime="executorch")


def test_pruned_and_factorised_networks_at_a_batch_of_two(executorch, tmp_path):
    inputs = (DATA[0][:2],)
    pruned = gs.prune(network(), inputs, ratio=0.5)
    thin = gs.factorize(pruned, inputs, method="svd", rank=2, ignore=["a.*", "dw.*"])
    file = gs.export(thin, tmp_path / "thin.pte")
    assert file.difference <= 1e-4
    dynamic = gs.quantize(network(), inputs, dynamic=True)
    assert gs.export(dynamic, tmp_path / "dynamic.pte", calibration=DATA).sqnr_db > 30


def test_a_file_that_does_not_agree_is_not_kept(executorch, tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return x * (2.0 if torch.compiler.is_exporting() else 1.0)

    (tmp_path / "net.pte").write_bytes(b"the old one")
    with pytest.raises(ExportError, match="differs"):
        gs.export(Odd(), tmp_path / "net.pte", example_inputs=(torch.randn(2, 3),))
    assert (tmp_path / "net.pte").read_bytes() == b"the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["net.pte"]


@pytest.mark.slow
def test_networks_that_break_other_tools_run_or_say_why_not(executorch, case, tmp_path):
    net, inputs = case
    net.eval()
    for quantise in (False, True):
        path = tmp_path / f"{quantise}.pte"
        said = ""
        try:
            made = gs.quantize(net, inputs, calibration=[inputs] * 2) if quantise else net
            file = gs.export(made, path, example_inputs=inputs)
        except gs.errors.GossamerError as e:
            said = str(e)
        assert path.exists() == (not said)
        assert "\n" not in said
        assert said or file.difference <= 1e-4 or file.sqnr_db > 12


def test_example_inputs_of_another_layout(executorch, tmp_path):
    """Images decoded to channels-last, as transforms leave them; a batch of one says so by its strides alone."""
    image = torch.rand(12, 12, 3).permute(2, 0, 1)[None]
    path = tmp_path / "net.pte"
    assert gs.export(network(), path, example_inputs=(image,), calibration=DATA).difference < 1e-4
    assert evaluate(path, [(DATA[0], torch.zeros(8, dtype=torch.long))], reference=network()).agreement == 1
