"""What a training step takes, as data, as a table and as a picture of characters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gossamer.training.rematerialization.recompute import Mode

LEVELS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class BlockMemory:
    """One block of a network.

    Attributes:
        name: of the module.
        plain_bytes: that its forward pass leaves for the backward pass, output included.
        kept_bytes: with checkpoints.
        seconds: of its forward pass.
        mode: ``"full"``, ``"selective"``, ``"3 parts"`` where parts of it are computed twice, or ``""``.
    """

    name: str
    plain_bytes: int
    kept_bytes: int
    seconds: float
    mode: str


@dataclass(frozen=True)
class MemoryReport:
    """What a training step takes at its peak, measured on the first batch.

    Attributes:
        peak_bytes: weights, gradients, optimiser state, inputs and activations together, with checkpoints as placed.
        plain_peak_bytes: without checkpoints.
        weight_bytes, gradient_bytes, optimizer_state_bytes: of the parts.
        other_bytes: buffers, inputs, averaged weights and teachers.
        budget_bytes: what was asked for, or None.
        blocks: activations, block by block.
        choices: block -> mode of what is computed twice.
        timeline: bytes alive during a plain step, beside what was there before, in equal parts of its allocations.
    """

    peak_bytes: int
    plain_peak_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_state_bytes: int
    other_bytes: int
    budget_bytes: int | None = None
    blocks: tuple[BlockMemory, ...] = ()
    choices: Mapping[str, Mode] = field(default_factory=dict)
    timeline: tuple[int, ...] = ()

    @property
    def recompute_seconds(self) -> float:
        """Forward seconds of the blocks of the table that are computed twice as a whole."""
        return sum(b.seconds for b in self.blocks if b.mode == "full")

    def __str__(self) -> str:
        total = [
            ("weights", self.weight_bytes),
            ("gradients", self.gradient_bytes),
            ("optimiser state", self.optimizer_state_bytes),
            ("buffers, inputs, other", self.other_bytes),
            ("activations, all kept", sum(b.plain_bytes for b in self.blocks)),
        ]
        lines = [f"{'':34}{'MB':>9}"]
        lines += [f"{name:34}{size / 1e6:9.1f}" for name, size in total]
        if self.choices:
            lines.append(f"{'activations, with checkpoints':34}{sum(b.kept_bytes for b in self.blocks) / 1e6:9.1f}")
        lines += ["", f"{'block':34}{'MB':>9}{'kept MB':>9}{'forward ms':>12}  computed twice"]
        widest = max((b.plain_bytes for b in self.blocks), default=1) or 1
        for b in self.blocks:
            bar = "█" * round(20 * b.kept_bytes / widest) + "░" * round(20 * (b.plain_bytes - b.kept_bytes) / widest)
            lines.append(
                f"{b.name[-34:]:34}{b.plain_bytes / 1e6:9.1f}{b.kept_bytes / 1e6:9.1f}{1e3 * b.seconds:12.1f}  {b.mode or '-':11}{bar}"
            )
        if self.timeline:
            top = max(self.timeline) or 1
            picture = "".join(LEVELS[max(0, min(8, round(8 * v / top)))] for v in self.timeline)
            lines += ["", "alive during a plain step, forward then backward:", picture]
        lines += ["", f"peak, plain  {self.plain_peak_bytes / 1e6:9.1f} MB"]
        if self.budget_bytes is not None:
            part = self.peak_bytes / self.budget_bytes
            lines.append(
                f"peak         {self.peak_bytes / 1e6:9.1f} MB, {part:.0%} of the budget, {len(self.choices)} blocks computed twice"
            )
        return "\n".join(lines)
