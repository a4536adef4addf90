"""What techniques share when they look at calibration data: reading it in many sweeps, moments of layers' inputs, statistics of batch norms."""

from gossamer.calibration.batchnorm import measuring_batch_norms, reestimate_batch_norm
from gossamer.calibration.divergence import Divergence
from gossamer.calibration.moments import Moments, in_stages, second_moments, shrunk
from gossamer.calibration.norms import following_norms
from gossamer.calibration.patches import patches
from gossamer.calibration.reading import Batches

__all__ = [
    "Batches",
    "Divergence",
    "Moments",
    "following_norms",
    "in_stages",
    "measuring_batch_norms",
    "patches",
    "reestimate_batch_norm",
    "second_moments",
    "shrunk",
]
