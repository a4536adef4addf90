"""TensorBoard and MLflow: each epoch's numbers, where the packages are installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gossamer.errors import UsageError


class Trackers:
    """What gets each epoch's record; a list of callables ``(epoch, numbers) -> None``."""

    def __init__(self) -> None:
        self.sinks: list[Any] = []

    def record(self, record: dict[str, Any]) -> None:
        """Hand on the numbers of one epoch."""
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "epoch"}
        for sink in self.sinks:
            sink(int(record["epoch"]), numbers)


@contextmanager
def trackers(tensorboard: str | Path | None, mlflow: str | None, settings: dict[str, Any]) -> Iterator[Trackers]:
    """Open what was asked for, and close it at the end.

    Args:
        tensorboard: a folder for event files.
        mlflow: name of an experiment; the tracking server is MLflow's own setting.
        settings: of the training, logged as MLflow's parameters.

    Raises:
        UsageError: the package is not installed.
    """
    found = Trackers()
    with ExitStack() as stack:
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UsageError("tensorboard=... needs a package: pip install 'gossamer[tensorboard]'") from None
            writer = stack.enter_context(SummaryWriter(str(tensorboard)))

            def to_tensorboard(epoch: int, numbers: dict[str, float]) -> None:
                for name, value in numbers.items():
                    writer.add_scalar(name, value, epoch)

            found.sinks.append(to_tensorboard)
        if mlflow is not None:
            try:
                import mlflow as client
            except ImportError:
                raise UsageError("mlflow=... needs a package: pip install 'gossamer[mlflow]'") from None
            client.set_experiment(mlflow)
            stack.enter_context(client.start_run())
            client.log_params({k: str(v)[:250] for k, v in settings.items()})
            found.sinks.append(lambda epoch, numbers: client.log_metrics(numbers, step=epoch))
        yield found
