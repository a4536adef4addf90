"""Running a ``.pte`` file in ExecuTorch's own Python runtime."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ExportError, UsageError
from gossamer.memory.executorch import INSTALL
from gossamer.trace.capture import quiet

_LOAD = """
import sys
import torch
import executorch.kernels.quantized
from executorch.runtime import Runtime
program = Runtime.get().load_program(open(sys.argv[1], "rb").read())
program.load_method("forward")
"""
_FLOATING = (5, 6, 7)  # float16, float32 and float64 in ExecuTorch's numbering


class Method:
    """The ``forward`` of a ``.pte`` file, loaded.

    Attributes:
        shapes: of its inputs.
        floating: whether all of them are floating-point numbers.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        """Load a file.

        Args:
            path: the ``.pte`` file.
            threads: of XNNPACK, in the whole process; None leaves them.

        Raises:
            UsageError: ExecuTorch is not installed.
            ExportError: the runtime does not load the file.
        """
        runtime = load_runtime()
        if threads is not None:
            from executorch.extension.pybindings import portable_lib

            with _silent():
                if portable_lib._threadpool_get_thread_count() != threads:
                    portable_lib._unsafe_reset_threadpool(threads)
        try:
            with _silent():
                self._program = runtime.load_program(Path(path).read_bytes())  # has to outlive the method
                self._method = self._program.load_method("forward")
        except RuntimeError as e:
            raise ExportError(f"ExecuTorch does not load the file: {_line(e)}") from None
        about = self._method.metadata
        infos = [about.input_tensor_meta(i) for i in range(about.num_inputs())]
        self.shapes = tuple(tuple(i.sizes()) for i in infos)
        self.floating = all(i.dtype() in _FLOATING for i in infos)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of one pass, copied out; ExportError where the runtime fails."""
        try:
            with torch.no_grad():
                return [torch.as_tensor(o).clone() for o in self._method.execute(list(inputs))]
        except RuntimeError as e:
            raise ExportError(f"ExecuTorch does not run the file: {_line(e)}") from None


def check_loads(path: str | Path) -> None:
    """Load a file in a process of its own, since the runtime can end the process on a file that it cannot load.

    Raises:
        ExportError: it does not load.
    """
    done = subprocess.run([sys.executable, "-c", _LOAD, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [s for s in done.stderr.splitlines() if "XNN" in s or "Error" in s]
        why = lines[0][:200] if lines else f"its process ends with {done.returncode}"
        raise ExportError(f"ExecuTorch does not load the file: {why}")


def load_runtime() -> Any:
    """ExecuTorch's runtime, with its kernels for integers; UsageError with the command that installs it where it is missing."""
    with _silent(), quiet():
        try:
            import_module("executorch.kernels.quantized")
            from executorch.runtime import Runtime
        except ImportError:
            raise UsageError(f"ExecuTorch is not installed: {INSTALL}") from None
        return Runtime.get()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hold back what the runtime's native code writes about the CPU."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
