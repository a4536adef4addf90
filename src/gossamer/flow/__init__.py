"""The main job: one budget or recipe in, one proved artefact and its report out. `pipeline` is the page to read first."""

from gossamer.flow.pipeline import compress, plan_only
from gossamer.flow.quantized_training import qat

__all__ = ["compress", "plan_only", "qat"]
