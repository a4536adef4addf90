"""What techniques share when they look at calibration data: reading it in many sweeps, moments of layers' inputs, what changes do to the outputs, statistics of batch norms."""

from gossamer.calibration.batchnorm import measuring_batch_norms, reestimate_batch_norm
from gossamer.calibration.curvature import Change, predicted, samples_of
from gossamer.calibration.divergence import Divergence
from gossamer.calibration.halves import MOST_INPUTS, Halves
from gossamer.calibration.judging import Fits, alone, best_together, exchanged
from gossamer.calibration.moments import JointMoments, Moments, in_stages, second_moments, shrunk
from gossamer.calibration.norms import following_norms
from gossamer.calibration.patches import patches
from gossamer.calibration.reading import Batches

__all__ = [
    "MOST_INPUTS",
    "Batches",
    "Change",
    "Divergence",
    "Fits",
    "Halves",
    "JointMoments",
    "Moments",
    "alone",
    "best_together",
    "exchanged",
    "following_norms",
    "in_stages",
    "measuring_batch_norms",
    "patches",
    "predicted",
    "reestimate_batch_norm",
    "samples_of",
    "second_moments",
    "shrunk",
]
