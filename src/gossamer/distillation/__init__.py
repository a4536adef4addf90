"""Training a network on the outputs of another."""

from gossamer.distillation.distill import Distillation, distill
from gossamer.distillation.losses import kd_loss

__all__ = ["Distillation", "distill", "kd_loss"]
