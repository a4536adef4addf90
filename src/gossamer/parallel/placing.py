"""Choose how a training is placed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gossamer.errors import UsageError
from gossamer.parallel.mesh import start
from gossamer.parallel.options import Parallel
from gossamer.training.placement import Placement


@contextmanager
def place(parallel: Parallel, device: torch.device) -> Iterator[Placement]:
    """The placement of a training, for as long as it is open.

    Args:
        parallel: degrees; all of them 1 is one process.
        device: of the network.

    Raises:
        UsageError: what `start` raises, or degrees that are not combined.
        PeerLost: another process ended.
    """
    if parallel.world == 1:
        yield Placement()
        return
    with warnings.catch_warnings(), start(parallel, device) as mesh:
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")  # of dimensions of size 1
        if parallel.tensor > 1 and parallel.pipeline > 1:
            raise UsageError("parallel: tensor and pipeline are not combined with one another: choose one of them, with data around it")
        if parallel.tensor > 1:
            from gossamer.parallel.tensor.placement import Shares

            yield Shares(mesh)
            return
        if parallel.pipeline > 1:
            from gossamer.parallel.pipeline.placement import Stages

            yield Stages(mesh)
            return
        from gossamer.parallel.data import Replicas, Shards

        yield Shards(mesh) if parallel.shard else Replicas(mesh)
