"""Integer codes that are learned, each from the code that it has, with the steps of their channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.plan import QuantizeWeight
from gossamer.quantization.ops import along, limits

_EDGE = 0.49  # how far from its code a weight starts at most, so that it starts as that code


class LearnedCodes(nn.Module):
    """A weight as codes times steps, both parameters: ``round(latent) * first * ratio``.

    A latent code lies as near to the float weight as its fitted code allows: it starts as that code, and what second-order rounding has moved
    far stays far. Latents are in units of a step, so that one learning rate suits all layers.

    Example:
        >>> edit = QuantizeWeight(tensor="w", bits=4, axis=0, signed=True, steps=(0.5,), zero_points=(0,))
        >>> codes = LearnedCodes(edit, torch.tensor([[0.6, 2.0]]), torch.tensor([[1.0, 3.0]]))
        >>> codes.latent.tolist(), codes().tolist()
        ([[1.2000000476837158, 3.490000009536743]], [[0.5, 1.5]])

    Args:
        edit: tensor, bits, axis and first steps.
        w: the float weight.
        codes: fitted codes around 0, as floats, of its shape.
    """

    first: Tensor

    def __init__(self, edit: QuantizeWeight, w: Tensor, codes: Tensor) -> None:
        super().__init__()
        self.edit = edit
        self.low, self.high = limits(edit.bits, True)
        steps = torch.tensor(edit.steps if edit.axis is not None else edit.steps[0], dtype=torch.float32, device=w.device)
        self.register_buffer("first", along(steps, w, edit.axis))
        self.latent = nn.Parameter(torch.minimum(torch.maximum(w / self.first, codes - _EDGE), codes + _EDGE))
        self.ratio = nn.Parameter(torch.ones_like(self.first))

    def forward(self) -> Tensor:
        """The weight on its grid; gradients pass straight through the rounding, not through the clipping."""
        inside = self.latent.clamp(self.low, self.high)
        rounded: Tensor = inside + (inside.round() - inside).detach()
        return rounded * (self.first * self.ratio)

    def codes(self) -> Tensor:
        """The codes around 0, as floats."""
        return self.latent.detach().round().clamp(self.low, self.high)

    def steps(self) -> Tensor:
        """The steps, shape (C,) or ()."""
        steps = (self.first * self.ratio).detach()
        return steps.reshape(-1) if self.edit.axis is not None else steps
