"""gossamer: makes a trained PyTorch network small and fast, and proves it on the artefact that ships.

Names are imported on first use, so that `import gossamer` and `gossamer --help` cost next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.decoupling import decouple
    from gossamer.distillation import distill
    from gossamer.exporting import export
    from gossamer.flow import compress, qat
    from gossamer.lowrank import factorize
    from gossamer.memory import MemoryPlan, plan_memory
    from gossamer.parallel import Parallel
    from gossamer.parallel.planning import plan_parallel
    from gossamer.plan import Plan
    from gossamer.profiling import benchmark, profile
    from gossamer.pruning import prune
    from gossamer.quantization import quantize
    from gossamer.recipe import Budget, Cluster, Decouple, Distill, Factorize, Fit, Prune, Qat, Quantize, Recipe, Sparsify
    from gossamer.result import Profile, Proof, Result
    from gossamer.run_folder import load
    from gossamer.sharing import cluster
    from gossamer.sources import load_data, load_model
    from gossamer.sparsity import sparsify
    from gossamer.trace import channels
    from gossamer.training import fit

_HOME = {
    "benchmark": "gossamer.profiling",
    "channels": "gossamer.trace",
    "cluster": "gossamer.sharing",
    "compress": "gossamer.flow",
    "decouple": "gossamer.decoupling",
    "distill": "gossamer.distillation",
    "export": "gossamer.exporting",
    "factorize": "gossamer.lowrank",
    "fit": "gossamer.training",
    "load": "gossamer.run_folder",
    "load_data": "gossamer.sources",
    "load_model": "gossamer.sources",
    "plan_memory": "gossamer.memory",
    "plan_parallel": "gossamer.parallel.planning",
    "profile": "gossamer.profiling",
    "prune": "gossamer.pruning",
    "qat": "gossamer.flow",
    "quantize": "gossamer.quantization",
    "sparsify": "gossamer.sparsity",
    "Budget": "gossamer.recipe",
    "Cluster": "gossamer.recipe",
    "Decouple": "gossamer.recipe",
    "Distill": "gossamer.recipe",
    "Factorize": "gossamer.recipe",
    "Fit": "gossamer.recipe",
    "MemoryPlan": "gossamer.memory",
    "Parallel": "gossamer.parallel",
    "Plan": "gossamer.plan",
    "Profile": "gossamer.result",
    "Proof": "gossamer.result",
    "Prune": "gossamer.recipe",
    "Qat": "gossamer.recipe",
    "Quantize": "gossamer.recipe",
    "Recipe": "gossamer.recipe",
    "Result": "gossamer.result",
    "Sparsify": "gossamer.recipe",
}

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Cluster",
    "Decouple",
    "Distill",
    "Factorize",
    "Fit",
    "MemoryPlan",
    "Parallel",
    "Plan",
    "Profile",
    "Proof",
    "Prune",
    "Qat",
    "Quantize",
    "Recipe",
    "Result",
    "Sparsify",
    "__version__",
    "benchmark",
    "channels",
    "cluster",
    "compress",
    "decouple",
    "distill",
    "export",
    "factorize",
    "fit",
    "load",
    "load_data",
    "load_model",
    "plan_memory",
    "plan_parallel",
    "profile",
    "prune",
    "qat",
    "quantize",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
