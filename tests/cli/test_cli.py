"""The command line: options frozen, one line and the right exit code for bad input, JSON that parses, fast --help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from gossamer.cli import main
from gossamer.cli._commands import app

OPTIONS = {
    "inspect": {"--input", "--weights", "--json"},
    "compress": {
        *{"--data", "--out", "--recipe", "--budget", "--weights", "--calibration", "--validation"},
        *{"--dry-run", "--executorch", "--parallel", "--resume", "--threads", "--seed", "--json"},
    },
    "train": {
        *{"--data", "--out", "--weights", "--epochs", "--lr", "--optimizer", "--batch-size", "--accumulate", "--precision"},
        *{"--memory-budget", "--explain-memory", "--parallel", "--workers", "--skip-unreadable", "--resume", "--seed", "--json"},
        *{"--patience", "--validation", "--plan", "--world", "--device-memory", "--bandwidth", "--flops", "--input"},
    },
    "export": {"--format", "--out", "--json"},
    "bench": {
        *{"--runtime", "--threads", "--input", "--seconds", "--data", "--weights", "--picture"},
        *{"--sparse-kernels", "--json"},
    },
    "memory": {"--input", "--weights", "--patches", "--ram-budget", "--picture", "--json"},
    "report": {"--json"},
    "demo": {"--out", "--seed", "--json"},
}


def call(*arguments: str) -> int:
    """Exit code of one command."""
    with pytest.raises(SystemExit) as e:
        main(list(arguments))
    return int(e.value.code or 0)


def test_the_set_of_options_is_frozen():
    commands = typer.main.get_command(app).commands
    found = {name: {o for p in c.params for o in p.opts if o.startswith("--") and o != "--help"} for name, c in commands.items()}
    assert found == OPTIONS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "torchvision:mobilnet_v2"], "mobilenet_v2"),
        (["inspect", "gossamer:mobilenet"], "mobilenet_v2"),
        (["inspect", "nonsense"], "nonsense"),
        (["inspect", "gossamer:resnet8", "--input", "1,3"], "input"),
        (["inspect", "gossamer:resnet8", "--input", "banana"], "--input"),
        (["inspect", "gossamer:resnet8", "--weights", "absent.pth"], "absent.pth"),
        (["compress", "gossamer:resnet8", "--data", "digits"], "--out"),
        (["compress", "gossamer:resnet8", "--data", "digit", "--out", "out"], "digits"),
        (["compress", "gossamer:resnet8", "--data", "imagefolder:absent", "--out", "out"], "absent"),
        (["compress", "gossamer:resnet8", "--data", "digits", "--out", "out"], "channels"),
        (["compress", "gossamer:resnet8", "--data", "digits", "--out", "out", "--recipe", "absent.yaml"], "absent.yaml"),
        (["compress", "gossamer:resnet8", "--data", "digits", "--out", "out", "--budget", "latncy=0.5"], "latency"),
        (["memory", "gossamer:resnet8", "--patches", "4"], "4x4"),
        (["memory", "gossamer:resnet8", "--ram-budget", "1.5 bananas"], "unit"),
        (["memory", "gossamer:resnet8", "--picture", "absent/plan.png"], "absent"),
        (["report", "absent"], "absent"),
        (["bench", "absent.onnx"], "absent.onnx"),
        (["bench", "gossamer:resnet8", "--runtime", "onnxruntim"], "onnxruntime"),
        (["bench", "resnt8"], "gossamer:resnet8"),
        (["bench", "mobilenet_v3"], "mobilenet_v3_large, mobilenet_v3_small"),
        (["bench", "resnet8", "--picture", "p.jpg"], ".png"),
        (["bench", "resnet8", "--picture", "absent/p.png"], "absent"),
        (["bench", "resnet8?in_channels=1", "--data", "digits"], "weights are random"),
        (["bench", "resnet8", "--data", "digit"], "digits"),
        (["bench", "resnet8", "resnet20", "--weights", "w.safetensors"], "NAME=FILE"),
        (["bench", "resnet8", "resnet20", "--weights", "resnet9=w.safetensors"], "did you mean 'resnet8'"),
        (["bench", "resnet8", "--weights", "resnet8=absent.pth"], "absent.pth"),
        (["export", "absent"], "absent"),
        (["train", "gossamer:resnet8", "--data", "digits", "--out", "out", "--optimizer", "adam"], "adamw"),
        (["train", "gossamer:resnet8", "--data", "digits"], "--explain-memory"),
        (["train", "gossamer:resnet8?in_channels=1", "--data", "digits", "--out", "out", "--patience", "0"], "patience >= 1"),
        (["train", "gossamer:resnet8?in_channels=1", "--data", "digits", "--out", "out", "--validation", "digit"], "digits"),
        (["compress", "gossamer:resnet8?in_channels=1", "--data", "digits", "--out", "out", "--validation", "digits"], "leave it out"),
        (["train", "gossamer:resnet8?in_channels=1", "--data", "digits", "--out", "out", "--precision", "fp8"], "bf16"),
        (["train", "gossamer:resnet8?in_channels=1", "--data", "digits", "--explain-memory", "--memory-budget", "9"], "unit"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


def test_wrong_weights_list_names_and_shapes(capsys, tmp_path):
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    assert call("inspect", "gossamer:resnet8", "--weights", str(tmp_path / "w.safetensors")) == 2
    err = capsys.readouterr().err
    assert "w.safetensors" in err
    assert len(err.strip().splitlines()) == 1


def test_a_pickle_is_never_executed(capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save(Evil(), tmp_path / "w.pth")
    assert call("inspect", "gossamer:resnet8", "--weights", str(tmp_path / "w.pth")) == 2
    assert not (tmp_path / "executed").exists()
    assert "safetensors" in capsys.readouterr().err


def test_json_errors_are_json_too(capsys):
    assert call("inspect", "gossamer:nothing_like_it", "--json") == 2
    assert "nothing_like_it" in json.loads(capsys.readouterr().out)["error"]


def test_inspect_as_json_counts_what_torch_counts(capsys):
    assert call("inspect", "gossamer:resnet8", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    from gossamer.models import resnet8

    assert shown["profile"]["params"] == sum(p.numel() for p in resnet8().parameters())
    assert any(g["frozen"] is None for g in shown["groups"])


def test_an_occupied_folder_is_refused(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    assert call("compress", "gossamer:resnet8?in_channels=1", "--data", "digits", "--out", str(tmp_path / "run")) == 2
    assert "already holds" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_train_then_compress_report_bench_and_export(capsys, tmp_path):
    model = "gossamer:resnet8?width=8&in_channels=1"
    trained, out = tmp_path / "trained", tmp_path / "run"
    assert call("train", model, "--data", "digits", "--out", str(trained), "--epochs", "2", "--json") == 0
    weights = json.loads(capsys.readouterr().out)["weights"]
    options = ["compress", model, "--weights", weights, "--data", "digits"]
    assert call(*options, "--dry-run") == 0
    assert "plan:" in capsys.readouterr().out
    assert call(*options, "--out", str(out), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["after"]["size_bytes"] < report["before"]["size_bytes"]
    assert call("report", str(out)) == 0
    assert "top-1" in capsys.readouterr().out.lower()
    assert call("report", str(out), str(out)) == 0
    assert call("bench", model, str(out), str(out / "model.onnx"), "--input", "1,1,8,8", "--seconds", "0.1", "--json") == 0
    capsys.readouterr()
    assert call("export", str(out), "--json") == 0
    assert (out / "export.onnx").stat().st_size > 0
    assert call("export", str(out)) == 2
    assert call("export", str(out), "--format", "onx", "--out", str(tmp_path / "x")) == 2
    assert "onnx" in capsys.readouterr().err
    assert call("inspect", str(out)) == 0
    assert call("compress", model, "--data", "digits", "--out", str(tmp_path / "b"), "--budget", "size=10B,macs=1") == 1
    assert "best that can" in capsys.readouterr().err


def test_bench_compares_by_bare_names_with_accuracy_and_picture(capsys, tmp_path, monkeypatch):
    model = "resnet8?width=8&in_channels=1"
    assert call("train", f"gossamer:{model}", "--data", "digits", "--out", str(tmp_path / "trained"), "--epochs", "3", "--json") == 0
    trained = json.loads(capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)
    arguments = [
        "bench",
        model,
        "resnet20?in_channels=1",
        "--input",
        "1,1,8,8",
        "--data",
        "digits",
        "--weights",
        f"{model}={trained['weights']}",
    ]
    arguments += ["--seconds", "0.1", "--runtime", "torch", "--picture", "p.png", "--json"]
    assert call(*arguments) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["rows"]
    assert [first["name"], second["name"]] == [f"gossamer:{model}", "gossamer:resnet20?in_channels=1"]
    assert first["accuracy"]["value"] == pytest.approx(trained["accuracy"], abs=1e-6)
    assert first["accuracy"]["n"] == 360
    assert second["accuracy"] is None
    assert "weights are random" in found["notes"][0]
    assert first["macs"] < second["macs"]
    assert (tmp_path / "p.png").stat().st_size > 10_000
    (tmp_path / "resnet8").mkdir()
    assert call("bench", "resnet8") == 2
    assert "./resnet8 or gossamer:resnet8" in capsys.readouterr().err


def test_train_stops_early_on_samples_held_back_or_named(capsys, tmp_path):
    (tmp_path / "made.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n\n\n"
        "def chance(n=40):\n    g = torch.Generator().manual_seed(0)\n    x, y = torch.randn(n, 1, 8, 8, generator=g), torch.randint(10, (n,), generator=g)\n"
        "    return TensorDataset(x, y), TensorDataset(x[:9], y[:9])\n"
    )
    data = f"{tmp_path / 'made.py'}:chance"
    arguments = ["train", "gossamer:resnet8?in_channels=1&width=4", "--data", data, "--epochs", "30", "--lr", "0.02", "--patience", "2"]
    for more in ([], ["--validation", "digits"]):
        out = tmp_path / f"out{len(more)}"
        assert call(*arguments, *more, "--out", str(out), "--json") == 0
        summary = json.loads(capsys.readouterr().out)
        losses = [json.loads(line)["val_loss"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert summary["epochs"] == len(losses) == summary["best_epoch"] + 2 < 30
        assert losses.index(min(losses)) + 1 == summary["best_epoch"]
        assert summary["n"] == 9


def test_help_does_not_import_torch():
    code = "import sys, gossamer.cli._commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_explain_memory_prints_table_and_picture_and_trains_nothing(capsys, tmp_path):
    pytest.importorskip("sklearn")
    out = tmp_path / "never"
    arguments = [
        "train",
        "gossamer:resnet8?in_channels=1",
        "--data",
        "digits",
        "--explain-memory",
        "--batch-size",
        "256",
        "--out",
        str(out),
    ]
    assert call(*arguments) == 0
    text = capsys.readouterr().out
    for word in ("weights", "gradients", "optimiser state", "activations", "stem", "alive during a plain step", "peak, plain"):
        assert word in text
    assert call(*arguments, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    budget = f"{int(0.8 * plain['plain_peak_bytes'])}B"
    assert call(*arguments, "--memory-budget", budget, "--json") == 0
    small = json.loads(capsys.readouterr().out)
    assert small["peak_bytes"] <= 0.8 * plain["plain_peak_bytes"]
    assert small["choices"]
    assert call(*arguments, "--memory-budget", "100kB") == 1
    assert "smallest peak that was reached" in capsys.readouterr().err
    assert not out.exists()


def test_a_bad_image_is_named_or_skipped_on_request(capsys, tmp_path):
    from PIL import Image

    for split, n in (("train", 6), ("val", 2)):
        for label in ("0", "1"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (8, 8), (40 * i, 90 * int(label), 0)).save(folder / f"{i}.png")
    (tmp_path / "images" / "train" / "1" / "3.png").write_bytes(b"not a picture")
    arguments = [
        "train",
        "gossamer:resnet8?num_classes=2",
        "--data",
        f"imagefolder:{tmp_path / 'images'}",
        "--epochs",
        "1",
        "--batch-size",
        "4",
    ]
    assert call(*arguments, "--out", str(tmp_path / "a")) == 2
    error = capsys.readouterr().err
    assert "3.png" in error
    assert len(error.strip().splitlines()) == 1
    with pytest.warns(UserWarning, match=r"left out .*3\.png"):
        assert call(*arguments, "--out", str(tmp_path / "b"), "--skip-unreadable") == 0
    assert call(*arguments, "--out", str(tmp_path / "c"), "--workers", "1") == 2
    assert "3.png" in capsys.readouterr().err


def test_a_budget_of_memory_that_cannot_be_met_is_exit_code_1(capsys):
    assert call("memory", "gossamer:resnet8", "--ram-budget", "9B") == 1
    err = capsys.readouterr().err
    assert "smallest" in err
    assert err.count("\n") == 1
