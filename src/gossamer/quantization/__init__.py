"""Quantisation: integer weights and activations for a network that is already trained."""

from __future__ import annotations

from gossamer.quantization.build import apply_edits
from gossamer.quantization.ptq import quantize
from gossamer.quantization.steps import affine_steps, minmax_steps, mse_steps

__all__ = ["affine_steps", "apply_edits", "minmax_steps", "mse_steps", "quantize"]
