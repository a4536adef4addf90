"""Terminal tables: within their width, without colour, and with every figure."""

from __future__ import annotations

import pytest
import torch
from report_cases import NASTY, small
from report_cases import run as report
from torch import nn

from gossamer.errors import UsageError
from gossamer.plan import Keep, Plan
from gossamer.profiling import Benchmark, Evaluation, Timing
from gossamer.report import benchmark_table, channels_table, compare_table, profile_table, result_table, run_table
from gossamer.report.text import LAYERS, evaluation_line, table
from gossamer.result import LayerCost, Profile, Proof, Result
from gossamer.trace.channels import ChannelGroup, ChannelMap

LONG = "backbone.features.stage_with_a_long_name.17.inverted_residual.conv.2.pointwise_projection"


def _layers(n):
    return tuple(LayerCost(f"{LONG}.{i}", "convolution", "w", 10 ** (i % 9), 123_456_789, 4, (1, 1280, 224, 224)) for i in range(n))


def _profile(n=40):
    return Profile(3_504_872, sum(x.macs for x in _layers(n)), 14_000_000, 9_630_000, _layers(n))


def _result(notes=("kept " * 60,)):
    proof = Proof("zeroed", 3e-7, exact=("a",), inexact={"b": "norm over channels"})
    plan = Plan(edits=(Keep(tensor="a", dim=0, index=(0,)),))
    return Result(model=nn.Identity(), plan=plan, before=_profile(), after=_profile(3), proof=proof, notes=notes)


def _channels():
    groups = tuple(
        ChannelGroup(f"{LONG}.{i}", torch.arange(16), 1 + i, None, ("a norm over all the channels of the group",) if i else ())
        for i in range(4)
    )
    frozen = tuple(
        ChannelGroup(f"{LONG}.out{i}", torch.arange(3), 1, "graph output" if i % 3 else "unknown operation aten.foo") for i in range(9)
    )
    return ChannelMap(groups, frozen, (), 99, {LONG: "not called in eval mode"})


def _benchmark():
    rows = tuple(Timing(f"runs/{LONG}/model-{i}.onnx", 13_989_000, 123.4, 120.1, 140.2, 1.0 + i, 0.9, 1.1, 1000) for i in range(3))
    return Benchmark(
        rows, "onnxruntime", "1.31.1", 2, 1, ((1, 3, 224, 224), (1, 77)), "A processor of a long name (avx2, avx512_vnni, amx_int8)"
    )


def _texts():
    nasty = report(model=NASTY * 3, warnings=["slower " * 40])
    return {
        "profile": profile_table(_profile()),
        "result": result_table(_result()),
        "channels": channels_table(_channels()),
        "benchmark": benchmark_table(_benchmark()),
        "run": run_table(nasty),
        "compare": compare_table({"a": nasty, LONG: report(data="other")}),
        "evaluation": evaluation_line(Evaluation(400, None, None, 0.965, 19.6, "onnxruntime", 2, 1.0)),
    }


@pytest.mark.parametrize("kind", ["profile", "result", "channels", "benchmark", "run", "compare", "evaluation"])
def test_tables_fit_80_columns_and_have_no_colour(kind, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    text = _texts()[kind]
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "None" not in text
    assert "nan" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_a_long_profile_lists_its_costliest_layers_in_order():
    text = profile_table(_profile(60))
    rows = [line for line in text.splitlines() if "convolution" in line]
    assert len(rows) == LAYERS
    shown = [int(r.split()[0].rsplit(".", 1)[1]) for r in rows]
    assert shown == sorted(shown)
    assert sorted(10 ** (i % 9) for i in shown) == sorted(10 ** (i % 9) for i in range(60))[-LAYERS:]
    assert "and 40 cheaper layers" in text
    assert "3.50 M parameters" in text


def test_a_profile_without_layers():
    assert profile_table(Profile(0, 0, 0, 4)) == "0 parameters, 0 MACs, 0 B of weights, 4 B of activations at the peak"


def test_what_was_never_run_says_so():
    sizes = Profile(10, 0, 40, 0)
    assert profile_table(sizes) == "10 parameters, 40 B of weights, MACs and activations not measured"
    text = result_table(Result(nn.Linear(4, 2), Plan(), sizes, sizes))
    assert text.count("not measured") == 4 and " 0" not in text.split("plan")[0]


def test_value_types_print_as_tables():
    assert str(_profile()) == profile_table(_profile())
    assert str(_result()) == result_table(_result())
    assert str(_channels()) == channels_table(_channels())
    assert str(_benchmark()) == benchmark_table(_benchmark())


def test_notes_do_not_grow_with_the_network():
    lines = result_table(_result(tuple(f"layer {i} is left alone" for i in range(500)))).splitlines()
    assert len(lines) < 25
    assert "- 493 more" in lines


def test_frozen_groups_are_summed_up_by_reason():
    text = channels_table(_channels())
    assert "can be pruned: 4 groups, 160 channels" in text  # 16 classes, of width 1 to 4
    assert "frozen: 9 groups" in text
    assert "   6  graph output: " in text
    assert "   3  unknown operation aten.foo: " in text
    assert text.index("graph output") < text.index("unknown operation")
    assert "never run: 1 module" in text


def test_a_run_says_everything():
    text = run_table(report(warnings=["slower than the original: x"]))
    assert text.splitlines()[1] == "! slower than the original: x"
    for figure in ("14.0 MB", "3.87 MB", "-72%", "12.4 ms", "6.90 ms", "-44%", "0.54 to 0.58 x", "301 M", "211 M", "81.5%", "80.75%"):
        assert figure in text
    for figure in (
        "-0.75 points",
        "n = 400",
        "96.5%",
        "19.6 dB",
        "4.1e-07",
        "41.2 dB",
        "14.2 s",
        "proof holds",
        "2  graph output: classifier.1, head",
    ):
        assert figure in text
    assert "budget  at most  reached" in text


def test_runs_side_by_side():
    text = compare_table({"one": report(), "two": report(after=small(size_bytes=7_000_000), data="other", warnings=["larger", "second"])})
    rows = {line.split()[0]: line for line in text.splitlines() if line[:3] in ("one", "two")}
    assert "3.87 MB  0.28 x" in rows["one"]
    assert "7.00 MB  0.50 x" in rows["two"]
    assert "! different data: one imagefolder:val, two other" in text
    assert "! two: larger" in text
    assert "second" not in text
    with pytest.raises(UsageError):
        compare_table({})


def test_names_are_cut_where_they_tell_least():
    text = table(["name", "n"], [[LONG, "12345"]], right=(1,), width=30)
    assert text.splitlines()[-1].startswith("…")
    assert "projection  12345" in text
