"""`compress(executorch=True)`: a second artefact, measured where it will run."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.cli import main
from gossamer.errors import UsageError
from gossamer.report import read, run_table


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)).eval()


def batches() -> list:
    torch.manual_seed(1)
    return [(torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))) for _ in range(3)]


def test_without_executorch_nothing_is_started(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(UsageError, match=r"pip install 'gossamer\[executorch\]'"):
        gs.compress(network(), batches(), out=tmp_path / "run", executorch=True)
    assert not (tmp_path / "run").exists()


def test_a_run_holds_a_pte_and_says_how_it_does(tmp_path, capsys):
    pytest.importorskip("executorch", reason="executorch is not installed")
    run = tmp_path / "run"
    result = gs.compress(network(), batches(), out=run, recipe=[gs.Quantize(target="vnni")], executorch=True)
    found = result.report["executorch"]
    assert found["size_bytes"] == (run / "model.pte").stat().st_size < found["before_size_bytes"]
    assert found["latency_ms"]["median"] > 0
    assert found["latency_ms"]["ratio"] > 0
    assert found["accuracy"]["n"] == 48
    assert found["top1_agreement"] > 0.9
    assert found["simulation_sqnr_db"] > 30
    assert "model.pte" in run_table(read(run))
    assert "model.pte" in (run / "README.md").read_text()
    assert "ExecuTorch" in (run / "report.html").read_text()
    (row,) = gs.benchmark(run, runtime="executorch", runs=5).rows
    assert row.size_bytes == found["size_bytes"]
    loaded = gs.load(run, network())
    with torch.no_grad():
        assert torch.equal(loaded(batches()[0][0]), result.model(batches()[0][0]))
    again = gs.compress(network(), batches(), out=run, recipe=[gs.Quantize(target="vnni")], executorch=True, resume=True)
    assert again.report == result.report


@pytest.mark.slow
def test_the_command_line_exports_a_run_for_executorch(tmp_path, capsys):
    pytest.importorskip("executorch", reason="executorch is not installed")
    batch = [(torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,)))]
    gs.compress(gs.load_model("gossamer:resnet8"), batch, out=tmp_path / "run")
    with pytest.raises(SystemExit) as done:
        main(["export", str(tmp_path / "run"), "--format", "executorch"])
    assert not done.value.code
    assert "ExecuTorch" in capsys.readouterr().out
    assert (tmp_path / "run" / "export.pte").exists()
