"""Every example of the README and of the docs runs, in order, as one script a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gossamer.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "```python" in p.read_text()]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced code of one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_examples_run(page, tmp_path, monkeypatch, capsys):
    if page.stem == "executorch":
        pytest.importorskip("executorch", reason="executorch is not installed")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(page, "python"))
    exec(compile(code, page.name, "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip(), "the examples print something"


def test_yaml_examples_are_recipes():
    from gossamer.recipe import Recipe

    found = [b for page in (ROOT / "docs").glob("*.md") for b in blocks(page, "yaml")]
    assert found
    assert all(Recipe.parse(b).steps for b in found)


def commands() -> list[list[str]]:
    """The README's commands, continuation lines joined."""
    lines = "\n".join(blocks(ROOT / "README.md", "console")).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ gossamer").split() for line in lines if line.startswith("$ gossamer")]


def test_the_readme_s_commands_on_the_photographs(photos, mobilenet_weights, tmp_path, monkeypatch, capsys):
    """The main acceptance test: pretrained MobileNetV2 to int8, measured in ONNX Runtime on 400 photographs."""
    import json

    (tmp_path / "PHOTOS").symlink_to(photos)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / mobilenet_weights.name).symlink_to(mobilenet_weights)
    monkeypatch.chdir(tmp_path)
    assert [c[0] for c in commands()] == ["inspect", "compress", "bench", "report"]
    for command in commands():
        with pytest.raises(SystemExit) as e:
            main(command)
        assert not e.value.code, capsys.readouterr().err
    report = json.loads((tmp_path / "runs" / "mbv2" / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert before["accuracy"]["n"] == 400
    assert 0.80 <= before["accuracy"]["value"] <= 0.84
    assert after["accuracy"]["value"] >= before["accuracy"]["value"] - 0.015
    assert after["size_bytes"] == (tmp_path / "runs" / "mbv2" / "model.onnx").stat().st_size <= 3_900_000
