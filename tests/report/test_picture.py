"""The picture of a comparison: bubbles where they belong, as large as they should be, names inside and apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from gossamer.errors import NothingToDo, UsageError
from gossamer.profiling import Accuracy, Benchmark, Side, SideBySide, Timing
from gossamer.report.picture import check_file, draw, short_names

ROWS = [
    ("gossamer:large", 102e6, 70.0, 25_557_032, 4_089_000_000, 76),
    ("gossamer:middle", 47e6, 30.0, 11_689_512, 1_814_000_000, 70),
    ("gossamer:small", 14e6, 9.0, 3_504_872, 301_000_000, 72),
    ("gossamer:tiny", 10e6, 2.6, 2_542_856, None, 67),
]


def sides(*, labelled: bool, rows=ROWS) -> SideBySide:
    timed = [Timing(n, int(b), ms, 0.9 * ms, 1.2 * ms, 1, 1, 1, 50) for n, b, ms, *_ in rows]
    found = [
        Side(t, params, macs, None if macs is None else 1000, Accuracy.of(a, 100) if labelled else None)
        for t, (*_, params, macs, a) in zip(timed, rows, strict=True)
    ]
    return SideBySide(tuple(found), Benchmark(tuple(timed), "onnxruntime", "1.0", 1, 1, ((1, 3, 8, 8),), "A processor"))


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))[1])
    return kept


@pytest.mark.parametrize("labelled", [False, True])
def test_bubbles_stand_at_latency_and_height_with_areas_of_bytes(labelled, tmp_path, drawn):
    draw(sides(labelled=labelled), tmp_path / "p.png")
    axes = drawn[0].axes[0]
    bubbles = sorted((float(c.get_offsets()[0][0]), float(c.get_offsets()[0][1]), float(c.get_sizes()[0])) for c in axes.collections)
    want = sorted((ms, 100 * a / 100 if labelled else params) for _, _, ms, params, _, a in ROWS)
    np.testing.assert_allclose([b[:2] for b in bubbles], want)
    areas = np.array([b[2] for b in bubbles])
    np.testing.assert_allclose(areas / areas.max(), np.array([10, 14, 47, 102]) / 102)
    colours = {tuple(c.get_facecolor()[0]) for c in axes.collections}
    assert len(colours) == 4, "MACs differ, and the unknown one is grey"
    assert ("Accuracy" if labelled else "Parameters") in drawn[0].texts[0].get_text() or any(
        ("Accuracy" if labelled else "Parameters") in t.get_text() for t in drawn[0].texts
    )


@pytest.mark.parametrize("labelled", [False, True])
def test_names_are_inside_and_do_not_cover_each_other(labelled, tmp_path, drawn):
    draw(sides(labelled=labelled), tmp_path / "p.png")
    axes = drawn[0].axes[0]
    renderer = drawn[0].canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    boxes = [t.get_window_extent(renderer) for t in axes.texts]
    assert sorted(t.get_text() for t in axes.texts) == ["large", "middle", "small", "tiny"]
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_the_file_is_a_picture_with_colours(tmp_path):
    draw(sides(labelled=True), tmp_path / "p.png")
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    assert pixels.shape == (992, 1600, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    draw(sides(labelled=False), tmp_path / "p.svg")
    assert b"<svg" in (tmp_path / "p.svg").read_bytes()


@pytest.mark.parametrize("rows", [ROWS[:1], [ROWS[0]] * 2, [("x.onnx", 10, 1e-3, 5, None, 1), ROWS[0]]])
def test_one_bubble_equal_bubbles_and_extremes(rows, tmp_path):
    draw(sides(labelled=False, rows=rows), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_nothing_to_draw_and_wrong_names(tmp_path):
    rows = [("a.onnx", 10, 1.0, None, None, 1)]
    with pytest.raises(NothingToDo, match="no artefact has a known"):
        draw(sides(labelled=False, rows=rows), tmp_path / "p.png")
    with pytest.raises(UsageError, match=r"must end in \.png"):
        check_file(Path("p.jpg"))
    with pytest.raises(UsageError, match="there is no folder"):
        check_file(tmp_path / "absent" / "p.png")


def test_names_that_clash_stay_long():
    assert short_names(["gossamer:resnet18", "torchvision:resnet18"]) == ["gossamer:resnet18", "torchvision:resnet18"]
