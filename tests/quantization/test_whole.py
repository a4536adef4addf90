"""Codes, steps and biases learned through the whole network, against the network that they start from and the float one."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import gossamer as gs
from gossamer.errors import ExportError, RecipeError, UsageError
from gossamer.plan import QuantizeWeight
from gossamer.quantization.blocks import block_ends
from gossamer.quantization.canonical import canonical
from gossamer.quantization.graph import is_float
from gossamer.quantization.training import whole
from gossamer.quantization.training.codes import LearnedCodes
from gossamer.trace.capture import capture

INPUTS = (torch.zeros(2, 3, 12, 12),)


class Residual(nn.Module):
    """A stem, an inverted residual, a layer without a bias and a classifier; channels of very different ranges."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.body = nn.Sequential(
            nn.Conv2d(8, 24, 1), nn.ReLU6(), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.ReLU6(), nn.Conv2d(24, 8, 1)
        )
        self.last, self.head = nn.Conv2d(8, 16, 1, bias=False), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.last(x + self.body(x)).relu().mean((2, 3)))


def images(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return nn.functional.interpolate(torch.randn(24, 3, 4, 4, generator=g), 12, mode="bilinear") * 2


@cache
def trained() -> dict[str, torch.Tensor]:
    """Weights that tell apart where an image is brightest."""
    net = Residual().train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for i in range(120):
        x = images(100 + i)
        nn.functional.cross_entropy(net(x), label(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


def label(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3)).argmax(1)


def network() -> nn.Module:
    net = Residual()
    net.load_state_dict(trained())
    return net.eval()


def made(**options: object) -> gs.Result:
    how = {"weight_bits": 2, "rounding": "gptq", "target": "vnni"} | options
    return gs.quantize(network(), INPUTS, calibration=[images(0), images(1)], **how)  # type: ignore[arg-type]


def noise(model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        want = network()(x)
        return float((model(x) - want).square().sum() / want.square().sum())


@pytest.fixture(scope="module")
def fitted() -> gs.Result:
    return made()


@pytest.fixture(scope="module")
def learned() -> gs.Result:
    return made(reconstruction="network", iterations=100)


def test_learning_starts_as_the_fitted_network_and_gives_it_back_unlearned(fitted):
    start = whole._with_biases(fitted.floating, fitted.model)
    network = whole._trainable(start, fitted.model, fitted.plan.edits)
    x = images(2)
    with torch.no_grad():
        assert torch.allclose(network(x), fitted.model(x), atol=1e-5)
    back, edits = whole._finished(start, network, fitted.plan.edits)
    for name, tensor in fitted.model.state_dict().items():
        assert torch.allclose(back.state_dict()[name].double(), tensor.double(), rtol=1e-6), name
    assert [e.kind for e in edits] == [e.kind for e in fitted.plan]


def test_learning_lowers_the_noise_also_on_other_samples(fitted, learned):
    seen, other = torch.cat([images(0), images(1)]), images(2)
    assert noise(learned.model, seen) < 0.7 * noise(fitted.model, seen)
    assert noise(learned.model, other) < noise(fitted.model, other)
    assert any(n.startswith("learned rounding moves the outputs by") for n in learned.notes)
    before, after = (next(e for e in r.plan if isinstance(e, QuantizeWeight)) for r in (fitted, learned))
    assert before.steps != after.steps
    names = [e.tensor for e in learned.plan if isinstance(e, QuantizeWeight)]
    assert any(not torch.equal(learned.model.state_dict()[n], fitted.model.state_dict()[n]) for n in names)


def test_what_learning_makes_worse_is_dropped(fitted, monkeypatch):
    monkeypatch.setattr(whole, "_RATES", dict.fromkeys(whole._RATES, 30.0))
    network, edits, note = whole.learn(fitted.floating, fitted.model, fitted.plan.edits, [images(0)], iterations=3)
    assert network is fitted.model
    assert tuple(edits) == fitted.plan.edits
    assert note.startswith("learned rounding was dropped")


def test_it_is_reproducible_and_loads_bit_for_bit(tmp_path):
    short = {"reconstruction": "network", "iterations": 4, "mirror": True}
    net = network()
    state = copy.deepcopy(net.state_dict())
    first = gs.quantize(net, INPUTS, calibration=[images(0)], weight_bits=3, **short)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), state.values(), strict=True))
    torch.manual_seed(5)
    again, other = (gs.quantize(net, INPUTS, calibration=[images(0)], weight_bits=3, seed=s, **short) for s in (0, 1))
    assert first.plan == again.plan != other.plan
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True))
    x = images(3)
    with torch.no_grad():
        assert torch.equal(gs.load(first.save(tmp_path / "run"), network())(x), first.model(x))
    assert gs.export(first, tmp_path / "net.onnx", calibration=[x]).sqnr_db > 30


