"""Running ``.pte`` files for measurement: inputs checked against the program, batches cut to the one size that it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import UsageError
from gossamer.exporting.executorch_runtime import Method
from gossamer.profiling.runtime import Array, as_array, shape_text
from gossamer.sources.batches import Batch


@dataclass(frozen=True)
class Opened:
    """A ``.pte`` file and the name it goes by in messages."""

    method: Method
    name: str

    def checked(self, batch: Batch) -> list[Tensor]:
        """Inputs of a batch as the program takes them; UsageError where they do not fit."""
        given = [torch.as_tensor(as_array(v)).contiguous() for v in (batch.args or tuple(batch.kwargs.values()))]
        shapes = self.method.shapes
        if [tuple(g.shape) for g in given] != list(shapes):
            wanted, found = (", ".join(shape_text(s) for s in all_) for all_ in (shapes, [g.shape for g in given]))
            raise UsageError(f"{self.name} takes inputs of shape {wanted} and no others, but {found} was given: export it for these")
        return given

    def logits(self, batch: Batch) -> Array:
        """First output for a batch of any size, run in pieces of the program's size; the last piece is filled up by repeating its last item."""
        given = [as_array(v) for v in (batch.args or tuple(batch.kwargs.values()))]
        size, count = self.method.shapes[0][0], len(given[0])
        rows: list[Any] = []
        for first in range(0, count, size):
            piece = [g[np.minimum(np.arange(first, first + size), count - 1)] for g in given]
            rows.append(as_array(self.method.run(self.checked(Batch(tuple(piece), {}, None)))[0]))
        return np.concatenate(rows)[:count]

    def random_inputs(self) -> tuple[Tensor, ...]:
        """Normal noise of the program's shapes; UsageError where it takes integers."""
        if not self.method.floating:
            raise UsageError(f"{self.name} takes integers: pass example_inputs")
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(math.prod(s), generator=generator).reshape(s) for s in self.method.shapes)


def opened(path: str | Path | None, threads: int, *, name: str) -> Opened:
    """A ``.pte`` file, loaded; UsageError where ExecuTorch is missing, ExportError where it does not load."""
    assert path is not None
    return Opened(Method(path, threads=threads), name)
