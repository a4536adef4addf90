"""Quantisation-aware training: learned steps, and norms as the deployed kernel folds them."""

from __future__ import annotations

from gossamer.quantization.training.norms import FoldedNorm
from gossamer.quantization.training.rounding import RoundedActivation, RoundedWeight
from gossamer.quantization.training.train import train_quantized

__all__ = ["FoldedNorm", "RoundedActivation", "RoundedWeight", "train_quantized"]
