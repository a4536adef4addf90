"""Half the channels of whole model zoos, with no configuration. Long, and each network in a process of its own: `make test-slow`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from _zoo import SUITES, names  # noqa: E402
from pruning_zoo import run_one  # noqa: E402

TORCHVISION = [(suite, name) for suite in SUITES if suite != "timm" for name in names(suite)]
LITTLE = {"halonet_h1"}  # half the channels is less than 40% of the MACs: positions of a relative embedding cannot go


def one_of_each_family() -> list[tuple[str, str]]:
    """The first network of every module of timm."""
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    wanted = names("timm")
    return [
        ("timm", next(n for n in wanted if n in known))
        for m in timm.list_modules()
        if (known := set(timm.list_models(module=m)) & set(wanted))
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "name"), TORCHVISION + one_of_each_family(), ids=lambda v: v)
def test_half_the_channels(suite, name):
    result = run_one(suite, name, "gossamer", 900)
    assert result["status"] == "works", result["error"]
    assert result["proof"] is None or result["proof"] <= 1e-4
    assert name in LITTLE or result["macs_after"] <= 0.6 * result["macs_before"]
