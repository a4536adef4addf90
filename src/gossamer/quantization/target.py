"""What the deployment CPU needs: how int8 weights are stored so that its kernels do not saturate."""

from __future__ import annotations

import platform
from pathlib import Path

from gossamer.errors import UsageError, near

TARGETS = ("auto", "avx2", "vnni", "arm")


def resolve(target: str) -> tuple[str, bool, str]:
    """Target, whether weights are signed, and a note that says why.

    x86 without VNNI adds pairs of products of 8-bit numbers in 16 bits. ONNX Runtime's kernel for signed weights saturates there;
    the one for unsigned weights does not. With VNNI, and on ARM, sums have 32 bits.

    Example:
        >>> resolve("avx2")[:2], resolve("vnni")[:2]
        (('avx2', False), ('vnni', True))
    """
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}, known are {', '.join(TARGETS)}{near(str(target), TARGETS)}")
    how = "as asked"
    if target == "auto":
        target = detect(platform.machine(), _flags())
        how = "as this machine"
    stored = "uint8 around 128, whose kernels do not saturate without VNNI" if target == "avx2" else "int8"
    return target, target != "avx2", f"target {target}, {how}: weights stored as {stored}"


def detect(machine: str, flags: set[str]) -> str:
    """The target of a CPU from its architecture and feature flags; an unknown one is ``"avx2"``, which is right everywhere.

    Example:
        >>> detect("x86_64", {"avx2"}), detect("x86_64", {"avx2", "avx512_vnni"}), detect("aarch64", set())
        ('avx2', 'vnni', 'arm')
    """
    if machine.lower() in ("aarch64", "arm64", "armv8l", "armv7l"):
        return "arm"
    return "vnni" if flags & {"avx512_vnni", "avx_vnni"} else "avx2"


def _flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set()
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return set(value.split())
    return set()
