"""Training over several processes: data, tensor and pipeline parallel, on torch.distributed."""

from gossamer.parallel.mesh import Mesh, restarted, start
from gossamer.parallel.options import Parallel
from gossamer.parallel.placing import place

__all__ = ["Mesh", "Parallel", "place", "restarted", "start"]
