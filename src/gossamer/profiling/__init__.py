"""What networks and artefacts cost and are worth: parameters, MACs and memory, latency in a runtime, accuracy in a runtime."""

from gossamer.profiling.accuracy import Accuracy, Evaluation, evaluate, sqnr_db, wilson
from gossamer.profiling.costs import profile, profile_or_sizes
from gossamer.profiling.latency import Benchmark, Timing, benchmark, time_interleaved
from gossamer.profiling.memory import peak_activation_bytes
from gossamer.profiling.runtime import disk_bytes, run_onnx, session
from gossamer.profiling.side_by_side import Side, SideBySide, side_by_side
from gossamer.profiling.sparse_kernels import SparseKernels, SparseTiming, sparse_kernels

__all__ = [
    "Accuracy",
    "Benchmark",
    "Evaluation",
    "Side",
    "SideBySide",
    "SparseKernels",
    "SparseTiming",
    "Timing",
    "benchmark",
    "disk_bytes",
    "evaluate",
    "peak_activation_bytes",
    "profile",
    "profile_or_sizes",
    "run_onnx",
    "session",
    "side_by_side",
    "sparse_kernels",
    "sqnr_db",
    "time_interleaved",
    "wilson",
]
