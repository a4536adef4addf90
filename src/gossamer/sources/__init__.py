"""Where networks, weights and data come from: specifications, batches, files."""

from gossamer.sources.batches import Batch, call, check_inputs, count, outputs, split
from gossamer.sources.data import Data, load_data
from gossamer.sources.models import LoadedModel, complete, is_spec, load_model

__all__ = [
    "Batch",
    "Data",
    "LoadedModel",
    "call",
    "check_inputs",
    "complete",
    "count",
    "is_spec",
    "load_data",
    "load_model",
    "outputs",
    "split",
]
