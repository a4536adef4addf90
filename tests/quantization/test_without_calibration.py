"""Dynamic and weight-only quantisation against NumPy and ONNX Runtime, and the kernels that the runtime chooses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import gossamer as gs
from gossamer.errors import ExportError, NothingToDo, PlanError, SelectorError, UsageError
from gossamer.exporting import runtime_ops
from gossamer.plan import Plan, QuantizeGroups, QuantizeInput
from gossamer.quantization.drawn import drawn_inputs
from gossamer.quantization.grouped import group_codes, group_steps, unpack_steps
from gossamer.quantization.layer_ops import round_by_range
from gossamer.trace.capture import capture


def db(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum().clamp(min=1e-30)))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


class Words(nn.Module):
    """An embedding, a recurrent layer and a linear one."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 24)
        self.rnn = nn.LSTM(24, 16, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(32 if options.get("bidirectional") else 16, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.table(ids))[0])


def test_rounding_by_range_is_onnx_s():
    import onnx
    from onnx.reference import ReferenceEvaluator

    x = torch.randn(5, 7) * 3
    nodes = [
        onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, [5, 7])], [value("y", 1, [5, 7])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    want = ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0]
    assert np.allclose(round_by_range(x).numpy(), want, atol=1e-6)
    assert not round_by_range(torch.zeros(3)).any()


@pytest.mark.parametrize("target", ["vnni", "avx2"])
def test_dynamic_linear_layers_run_in_one_integer_kernel_each(tmp_path, target):
    net, x = mlp(), torch.randn(9, 100)
    result = gs.quantize(net, (x,), dynamic=True, target=target)
    with torch.no_grad():
        assert db(net(x), result.model(x)) > 30
    file = gs.export(result, tmp_path / "net.onnx", calibration=[x])
    assert file.sqnr_db > 40
    assert runtime_ops(file.path)["DynamicQuantizeMatMul"] == 2
    assert result.plan.counts() == {"quantize_weight": 2, "quantize_input": 2}
    assert result.model.state_dict()["0.weight"].dtype == (torch.uint8 if target == "avx2" else torch.int8)


@pytest.mark.parametrize(
    ("bits", "group", "least_db"),
    [(8, 32, 35), (4, 64, 17), pytest.param(4, 32, 18, marks=pytest.mark.slow), pytest.param(4, 128, 16, marks=pytest.mark.slow)],
)
def test_weight_only_layers_run_in_matmul_nbits(tmp_path, bits, group, least_db):
    net, x = mlp(), torch.randn(9, 100)
    result = gs.quantize(net, (x,), weight_only=True, weight_bits=bits, group_size=group)
    with torch.no_grad():
        assert db(net(x), result.model(x)) > least_db
    file = gs.export(result, tmp_path / "net.onnx", calibration=[x])
    assert file.sqnr_db > 30  # the runtime rounds activations in blocks, by itself
    assert runtime_ops(file.path)["MatMulNBits"] == 2
    assert runtime_ops(file.path)["DequantizeLinear"] == 0


def test_four_bits_take_half_a_byte_each(tmp_path):
    net, x = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)).eval(), torch.randn(2, 1024)
    plain = gs.export(net, tmp_path / "plain.onnx", example_inputs=(x,)).size_bytes
    small = gs.export(gs.quantize(net, (x,), activation_bits=None, weight_bits=4, group_size=64), tmp_path / "small.onnx").size_bytes
    assert plain / small == pytest.approx(32 / (4 + 32 / 64), rel=0.05)


def test_group_steps_are_the_best_of_a_fine_grid():
    w = torch.randn(3, 50)
    steps = group_steps(w, 4, 32).numpy()
    assert steps.shape == (3, 2)
    for n in range(3):
        for g, part in enumerate(np.split(w[n].numpy(), [32])):

            def error(s: float, part: np.ndarray = part) -> float:
                return float(((np.clip(np.rint(part / s), -8, 7) * s - part) ** 2).sum())

            grid = [error(s) for s in np.linspace(0.3, 1, 400) * np.abs(part).max() / 7]
            assert error(steps[n, g]) <= min(grid) * 1.05
    codes = group_codes(w, group_steps(w, 4, 32), 4, 32)
    assert int(codes.min()) >= -8
    assert int(codes.max()) <= 7


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True, "bidirectional": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"num_layers": 2, "bias": False}, marks=pytest.mark.slow),
    ],
)
def test_dynamic_lstms_run_in_the_runtime_s_kernel(tmp_path, options):
    net, ids = Words(**options).eval(), torch.randint(0, 50, (6, 3))
    result = gs.quantize(net, (ids,), dynamic=True)
    with torch.no_grad():
        assert db(net(ids), result.model(ids)) > 28
    file = gs.export(result, tmp_path / "net.onnx", calibration=[ids])
    assert file.sqnr_db > 35
    ops = runtime_ops(file.path)
    assert ops["DynamicQuantizeLSTM"] == options.get("num_layers", 1)
    assert ops["LSTM"] == 0
    rebuilt = gs.load(result.save(tmp_path / "run"), Words(**options))
    assert torch.equal(rebuilt(ids), result.model(ids))


