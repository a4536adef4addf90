"""Mixed precision: autocast, the gradient scaler of fp16, and a warning where bf16 is slow."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context of a forward pass and its loss.

    Examples:
        >>> with autocast(torch.device("cpu"), "bf16"):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler | None:
    """The scaler that keeps small gradients of fp16 from becoming zero; None where none is needed."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


def warn_where_slow(device: torch.device, precision: str) -> None:
    """UserWarning for half precision on a CPU without instructions for it (3.4 times the time when it was measured)."""
    if device.type == "cpu" and precision != "fp32" and not native_bf16():
        warnings.warn(
            f"this CPU has no {precision} instructions: training in {precision} is slower than in fp32 (3.4 times when measured on MobileNetV2)",
            stacklevel=4,
        )


def native_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (AVX512-BF16 or AMX; ARM's extension)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
