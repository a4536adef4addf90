"""How a training is split over processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

from gossamer.errors import UsageError, near

Schedule = Literal["gpipe", "1f1b"]
KINDS = {"ddp": "data", "fsdp": "data", "tp": "tensor", "pp": "pipeline"}
"""Name on the command line -> the field that it sets."""
HOW = "torchrun --nproc-per-node {n} -m gossamer train ..."


@dataclass(frozen=True)
class Parallel:
    """How a training is split over processes. The product of the three degrees is the number of processes.

    Examples:
        >>> Parallel(data=2, shard=True).world
        2

    Args:
        data: copies of the network, each of which sees its part of every batch, at least 1.
        tensor: processes that share every layer, at least 1.
        pipeline: stages, each a part of the layers, at least 1.
        shard: keep a part of weights, gradients and optimiser state in each of the ``data`` processes (FSDP), not a copy (DDP).
        schedule: of the pipeline: ``"gpipe"`` or ``"1f1b"``.
        microbatches: of the pipeline; None chooses.
        timeout_s: seconds after which a process that waits for another gives up, above 0.

    Raises:
        UsageError: a value outside its range.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    shard: bool = False
    schedule: Schedule = "1f1b"
    microbatches: int | None = None
    timeout_s: float = 45.0

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "pipeline"):
            degree = getattr(self, name)
            if not isinstance(degree, int) or degree < 1:
                raise UsageError(f"parallel: {name}={degree!r} is a number of processes, at least 1")
        if self.schedule not in get_args(Schedule):
            raise UsageError(
                f"parallel: schedule={self.schedule!r}, known are gpipe and 1f1b{near(str(self.schedule), get_args(Schedule))}"
            )
        if self.microbatches is not None and self.microbatches < 1:
            raise UsageError(f"parallel: microbatches={self.microbatches}, must be at least 1")
        if self.shard and self.data < 2:
            raise UsageError("parallel: shard=True divides weights over data processes: give data of at least 2")
        if not self.timeout_s > 0:
            raise UsageError(f"parallel: timeout_s={self.timeout_s}, must be above 0")

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.data * self.tensor * self.pipeline

    @classmethod
    def parse(cls, text: str, world: int | None = None) -> Parallel:
        """Read what the command line gives.

        Examples:
            >>> Parallel.parse("ddp,2+tp", world=4)
            Parallel(data=2, tensor=2, pipeline=1, shard=False, schedule='1f1b', microbatches=None, timeout_s=45.0)

        Args:
            text: ``"ddp"``, ``"fsdp"``, ``"tp"`` or ``"pp"``, each with a degree after a comma (``"ddp,2"``), several joined by ``+``. One degree
                may be left out: it takes all processes that remain.
            world: processes in all; default: those that torchrun started.

        Returns:
            The `Parallel`; its degrees multiply to ``world``.

        Raises:
            UsageError: it cannot be read, does not fit the number of processes, or torchrun started none.
        """
        degrees: dict[str, int | None] = {}
        shard = False
        for part in text.split("+"):
            kind, comma, number = (p.strip() for p in part.partition(","))
            if kind not in KINDS:
                raise UsageError(f"parallel: {kind!r} is unknown, known are {', '.join(KINDS)}{near(kind, KINDS)}")
            if KINDS[kind] in degrees:
                raise UsageError(f"parallel: {text!r} names {KINDS[kind]} twice")
            if comma and not (number.isascii() and number.isdigit() and int(number) > 0):
                raise UsageError(f"parallel: {part.strip()!r}: the degree is a number of processes, as in {kind},2")
            degrees[KINDS[kind]] = int(number) if comma else None
            shard = shard or kind == "fsdp"
        given = 1
        for degree in degrees.values():
            given *= degree or 1
        if world is None:
            world = launched(text, max(2, given))
        left_out = [name for name, degree in degrees.items() if degree is None]
        if len(left_out) > 1:
            raise UsageError(f"parallel: {text!r} leaves more than one degree out: write them, as in ddp,2+tp,2")
        if world % given or (not left_out and given != world):
            raise UsageError(
                f"parallel: {text!r} needs {'a multiple of ' if left_out else ''}{given} processes, and there are {world}: "
                f"start it with {HOW.format(n=given)} or write other degrees"
            )
        found = {name: world // given if degree is None else degree for name, degree in degrees.items()}
        data = found.get("data", 1)
        return cls(data=data, tensor=found.get("tensor", 1), pipeline=found.get("pipeline", 1), shard=shard and data > 1)


def launched(text: str, n: int) -> int:
    """Processes that torchrun started; UsageError with the command to type where it started none."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        raise UsageError(f"parallel {text} runs in several processes, which torchrun starts: {HOW.format(n=n)} --parallel {text}")
    return int(os.environ["WORLD_SIZE"])