def test_rows_of_an_embedding_are_stored_in_a_byte_an_entry(tmp_path):
    net, ids = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 8)).eval(), torch.randint(0, 2000, (4, 7))
    result = gs.quantize(net, (ids,), dynamic=True)
    q, step = result.model.state_dict()["0.weight"].numpy().astype(np.float32), result.model.state_dict()["0.weight_step"].numpy()
    assert np.abs(q * step[:, None] - net[0].weight.detach().numpy()).max() <= 1.1 * step.max()
    plain = gs.export(net, tmp_path / "plain.onnx", example_inputs=(ids,)).size_bytes
    file = gs.export(result, tmp_path / "net.onnx", calibration=[ids])
    assert plain / file.size_bytes > 3.3
    assert file.sqnr_db > 40


@pytest.mark.slow
def test_every_network_that_breaks_other_tools_works_or_says_why_not(case, tmp_path):
    net, example = case
    done = []
    for least_db, options in ((28, {"dynamic": True}), (15, {"weight_only": True, "weight_bits": 4})):
        try:
            result = gs.quantize(net.eval(), example, **options)
        except (NothingToDo, ExportError) as e:
            assert "stay float" in str(e) or "branches" in str(e)  # noqa: PT017
            continue
        done.append(result)
        with torch.no_grad():
            ours, floats = pytree.tree_leaves(result.model(*example)), pytree.tree_leaves(net(*example))
        assert all(db(a, b) > least_db for a, b in zip(floats, ours, strict=True))
    for result in done[:1]:
        rebuilt = gs.load(result.save(tmp_path / "run"), net)
        again = pytree.tree_leaves(rebuilt(*example))
        assert all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(result.model(*example)), again, strict=True))