def test_gradients_of_codes_pass_through_rounding_and_those_of_steps_are_exact():
    edit = QuantizeWeight(tensor="w", bits=3, axis=0, signed=True, steps=(0.5, 0.25), zero_points=(0, 0))
    w = torch.randn(2, 7)
    codes = LearnedCodes(edit, w, (w / torch.tensor([[0.5], [0.25]])).round().clamp(-4, 3)).double()
    g = torch.randn(2, 7, dtype=torch.float64)
    (codes() * g).sum().backward()
    h = 1e-6
    with torch.no_grad():
        for c in range(2):
            codes.ratio[c] += h
            up = (codes() * g).sum()
            codes.ratio[c] -= 2 * h
            assert float(codes.ratio.grad[c]) == pytest.approx(float((up - (codes() * g).sum()) / (2 * h)), rel=1e-5)
            codes.ratio[c] += h
        inside = (codes.latent > -4) & (codes.latent < 3)
        assert torch.allclose(codes.latent.grad, g * codes.first * inside)


def test_blocks_end_exactly_where_one_value_is_passed_on():
    graph = canonical(capture(network(), INPUTS))
    found = set(block_ends(graph.graph, layers=0))
    nodes = list(graph.graph.nodes)
    runner = torch.fx.Interpreter(graph, garbage_collect_values=False)
    runner.run(images(0), enable_io_processing=False)
    values = {n: v for n, v in runner.env.items() if not (isinstance(v, torch.Tensor) and n.op != "get_attr")}  # weights and sizes
    results = {n for n in nodes if n.op == "call_function" and is_float(n)}
    for node in results:
        env, cut = {**values, node: runner.env[node]}, True
        for later in nodes[nodes.index(node) + 1 :]:
            cut = cut and all(i in env for i in later.all_input_nodes)
            env[later] = None
        is_output = any(u.op == "output" for u in node.users)
        assert (node in found) == (cut and not is_output), node.name
    assert len(block_ends(graph.graph)) == 1


def test_a_network_of_one_block_learns_from_its_outputs():
    net, x = nn.Linear(6, 3).eval(), torch.randn(40, 6)
    result = gs.quantize(net, (x[:1],), calibration=[x], weight_bits=2, reconstruction="network", iterations=60)
    plain = gs.quantize(net, (x[:1],), calibration=[x], weight_bits=2)
    with torch.no_grad():
        assert (result.model(x) - net(x)).square().sum() < (plain.model(x) - net(x)).square().sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruction": "block"}, "reconstruction='block': known are layer, network"),
        ({"reconstruction": "network", "iterations": 0}, "iterations=0"),
        ({"mirror": True}, "for reconstruction='network'"),
        ({"reconstruction": "network", "dynamic": True}, "dynamic and weight_only do without"),
    ],
)
def test_options_out_of_range_say_so(options, message):
    with pytest.raises(UsageError, match=message):
        gs.quantize(network(), INPUTS, calibration=[images(0)], **options)


def test_recipes_take_it_where_there_is_calibration_data():
    step = gs.Recipe.parse(
        "steps: [{quantize: {weight_bits: 4, rounding: gptq, reconstruction: network, iterations: 9, mirror: true}}]"
    ).steps[0]
    assert (step.reconstruction, step.iterations, step.mirror) == ("network", 9, True)
    for bad in ("{dynamic: true, reconstruction: network}", "{iterations: 9}"):
        with pytest.raises(RecipeError, match="reconstruction"):
            gs.Recipe.parse(f"steps: [{{quantize: {bad}}}]")


@pytest.mark.slow
def test_cases_learn_or_say_why_not(case, tmp_path):
    net, inputs = case
    net.eval()
    try:
        capture(net, inputs)
    except ExportError:  # it says why: test_cases_quantise_and_export_or_say_why_not
        return
    result = gs.quantize(net, inputs, calibration=[inputs], weight_bits=4, reconstruction="network", iterations=2)
    loaded = gs.load(result.save(tmp_path / "run"), net)
    with torch.no_grad():
        ours, theirs = (pytree.tree_leaves(m(*inputs)) for m in (result.model, loaded))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
