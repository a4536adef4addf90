"""What a reader is warned of, in which order, and that a run that went well warns of nothing."""

from __future__ import annotations

import pytest
from report_cases import accuracy, artefact, latency, small
from report_cases import run as report

from gossamer.report import verdict, warnings_for
from gossamer.report.schema import Parity, StepReport, Target
from gossamer.report.verdict import tone

PARITY = Parity(before_difference=1e-7, simulation_sqnr_db=40.0, n=400)


def test_a_run_that_went_well_warns_of_nothing():
    assert warnings_for(artefact(), small(), PARITY) == []


def test_slower_comes_first_whatever_else_is_wrong():
    worse = small(latency_ms=latency(15.5), size_bytes=20_000_000, accuracy=accuracy(200, 400))
    missed = Target(name="latency", limit=6.2, reached=15.5, unit="ms", met=False)
    lines = warnings_for(artefact(), worse, PARITY, budget=[missed])
    assert lines[0] == "slower than the original: median 15.5 ms against 12.4 ms (1.25 x; onnxruntime, 1 thread, batch 1)"
    assert lines[1] == "the budget is missed: latency 15.5 ms, at most 6.20 ms was asked for"
    assert lines[2].startswith("larger than the original: 20.0 MB against 14.0 MB (1.43 x)")
    assert lines[3].startswith("less accurate than the original by 31.5 points: 50.0% against 81.5% top-1 (n = 400; below")
    assert len(lines) == 4


@pytest.mark.parametrize(("median", "warned"), [(12.4, False), (12.4001, True), (12.3, False)])
def test_slower_means_a_higher_median(median, warned):
    assert bool(warnings_for(artefact(), small(latency_ms=latency(median)), PARITY)) is warned


def test_a_slow_down_within_the_spread_says_so():
    assert "within the original's own spread" in warnings_for(artefact(), small(latency_ms=latency(12.6)), PARITY)[0]
    assert "spread" not in warnings_for(artefact(), small(latency_ms=latency(14.0)), PARITY)[0]


@pytest.mark.parametrize(("correct", "warned"), [(326, False), (322, False), (321, True), (330, False)])
def test_one_point_may_be_lost(correct, warned):
    lines = warnings_for(artefact(), small(accuracy=accuracy(correct, 400)), PARITY)
    assert bool(lines) is warned
    assert not warned or "within the original's 95% interval" in lines[0]


def test_the_allowed_drop_can_be_set():
    assert warnings_for(artefact(), small(accuracy=accuracy(320, 400)), PARITY, drop=0.02) == []


def test_more_memory_and_more_work():
    lines = warnings_for(artefact(), small(peak_activation_bytes=10_000_000, macs=400_000_000), PARITY)
    assert [line.split(" than")[0] for line in lines] == ["more activation memory", "more multiply-adds"]


def test_kernels_that_compute_something_else():
    assert "the simulation 84.0%" in warnings_for(artefact(), small(), PARITY, simulated=accuracy(336, 400))[0]
    assert warnings_for(artefact(), small(), PARITY, simulated=accuracy(325, 400)) == []
    far = PARITY.model_copy(update={"simulation_to_original_db": 15.3, "artefact_to_original_db": 6.5})
    assert "6.5 dB" in warnings_for(artefact(), small(), far)[0]
    near = PARITY.model_copy(update={"simulation_sqnr_db": 15.0, "simulation_to_original_db": 17.3, "artefact_to_original_db": 17.4})
    assert warnings_for(artefact(), small(), near) == []


def test_a_prune_that_removed_nothing():
    def step(kind, macs):
        return StepReport(step=kind, options={}, params=artefact().params, macs=macs, seconds=1.0)

    same, less = artefact().macs, artefact().macs - 1
    assert warnings_for(artefact(), small(), PARITY, steps=[step("prune", same)]) == ["step 1, prune, removed nothing"]
    assert warnings_for(artefact(), small(), PARITY, steps=[step("prune", less), step("quantize", less)]) == []
    assert warnings_for(artefact(), small(), PARITY, steps=[step("prune", less), step("prune", less)]) == ["step 2, prune, removed nothing"]


def test_few_items_and_none():
    lines = warnings_for(artefact(accuracy=accuracy(32, 40)), small(accuracy=accuracy(32, 40)), PARITY)
    assert lines == ["accuracy rests on 40 items: its 95% interval is 24 points wide"]
    assert warnings_for(artefact(accuracy=None), small(accuracy=None), PARITY) == ["accuracy was not measured: the data has no labels"]


def test_the_headline_says_first_what_got_worse():
    assert verdict(report()) == "3.61 x smaller, 1.80 x faster, -0.75 points top-1"
    slow = report(after=small(latency_ms=latency(15.5)))
    assert verdict(slow) == "1.25 x slower; 3.61 x smaller, -0.75 points top-1"
    assert verdict(report(after=small(latency_ms=latency(15.5), size_bytes=20_000_000))).startswith("1.25 x slower, 1.43 x larger; ")
    assert verdict(report(after=small(latency_ms=None, accuracy=None))) == "3.61 x smaller"
    assert (tone(report()), tone(report(warnings=["x"])), tone(slow)) == ("good", "mixed", "bad")
    assert tone(report(budget=[Target(name="size", limit=1, reached=2, unit="bytes", met=False)])) == "bad"
