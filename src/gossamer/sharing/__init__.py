"""Weight sharing: every weight takes one of a few values, its codebook; the values can be trained."""

from gossamer.sharing.cluster import cluster
from gossamer.sharing.kmeans import kmeans_1d
from gossamer.sharing.training import fine_tune
from gossamer.training.codebooks import share_parameters, unshare

__all__ = ["cluster", "fine_tune", "kmeans_1d", "share_parameters", "unshare"]
