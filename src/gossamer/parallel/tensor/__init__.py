"""Tensor parallel: a network's channels shared out among ranks."""

from gossamer.parallel.tensor.split import SplitNetwork, refuse_sharded_convolutions, split_network

__all__ = ["SplitNetwork", "refuse_sharded_convolutions", "split_network"]
