"""Weight sharing: every weight takes one of a few values, its codebook; the values can be trained."""

from gossamer.sharing.cluster import cluster
from gossamer.sharing.kmeans import kmeans_1d

__all__ = ["cluster", "kmeans_1d"]