class Outlying(nn.Module):
    """A residual block around layer norm, one of whose features is far larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[3], self.norm.bias[5] = 60.0, -40.0
            self.up.weight[:, [3, 5]] /= 50

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return y.clamp(-2, 2) + self.down(torch.nn.functional.gelu(self.up(y)))


@pytest.mark.parametrize("measured", [False, True])
def test_outlying_features_are_moved_into_the_weights(measured, tmp_path, monkeypatch):
    net, x = Outlying().eval(), torch.randn(6, 9, 32)
    result = gs.quantize(net, (x,), dynamic=True, calibration=[x] if measured else None)
    edit = next(e for e in result.plan if isinstance(e, QuantizeInput) and e.tensor == "up.weight")
    assert sorted(sorted(range(32), key=lambda k: -edit.factors[k])[:2]) == [3, 5]
    assert edit.factors[0] == pytest.approx(1, abs=0.7)
    monkeypatch.setattr("gossamer.quantization.dynamic.factors", lambda _: ())
    without = gs.quantize(net, (x,), dynamic=True)
    with torch.no_grad():
        assert db(net(x), result.model(x)) > db(net(x), without.model(x)) + 6
    file = gs.export(result, tmp_path / "net.onnx", calibration=[x])
    assert file.sqnr_db > 40
    assert runtime_ops(file.path)["DynamicQuantizeMatMul"] == 2
    assert torch.equal(gs.load(result.save(tmp_path / "run"), Outlying())(x), result.model(x))


def test_what_stays_float_is_named():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gru, self.head = nn.Conv1d(4, 8, 3), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.gru(self.conv(x).mT)[0])

    result = gs.quantize(Both().eval(), (torch.randn(2, 4, 9),), dynamic=True)
    notes = "\n".join(result.notes)
    assert "conv (conv1d)" in notes
    assert "gru (gru)" in notes
    ignored = gs.quantize(mlp(), (torch.randn(2, 100),), dynamic=True, ignore=["0"])
    assert ignored.model.state_dict()["0.weight"].dtype == torch.float32
    assert any("ignored: 0.weight" in n for n in ignored.notes)


def test_a_plan_holds_everything_and_prints_it(tmp_path):
    result = gs.quantize(mlp(), (torch.randn(2, 100),), weight_only=True, weight_bits=4)
    plan = Plan.load(result.plan.save(tmp_path / "plan.json"))
    assert plan == result.plan
    assert "4 bit signed, a step for each 32 inputs" in str(plan)
    assert torch.equal(plan.apply(mlp())(torch.ones(1, 100)), result.model(torch.ones(1, 100)))
    edit = next(e for e in plan if isinstance(e, QuantizeGroups))
    with pytest.raises(PlanError, match="damaged"):
        unpack_steps(edit.steps[:-8], (64, 4))
    with pytest.raises(PlanError, match=r"did you mean '0.weight'"):
        Plan(edits=(edit.model_copy(update={"tensor": "0.weigth"}),), inputs=plan.inputs).apply(mlp())
    with pytest.raises(PlanError, match="no linear or recurrent weight"):
        Plan(edits=(QuantizeInput(tensor="nowhere"),), inputs=plan.inputs).apply(mlp())
    assert "when it runs" in str(gs.quantize(mlp(), (torch.randn(2, 100),), dynamic=True).plan)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dynamic": True, "weight_only": True}, UsageError, "give one of them"),
        ({"weight_only": True, "calibration": [torch.ones(1, 100)]}, UsageError, "leave calibration out"),
        ({"dynamic": True, "calibration": []}, UsageError, "calibration data is empty"),
        ({"dynamic": True, "weight_bits": 4}, UsageError, "8 bits"),
        ({"weight_only": True, "weight_bits": 3}, UsageError, "4 or 8"),
        ({"weight_only": True, "group_size": 16}, UsageError, "group_size=16"),
        ({"dynamic": True, "ignore": ["00"]}, SelectorError, "matches no linear"),
        ({"dynamic": True, "ignore": ["*"]}, NothingToDo, "nothing to quantise"),
        ({"dynamic": True, "target": "arms"}, UsageError, "did you mean"),
    ],
)
def test_bad_input_is_one_line(options, error, words):
    with pytest.raises(error, match=words) as found:
        gs.quantize(mlp(), (torch.randn(2, 100),), **options)
    assert "\n" not in str(found.value)


def test_nothing_can_follow_it():
    result = gs.quantize(mlp(), (torch.randn(2, 100),), weight_only=True)
    with pytest.raises(UsageError, match="done already"):
        gs.sparsify(result, sparsity=0.5)
    with pytest.raises(UsageError, match="starts from"):
        gs.qat(gs.quantize(mlp(), (torch.randn(2, 100),), dynamic=True), [(torch.randn(4, 100), torch.zeros(4).long())])


class Encoder(nn.Module):
    """Ids to a table with two features that stand out, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(200, 32), nn.Embedding(9, 32)
        with torch.no_grad():
            self.words.weight[:, [3, 17]] *= 40
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))

    def forward(self, ids: torch.Tensor, at: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.body((self.words(ids) + self.places(at)) * scale)


def test_rows_drawn_from_tables_show_outliers_without_data():
    net, scale = Encoder().eval(), torch.tensor(1.0)
    ids, at = torch.randint(0, 200, (4, 9)), torch.arange(9).expand(4, 9)
    result = gs.quantize(net, (ids, at, scale), dynamic=True)
    assert result.plan == gs.quantize(net, (ids, at, scale), dynamic=True).plan
    moved = {e.tensor: e.factors for e in result.plan if isinstance(e, QuantizeInput)}["body.0.weight"]
    assert sorted(np.argsort(moved)[-2:].tolist()) == [3, 17]
    plain = gs.Plan(
        edits=tuple(e.model_copy(update={"factors": ()}) if isinstance(e, QuantizeInput) else e for e in result.plan),
        inputs=result.plan.inputs,
    )
    with torch.no_grad():
        want = net(ids, at, scale)
        moved_db, plain_db = db(want, result.model(ids, at, scale)), db(want, plain.apply(net)(ids, at, scale))
    assert moved_db > plain_db + 3


def test_drawn_indices_stay_within_the_smallest_table_that_reads_them():
    net = nn.ModuleDict({"a": nn.Embedding(50, 4), "b": nn.Embedding(7, 4)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = net

        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.tables["a"](ids) + self.tables["b"](ids) + x

    ids, x = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 4)
    graph = capture(Both().eval(), (ids, x))
    batches = list(drawn_inputs(graph, (ids, x), draws=9))
    assert {int(v) for b in batches for v in b[0].flatten()} == set(range(7))
    assert all(torch.equal(b[1], x) for b in batches)
    assert drawn_inputs(capture(mlp(), (torch.zeros(1, 100),)), (torch.zeros(1, 100),)) is None
