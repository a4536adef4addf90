"""The timing core against a fake clock, ratios against NumPy, and artefacts of every kind."""

from __future__ import annotations

import gc
import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from onnx_cases import write_linear
from torch import nn

import gossamer as gs
from gossamer.errors import RunFolderError, UsageError
from gossamer.profiling.latency import MIN_ROUNDS, summarise, time_interleaved


@pytest.fixture
def linear_onnx(tmp_path):
    """Writes a hand-made file into the test's own folder."""
    return partial(write_linear, tmp_path)


class Machine:
    """A clock that only runners move: runner i takes ``cost[i]`` seconds."""

    def __init__(self, *cost: float) -> None:
        self.now, self.calls = 0.0, []
        self.runners = [self._runner(i, c) for i, c in enumerate(cost)]

    def clock(self) -> float:
        return self.now

    def _runner(self, i, cost):
        def run():
            self.calls.append(i)
            self.now += cost

        return run


def test_every_round_runs_each_once_and_the_order_changes():
    machine = Machine(0.1, 0.2, 0.3)
    times = time_interleaved(machine.runners, runs=60, warmup=0, clock=machine.clock)
    rounds = np.array(machine.calls).reshape(60, 3)
    assert (np.sort(rounds, axis=1) == [0, 1, 2]).all()
    orders = Counter(map(tuple, rounds.tolist()))
    assert len(orders) == 6
    assert min(orders.values()) >= 3
    np.testing.assert_allclose(times, np.tile([0.1, 0.2, 0.3], (60, 1)))


def test_the_same_seed_gives_the_same_order():
    first, second, other = Machine(1, 1, 1), Machine(1, 1, 1), Machine(1, 1, 1)
    for machine, seed in ((first, 0), (second, 0), (other, 1)):
        time_interleaved(machine.runners, runs=20, clock=machine.clock, seed=seed)
    assert first.calls == second.calls != other.calls


def test_rounds_fill_the_time_asked_for():
    machine = Machine(0.1, 0.3)
    times = time_interleaved(machine.runners, seconds=2.0, warmup=0, clock=machine.clock)
    assert len(times) == 10  # 10 rounds of 0.4 s fill twice 2 s


def test_slow_artefacts_still_get_rounds_enough_for_a_spread_and_little_warming_up():
    machine = Machine(10.0)
    times = time_interleaved(machine.runners, seconds=1.0, warmup=50, clock=machine.clock)
    assert len(times) == MIN_ROUNDS
    assert len(machine.calls) == MIN_ROUNDS + 1


def test_warm_up_is_not_timed():
    machine = Machine(0.01, 0.01)
    assert time_interleaved(machine.runners, runs=4, warmup=3, clock=machine.clock).shape == (4, 2)
    assert machine.calls[:6] == [0, 1, 0, 1, 0, 1]
    assert len(machine.calls) == 2 * (3 + 4)


def test_the_garbage_collector_is_back_even_when_a_run_fails():
    def fail():
        raise RuntimeError("no")

    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        time_interleaved([fail], runs=1, warmup=0)
    assert gc.isenabled()


def test_ratios_are_paired_within_rounds():
    rng = np.random.default_rng(0)
    noise = rng.lognormal(0, 1, (200, 1))  # the machine slows down and speeds up between rounds, tenfold
    times = np.concatenate([noise, noise * 0.5], axis=1) * 1e-3
    first, second = summarise(["a", "b"], [10, 5], times)
    assert (first.ratio, first.ratio_p10, first.ratio_p90) == (1, 1, 1)
    assert second.ratio_p10 == pytest.approx(0.5)
    assert second.ratio_p90 == pytest.approx(0.5)
    expected = np.sort(times[:, 1]) * 1e3
    assert second.median_ms == pytest.approx((expected[99] + expected[100]) / 2)
    assert second.p10_ms == pytest.approx(np.quantile(expected, 0.1))
    assert (second.size_bytes, second.runs) == (5, 200)


