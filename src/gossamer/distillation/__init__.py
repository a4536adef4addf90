"""Training a network on the outputs and features of others."""

from gossamer.distillation import losses
from gossamer.distillation.cache import TeacherCache
from gossamer.distillation.distill import distill
from gossamer.distillation.losses import *  # noqa: F403
from gossamer.distillation.objective import Distillation
from gossamer.distillation.schedules import Cosine, Linear
from gossamer.distillation.taps import Adapter, Feature, FeatureTaps

__all__ = [
    "Adapter",
    "Cosine",
    "Distillation",
    "Feature",
    "FeatureTaps",
    "Linear",
    "TeacherCache",
    "distill",
    *losses.__all__,
]
