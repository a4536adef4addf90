"""Pipeline parallel: a network cut into stages."""

from gossamer.parallel.pipeline.chain import Chain, chain_of
from gossamer.parallel.pipeline.cutting import Cut, cut_chain

__all__ = ["Chain", "Cut", "chain_of", "cut_chain"]