def test_onnx_files_are_timed_with_their_bytes(linear_onnx):
    small, large = linear_onnx(np.ones((4, 2)), name="small.onnx"), linear_onnx(np.ones((512, 1024)), name="large.onnx")
    with pytest.raises(UsageError, match=r"large\.onnx: input 'x' has shape \(N, 512\), but \(1, 4\) was given"):
        gs.benchmark(small, large, runs=2)
    result = gs.benchmark(large, str(large), runs=3, names=["one", "two"])
    assert [r.size_bytes for r in result.rows] == [large.stat().st_size] * 2
    assert [r.name for r in result.rows] == ["one", "two"]
    assert (result.runtime, result.threads, result.batch, result.inputs) == ("onnxruntime", 1, 1, ((1, 512),))
    assert all(0 < r.p10_ms <= r.median_ms <= r.p90_ms for r in result.rows)
    assert json.loads(json.dumps(result.to_json()))["rows"][1]["runs"] == 3
    assert "one" in str(result)


def test_batches_of_given_inputs(linear_onnx):
    result = gs.benchmark(linear_onnx(np.ones((4, 2))), example_inputs=(torch.zeros(7, 4),), runs=2)
    assert result.batch == 7


def test_networks_in_torch_keep_their_mode_and_threads():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    net[2].eval()
    before, threads = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_num_threads()
    result = gs.benchmark(net, net, example_inputs=torch.randn(3, 4), runtime="torch", runs=4, threads=1)
    assert [m.training for m in net] == [True, True, False]
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert torch.get_num_threads() == threads
    assert [r.name for r in result.rows] == ["Sequential", "Sequential#2"]
    assert result.rows[0].size_bytes > sum(p.numel() * 4 for p in net.parameters())


def test_a_network_is_exported_to_be_timed(linear_onnx):
    net = nn.Sequential(nn.Linear(4, 2)).eval()
    result = gs.benchmark(linear_onnx(np.ones((4, 2))), net, runs=2)
    assert result.rows[1].name == "Sequential"
    assert result.rows[1].size_bytes > 0


def test_a_run_folder_stands_for_its_file(linear_onnx, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(RunFolderError, match=r"holds no model\.onnx"):
        gs.benchmark(folder, example_inputs=torch.zeros(1, 4), runs=1)
    linear_onnx(np.ones((4, 2))).rename(folder / "model.onnx")
    assert gs.benchmark(folder, runs=1).rows[0].size_bytes == (folder / "model.onnx").stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "onnxruntim"}, "unknown runtime 'onnxruntim'.*did you mean 'onnxruntime'"),
        ({"threads": 0}, "threads"),
        ({"names": ["a", "b"]}, "2 names for 1 artefacts"),
        ({"example_inputs": (torch.zeros(1, 3),)}, r"has shape \(N, 4\), but \(1, 3\) was given"),
        ({"example_inputs": (torch.zeros(1, 4), torch.zeros(1, 4))}, r"takes 1 inputs \(x\), but 2 were given"),
        ({"example_inputs": (torch.zeros(1, 4, dtype=torch.float64),)}, "is float32, but float64 was given"),
        ({"example_inputs": {"y": torch.zeros(1, 4)}}, "has no input 'y', it takes x"),
        ({"runtime": "torch", "example_inputs": (torch.zeros(1, 4),)}, "runs in onnxruntime only"),
    ],
)
def test_bad_input_is_one_line(linear_onnx, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        gs.benchmark(linear_onnx(np.ones((4, 2))), **{"runs": 1} | options)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(linear_onnx, tmp_path):
    linear_onnx(np.ones((4, 2)))
    with pytest.raises(UsageError, match=r"no file or run folder .*did you mean 'linear\.onnx'"):
        gs.benchmark(tmp_path / "liner.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(UsageError, match=r"cannot load .*broken\.onnx") as caught:
        gs.benchmark(tmp_path / "broken.onnx")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="nothing to time"):
        gs.benchmark()
    with pytest.raises(UsageError, match="not int"):
        gs.benchmark(3)
    with pytest.raises(UsageError, match="brings no inputs"):
        gs.benchmark(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="Linear fails on the example inputs"):
        gs.benchmark(nn.Linear(2, 2), example_inputs=torch.zeros(1, 3), runtime="torch")
