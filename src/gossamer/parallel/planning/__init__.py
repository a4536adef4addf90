"""What a training would cost on many processes."""

from gossamer.parallel.planning.costs import Machine, measured_seconds, predicted_seconds

__all__ = ["Machine", "measured_seconds", "predicted_seconds"]
