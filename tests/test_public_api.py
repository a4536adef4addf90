"""The public names: what is announced exists, is documented, and costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gossamer as gs
from gossamer.errors import near


@pytest.mark.parametrize("name", [n for n in gs.__all__ if n != "__version__"])
def test_every_public_name_exists_and_is_documented(name):
    assert getattr(gs, name).__doc__


def test_the_api_of_the_contract():
    assert {"profile", "channels", "prune", "quantize", "fit", "distill", "export", "benchmark", "compress", "load", "cluster"} <= set(
        gs.__all__
    )
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = gs.prunes


def test_importing_gossamer_imports_neither_torch_nor_onnx():
    code = "import sys, gossamer; sys.exit(any(m in sys.modules for m in ('torch', 'onnx', 'onnxruntime')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_near_names():
    assert near("conv", ["conv1", "bn"]) == "; did you mean 'conv1'?"
    assert near("zzz", ["conv1"]) == ""
