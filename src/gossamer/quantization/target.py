"""What the deployment CPU needs: how int8 weights are stored so that its kernels do not saturate."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from gossamer.errors import UsageError, near

TARGETS = ("auto", "avx2", "vnni", "arm")
PREFERENCES = ("size", "latency")


@dataclass(frozen=True)
class Target:
    """What a CPU asks for.

    Attributes:
        name: ``"avx2"``, ``"vnni"`` or ``"arm"``.
        signed: whether weights are stored as int8; else as uint8 around ``2^(bits-1)``.
        weight_bits: at most.
        here: whether it is this machine's.
        note: one line that says why.
    """

    name: str
    signed: bool
    weight_bits: int
    here: bool
    note: str


def resolve(target: str, prefer: str = "size") -> Target:
    """How weights are stored for a target.

    x86 without VNNI adds pairs of products of 8-bit numbers in 16 bits. ONNX Runtime's kernel for signed weights saturates there;
    the slower one for unsigned weights does not, nor do weights of 7 bits. With VNNI, and on ARM, sums have 32 bits.

    Examples:
        >>> [(t.signed, t.weight_bits) for t in (resolve("avx2"), resolve("avx2", "latency"), resolve("vnni", "latency"))]
        [(False, 8), (True, 7), (True, 8)]
    """
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}, known are {', '.join(TARGETS)}{near(str(target), TARGETS)}")
    own = detect(platform.machine(), _flags())
    how = "as this machine" if target == "auto" else "as asked"
    target = own if target == "auto" else target
    seven = target == "avx2" and prefer == "latency"
    if seven:
        stored = "int8 of at most 7 bits, whose sums do not saturate without VNNI"
    else:
        stored = "uint8 around 128, whose kernels do not saturate without VNNI" if target == "avx2" else "int8"
    return Target(
        target, seven or target != "avx2", 7 if seven else 8, target == own, f"target {target}, {how}: weights stored as {stored}"
    )


def detect(machine: str, flags: set[str]) -> str:
    """The target of a CPU from its architecture and feature flags; an unknown one is ``"avx2"``, which is right everywhere.

    Examples:
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
