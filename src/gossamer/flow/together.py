"""Recipes in several processes: the first one does everything, the others train with it and read the rest from its checkpoints."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gossamer.errors import RecipeError, UsageError
from gossamer.flow.job import Job, trains
from gossamer.run_folder import write_text

BEGUN = "begun"
"""File in a step's folder: the first process has come to its training."""


def rank() -> int:
    """Of this process; 0 is the first, or the only one."""
    return int(os.environ.get("RANK", "0"))


def check_parallel(job: Job, out: object) -> None:
    """UsageError where a job cannot be done in several processes."""
    if out is None:
        raise UsageError("parallel needs a run folder that all processes see: name it with out")
    if job.recipe is None:
        raise UsageError("parallel needs a recipe: what a budget tries is decided by measurements of one process")
    steps = [s for s in job.recipe.steps if trains(s)]
    if not steps:
        raise RecipeError(f"parallel is for steps that train, and {job.recipe_name()} has none: leave it out")
    timed = [s.kind for s in steps if getattr(s, "latency", None) is not None]
    if timed:
        raise RecipeError(
            f"step {timed[0]} trains towards a measured latency, which differs between processes: give macs, or leave parallel out"
        )


def announce(place: Path) -> None:
    """Called by the first process when it is about to train."""
    write_text(place / BEGUN, _attempt())


def follow(place: Path, name: str, *, content: str | None = None, every_s: float = 0.1) -> None:
    """Wait until the first process has written a file. Where it dies meanwhile, torchrun ends this process, too."""
    while not (place / name).exists() or (content is not None and (place / name).read_text() != content):
        time.sleep(every_s)


def follow_begin(place: Path) -> None:
    """Wait until the first process is about to train."""
    follow(place, BEGUN, content=_attempt())


def _attempt() -> str:
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
