"""Data parallel training: copies of the network (DDP) or parts of it (FSDP), each with its part of every batch."""

from gossamer.parallel.data.norms import SynchronisedNorms
from gossamer.parallel.data.replicas import Replicas
from gossamer.parallel.data.shards import Shards
from gossamer.parallel.data.slices import Shared, part_of

__all__ = ["Replicas", "Shards", "Shared", "SynchronisedNorms", "part_of"]
