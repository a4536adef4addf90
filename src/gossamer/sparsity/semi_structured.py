"""2:4 sparse linear layers on GPUs that have kernels for them."""

from __future__ import annotations

import torch
from torch import nn

from gossamer.errors import NothingToDo, UsageError
from gossamer.plan import apply_structure


def semi_structured(model: nn.Module) -> nn.Module:
    """A copy of a network whose 2:4 sparse linear layers run in the sparse tensor cores of a GPU.

    Make them with ``sparsify(model, pattern="2:4")``; saving and training go on with the plain network.

    Examples:
        >>> semi_structured(nn.Linear(64, 64))
        Traceback (most recent call last):
        ...
        gossamer.errors.UsageError: 2:4 kernels run on CUDA devices of compute capability 8.0 or higher, and the network is on cpu

    Args:
        model: on a CUDA device, in float16 or bfloat16, in eval mode.

    Returns:
        The copy. Layers whose weights are not 2:4 sparse, or of a size that the kernels do not take, stay dense.

    Raises:
        UsageError: no such device, or weights in another precision.
        NothingToDo: no linear layer is 2:4 sparse.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise UsageError(f"2:4 kernels run on CUDA devices of compute capability 8.0 or higher, and the network is on {device}")
    from torch.sparse import to_sparse_semi_structured

    copied, changed = apply_structure(model, []), 0
    for module in copied.modules():
        if not isinstance(module, nn.Linear) or not two_of_four(module.weight):
            continue
        if module.weight.dtype not in (torch.float16, torch.bfloat16):
            raise UsageError(f"2:4 kernels take float16 and bfloat16, not {module.weight.dtype}: convert the network with model.half()")
        try:
            module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
        except (RuntimeError, ValueError):  # a size that the kernels do not take
            continue
        changed += 1
    if not changed:
        raise NothingToDo("no linear layer is 2:4 sparse with sizes that the kernels take: sparsify(model, pattern='2:4') first")
    return copied


def two_of_four(w: torch.Tensor) -> bool:
    """Whether of every four neighbours along the inputs at most two are not zero.

    Examples:
        >>> two_of_four(torch.tensor([[1.0, 0.0, 2.0, 0.0]])), two_of_four(torch.ones(1, 4))
        (True, False)
    """
    return w.shape[1] % 4 == 0 and bool(((w.detach().reshape(len(w), -1, 4) != 0).sum(2) <= 2).all())
