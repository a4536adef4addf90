"""SIGTERM during a training that writes checkpoints: finish the step, save, exit with 0."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class TrainingStopped(SystemExit):
    """A training that was asked to stop, saved its state, and ends the process with exit code 0."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0)
        self.folder = folder

    def __str__(self) -> str:
        return f"stopped by SIGTERM; the state is in {self.folder}: continue with resume"


class StopRequest:
    """Whether SIGTERM came."""

    def __init__(self) -> None:
        self.set = False


@contextmanager
def stop_on_sigterm(active: bool) -> Iterator[StopRequest]:
    """Note SIGTERM instead of dying of it; only in the main thread, and only where there is a checkpoint to save."""
    request = StopRequest()
    if not active or threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        request.set = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
