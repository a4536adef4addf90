"""report.json, report.html and the model card: nothing lost, everything escaped, nothing loaded from elsewhere, and a snippet that runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from report_cases import NASTY, latency, small
from report_cases import run as report

from gossamer.errors import RunFolderError
from gossamer.report import html_report, model_card, read, write
from gossamer.report.schema import Frozen, Parity, Target

VOID = {"meta", "br", "path", "rect", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_json_round_trip(tmp_path):
    original = report(parity=Parity(before_difference=1e-7, sqnr_db=math.inf, n=3))
    path = write(original, tmp_path / "run")
    json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert read(tmp_path / "run") == read(path) == original
    assert original.model_dump(mode="json")["parity"]["sqnr_db"] == "Infinity"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["README.md", "report.html", "report.json"]


def test_missing_unfinished_and_broken_reports(tmp_path):
    with pytest.raises(RunFolderError, match=r"no report\.json in"):
        read(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunFolderError, match=r"unfinished.*--resume"):
        read(tmp_path)
    path = write(report(), tmp_path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"seed": "x"}))
    with pytest.raises(RunFolderError, match="seed"):
        read(tmp_path)
    path.write_text("{")
    with pytest.raises(RunFolderError, match="not JSON"):
        read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"):
        write(report(), tmp_path / "file" / "run")


def test_html_holds_every_figure():
    page = Page(html_report(report(warnings=["calibrated on little data"])))
    for figure in ("3.61 × smaller", "1.80 × faster", "−0.75 points", "14.0 MB", "3.87 MB", "12.4 ms", "6.90 ms", "6.69 ms to 7.45 ms"):
        assert figure in page.text
    for figure in (
        "0.56 (0.54 to 0.58)",
        "301 M",
        "211 M",
        "30% fewer",
        "9.63 MB",
        "2.41 MB",
        "75% less",
        "81.5%",
        "80.75%",
        "77.4% to 85.0%",
    ):
        assert figure in page.text
    for figure in (
        "96.5%",
        "19.6 dB",
        "41.2 dB",
        "4.1e-07",
        "14.2 s",
        "Proof holds",
        "features.18.0 keeps its width",
        "macs=0.7",
        "4.00 MB",
    ):
        assert figure in page.text
    for figure in (
        "1x32x112x112",
        "1x24x112x112",
        "10.8 M",
        "8.13 M",
        "864",
        "648",
        "graph output",
        "classifier.1, head",
        "A CPU (avx2)",
        "1.31.1",
    ):
        assert figure in page.text
    assert "ratio=None" not in page.text
    assert "ignore" not in page.text


def test_html_escapes_everything():
    step = report().steps[0].model_copy(update={"step": NASTY, "options": {NASTY: NASTY}, "proof": NASTY, "notes": [NASTY]})
    layer = report().layers[0].model_copy(update={"name": NASTY, "op": NASTY})
    target = Target(name=NASTY, limit=1, reached=1, unit=NASTY, met=True)
    timed = latency(6.9).model_copy(update={"runtime": NASTY})
    made = report(
        model=NASTY,
        data=NASTY,
        created=NASTY,
        gossamer=NASTY,
        recipe={NASTY: NASTY},
        environment={NASTY: NASTY, "processor": NASTY},
        after=small(latency_ms=timed),
        steps=[step],
        layers=[layer],
        budget=[target],
        warnings=[NASTY],
        frozen=[Frozen(group=NASTY, reason=NASTY)],
        preprocessing=NASTY,
    )
    text = html_report(made)
    page = Page(text)
    assert "img" not in page.tags
    assert "<img" not in text
    assert page.text.count("onerror=alert(1)") >= 15
    assert "&amp;lt;" not in text
    assert "<img" not in re.sub(r"```.*?```", "", model_card(made), flags=re.DOTALL)


def test_html_is_self_contained_and_accessible():
    text = html_report(report(warnings=["one"]))
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in ("src", "href") or a[1].startswith("on")]
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert page.tags.count("table") == page.tags.count("caption") == 6
    assert all(value in ("row", "col") for tag, name, value in page.attributes if (tag, name) == ("th", "scope"))
    assert page.tags.count("th") == sum((tag, name) == ("th", "scope") for tag, name, _ in page.attributes)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert page.tags.count("h1") == 1
    assert text.index("Before you use it") < text.index('class="cards"')


def test_a_slow_down_is_the_first_thing_said():
    warning = "slower than the original: median 15.5 ms against 12.4 ms"
    page = Page(html_report(report(after=small(latency_ms=latency(15.5)), warnings=[warning, "other"])))
    body = page.text[page.text.index("}") :]
    assert body.index("1.25 × slower") < body.index("3.61 × smaller")
    assert body.index("Slower than the original") < body.index("Other") < body.index("Size on disk")
    assert ("p", "class", "verdict bad") in page.attributes


def test_a_bare_report_renders_too():
    bare = report(
        data=None,
        recipe={},
        environment={},
        before=small(latency_ms=None, accuracy=None),
        after=small(latency_ms=None, accuracy=None),
        parity=Parity(before_difference=0.0, n=0),
        steps=[],
        layers=[],
        frozen=[],
        budget=[],
        inputs=[],
    )
    for text in (html_report(bare), model_card(bare)):
        assert "None" not in text.replace("session.run(None", "")
        assert "nan" not in text.replace("nance", "")
    assert Page(html_report(bare)).tags.count("table") == 2


def _artefact(path, name, dims):
    graph = helper.make_graph(
        [helper.make_node("Flatten", [name], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(np.ones((12, 5), np.float32), "w")],
    )
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString())


@pytest.mark.parametrize("known", [True, False])
def test_the_snippet_of_the_model_card_runs(tmp_path, known):
    _artefact(tmp_path / "model.onnx", 'in"put', ["N", 3, 2, 2])
    inputs = [{"name": 'in"put', "shape": [1, 3, 2, 2], "dtype": "float32"}] if known else []
    card = model_card(report(inputs=inputs))
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 5) [0]"


def test_the_model_card_holds_figures_recipe_and_limits():
    card = model_card(report(warnings=["slower than the original: x"], preprocessing="RGB in [0, 1], resized to 224"))
    lines = card.splitlines()
    assert lines[0] == r"# torchvision:mobilenet\_v2, compressed"
    assert "| size on disk | 14.0 MB | 3.87 MB | -72% |" in lines
    assert "| top-1 | 81.5% | 80.75% | -0.75 points |" in lines
    assert "- slower than the original: x" in lines
    assert r"Inputs: RGB in \[0, 1\], resized to 224." in lines
    assert "macs: 0.7" in card
    assert "onnxruntime 1.31.1" in card
    assert "400 labelled items" in card
    assert "\n\n\n" not in card
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (5, 6) for line in lines if line.startswith("|"))
