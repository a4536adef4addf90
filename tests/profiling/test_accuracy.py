"""Wilson's interval against scipy; accuracy, agreement and noise of a hand-made file against NumPy; what bad data says."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from onnx_cases import write_linear
from scipy.stats import binomtest
from torch import nn

from gossamer.errors import SourceError, UsageError
from gossamer.profiling import evaluate, run_onnx, session, wilson


@pytest.fixture
def linear_onnx(tmp_path):
    """Writes a hand-made file into the test's own folder."""
    return partial(write_linear, tmp_path)


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (3, 7), (80, 100), (323, 400), (9999, 10000)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_wilson_interval_against_scipy(correct, n, confidence):
    expected = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    assert wilson(correct, n, confidence=confidence) == pytest.approx((expected.low, expected.high), abs=1e-9)


def _data(seed=0, n=50, features=6, classes=4):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, features)).astype(np.float32), rng.integers(0, classes, n)
    w = rng.normal(size=(features, classes))
    batches = [(torch.from_numpy(x[i : i + 16]), torch.from_numpy(y[i : i + 16])) for i in range(0, n, 16)]
    return x, y, w, w + 0.3 * rng.normal(size=w.shape), batches


def test_an_onnx_file_against_numpy(linear_onnx):
    x, y, w, coarse, batches = _data()
    seen = []
    result = evaluate(
        linear_onnx(coarse, name="coarse.onnx"),
        batches,
        reference=linear_onnx(w, name="fine.onnx"),
        progress=lambda done, total: seen.append((done, total)),
    )
    out, ref = x @ coarse.astype(np.float32), x @ w.astype(np.float32)
    assert result.n == 50
    assert result.accuracy.correct == (out.argmax(1) == y).sum()
    assert result.accuracy.value == pytest.approx((out.argmax(1) == y).mean())
    assert result.accuracy.interval == wilson(result.accuracy.correct, 50)
    assert result.reference_accuracy.correct == (ref.argmax(1) == y).sum()
    assert result.agreement == pytest.approx((out.argmax(1) == ref.argmax(1)).mean())
    assert result.agreement < 1
    assert result.sqnr_db == pytest.approx(10 * np.log10((ref**2).sum() / ((ref - out) ** 2).sum()), abs=1e-3)
    assert seen == [(i, 4) for i in range(1, 5)]
    assert result.runtime == "onnxruntime"
    assert "top-1" in str(result)


def test_the_same_file_agrees_without_noise(linear_onnx):
    *_, w, _, batches = _data()
    path = linear_onnx(w)
    result = evaluate(path, batches, reference=path)
    assert (result.agreement, result.sqnr_db) == (1.0, math.inf)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["sqnr_db"] == "Infinity"


def test_a_network_in_torch_is_held_against_its_file(linear_onnx):
    *_, w, _, batches = _data()
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Dropout(0.9))
    net[0].weight = nn.Parameter(torch.from_numpy(w.T.astype(np.float32)))
    result = evaluate(net, batches, reference=linear_onnx(w), threads=1)
    assert result.runtime == "torch"
    assert result.sqnr_db > 100
    assert net.training
    assert net[1].training


def test_no_labels_give_agreement_alone(linear_onnx):
    *_, w, coarse, batches = _data()
    unlabelled = [x for x, _ in batches]
    result = evaluate(linear_onnx(coarse, name="c.onnx"), unlabelled, reference=linear_onnx(w))
    assert (result.accuracy, result.reference_accuracy) == (None, None)
    assert result.agreement == evaluate(linear_onnx(coarse, name="c.onnx"), batches, reference=linear_onnx(w)).agreement
    assert evaluate(linear_onnx(w), unlabelled).agreement is None


def test_batches_are_read_once_and_may_come_from_a_generator(linear_onnx):
    *_, w, _, batches = _data()
    assert evaluate(linear_onnx(w), (b for b in batches)).n == 50


def test_networks_with_several_inputs_know_where_the_label_is():
    class Add(nn.Module):
        def forward(self, a, b, scale=1.0):
            return (a + b) * scale

    x, y = torch.eye(3), torch.tensor([0, 1, 0])
    assert evaluate(Add(), [(x, x, y)]).accuracy.correct == 2
    assert evaluate(Add(), [({"a": x, "b": x}, y)]).accuracy.correct == 2
    assert evaluate(Add(), [(x, x)]).accuracy is None


def test_one_batch_in_a_session(linear_onnx):
    x, _, w, *_ = _data()
    loaded = session(linear_onnx(w), 1)
    np.testing.assert_allclose(run_onnx(loaded, torch.from_numpy(x))[0], x @ w.astype(np.float32), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run_onnx(loaded, {"x": x})[0], run_onnx(loaded, (x,))[0])


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], SourceError, "the data is empty"),
        ([(torch.zeros(2, 6), torch.tensor([0, 4]))], SourceError, r"label 4 of item 1 is outside the 4 logits of .*\(0 to 3\)"),
        ([(torch.zeros(2, 6), torch.tensor([0, 3])), (torch.zeros(1, 6), torch.tensor([-1]))], SourceError, "label -1 of item 2"),
        ([(torch.zeros(2, 6), torch.tensor([0.5, 1.0]))], SourceError, "whole numbers"),
        ([(torch.zeros(2, 6), torch.tensor([1]))], SourceError, "2 whole numbers"),
        ([(torch.zeros(2, 5), torch.tensor([1, 1]))], UsageError, r"has shape \(N, 6\), but \(2, 5\) was given"),
        ([(torch.zeros(2, 6, 1, 1), torch.tensor([1, 1]))], UsageError, r"but \(2, 6, 1, 1\) was given"),
        ([(torch.full((2, 6), torch.nan), torch.tensor([1, 1]))], UsageError, "gives NaN for item 0 of a batch of 2"),
    ],
)
def test_bad_data_is_one_line(linear_onnx, batches, error, message):
    with pytest.raises(error, match=message) as caught:
        evaluate(linear_onnx(np.ones((6, 4))), batches)
    assert "\n" not in str(caught.value)


def test_a_network_that_does_not_take_the_inputs_says_what_it_takes():
    net = nn.Linear(6, 4)
    with pytest.raises(UsageError, match=r"Linear fails on inputs of shape \(2, 5\) \(it takes \(N, 6\)\)") as caught:
        evaluate(net, [(torch.zeros(2, 5), torch.zeros(2).long())], example_inputs=(torch.zeros(1, 6),))
    assert "\n" not in str(caught.value)


def test_outputs_that_are_no_logits_have_noise_but_no_accuracy():
    net = nn.Conv2d(1, 2, 1)
    result = evaluate(net, [torch.ones(2, 1, 3, 3)], reference=net)
    assert (result.agreement, result.sqnr_db) == (None, math.inf)
    with pytest.raises(SourceError, match=r"top-1 needs logits of shape \(N, classes\)"):
        evaluate(net, [(torch.ones(2, 1, 3, 3), torch.zeros(2).long())])


def test_another_number_of_classes_cannot_be_a_reference(linear_onnx):
    *_, w, _, batches = _data()
    with pytest.raises(UsageError, match=r"\(16, 4\), but the reference \(16, 9\)"):
        evaluate(linear_onnx(w), batches, reference=linear_onnx(np.ones((6, 9)), name="nine.onnx"))


def test_unknown_runtime(linear_onnx):
    with pytest.raises(UsageError, match="unknown runtime 'tensorrt'"):
        evaluate(linear_onnx(np.ones((6, 4))), [], runtime="tensorrt")
