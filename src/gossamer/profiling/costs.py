"""What a network costs, without running it anywhere else: parameters, multiply-adds, activation memory."""

from __future__ import annotations

from torch import nn

from gossamer.errors import UsageError
from gossamer.result import ExampleInputs, Profile, Result


def profile(model: nn.Module | Result, example_inputs: ExampleInputs = None) -> Profile:
    """Count parameters, multiply-adds and activation memory of a network in one forward pass.

    One multiply-add is one MAC. Convolutions, linear layers, matrix products and attention are counted, whatever Python code calls them;
    pointwise operations, norms and pooling are not. Quantised networks count what their float32 originals would.

    Examples:
        >>> import torch, gossamer as gs
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(8 * 6 * 6, 10))
        >>> costs = gs.profile(net, (torch.zeros(1, 3, 6, 6),))
        >>> costs.params, costs.macs  # 8*3*3*3 + 8 + 288*10 + 10, and 8*3*3*3 * 6*6 + 288*10
        (3114, 10656)

    Args:
        model: a network, or a `Result`, whose network is profiled. It is left as it is, its mode included.
        example_inputs: a tuple of positional inputs (a dict for keyword inputs); a `Result` brings its own. MACs and activations
            are those of this batch.

    Returns:
        A `Profile`; it prints as a table.

    Raises:
        UsageError: ``example_inputs`` are missing.
        TraceError: the network fails on them.
    """
    network = model
    if isinstance(model, Result):
        network = model.model
        example_inputs = model.example_inputs if example_inputs is None else example_inputs
    if not isinstance(network, nn.Module):
        raise UsageError(f"profile takes a torch.nn.Module or a Result, not {type(network).__name__}")
    if example_inputs is None:
        raise UsageError("profile needs example_inputs, for example (torch.zeros(1, 3, 224, 224),)")
    from gossamer.trace import costs

    return costs(network, example_inputs)


def profile_or_sizes(model: nn.Module, example_inputs: ExampleInputs = None) -> Profile:
    """`profile`, or parameters and bytes alone where there are no example inputs: MACs and activations are then 0, and print as not measured.

    Examples:
        >>> sizes = profile_or_sizes(nn.Linear(4, 2))
        >>> sizes.params, sizes.weight_bytes, sizes.measured
        (10, 40, False)
    """
    if example_inputs is not None:
        return profile(model, example_inputs)
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return Profile(
        params=sum(p.numel() for p in model.parameters()),
        macs=0,
        weight_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        peak_activation_bytes=0,
    )
