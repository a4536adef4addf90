"""What techniques share when they look at calibration data: reading it in many sweeps, statistics of batch norms measured again."""

from gossamer.calibration.batchnorm import measuring_batch_norms, reestimate_batch_norm
from gossamer.calibration.reading import Batches

__all__ = ["Batches", "measuring_batch_norms", "reestimate_batch_norm"]
