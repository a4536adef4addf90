"""What report.json holds. Every figure carries its unit in its name, and its runtime, threads, batch and spread beside it."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer

Decibels = Annotated[
    float, PlainSerializer(lambda db: db if math.isfinite(db) else "Infinity" if db > 0 else "-Infinity", when_used="json")
]
"""A ratio in decibels; JSON has no infinity (no difference at all), so it stands there as a string that reads back."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Latency(_Part):
    """Latency of one artefact in milliseconds, interleaved with the others of the same call.

    ``ratio`` is the median over rounds of this artefact's time to the original's of the same round, with its 10th and 90th percentile.
    """

    median: float
    p10: float
    p90: float
    runtime: str
    threads: int
    batch: int
    runs: int
    ratio: float | None = None
    ratio_p10: float | None = None
    ratio_p90: float | None = None


class Accuracy(_Part):
    """Top-1 of the exported artefact as a fraction of 1, with the 95% Wilson interval."""

    value: float
    n: int
    interval: tuple[float, float]


class Measured(_Part):
    """One exported artefact, measured in the runtime."""

    params: int
    macs: int
    size_bytes: int
    peak_activation_bytes: int
    latency_ms: Latency | None = None
    accuracy: Accuracy | None = None


class Parity(_Part):
    """Agreement of exported files: with their torch network, and of the final file with the original's."""

    before_difference: float
    after_difference: float | None = None
    sqnr_db: Decibels | None = None
    top1_agreement: float | None = None
    simulation_sqnr_db: Decibels | None = None
    simulation_to_original_db: Decibels | None = None
    artefact_to_original_db: Decibels | None = None
    n: int


class Storage(_Part):
    """The weights file of a network whose weights are sparse or shared: entropy-coded, lossless.

    ``size_bytes`` is the file's, ``dense_bytes`` what the original's weights take as they are, ``entropy_bytes`` the order-0 entropy of what is
    coded; ``zeros`` of ``weights`` entries are zero.
    """

    file: str
    size_bytes: int
    dense_bytes: int
    entropy_bytes: int
    zeros: int
    weights: int


class Executorch(_Part):
    """The same network as a file for ExecuTorch, measured there; ``before`` is the original's file, in float.

    ``difference`` is against the torch network, relative, of a float network; ``simulation_sqnr_db`` of one in integers; ``top1_agreement`` is with
    the original's file.
    """

    file: str
    before_size_bytes: int
    size_bytes: int
    before_median_ms: float
    latency_ms: Latency
    difference: float | None = None
    simulation_sqnr_db: Decibels | None = None
    accuracy: Accuracy | None = None
    top1_agreement: float | None = None
    notes: list[str] = []


class StepReport(_Part):
    """What one step did."""

    step: str
    options: dict[str, Any]
    params: int
    macs: int
    seconds: float
    proof: str | None = None
    notes: list[str] = []


class LayerRow(_Part):
    """One layer before and after."""

    name: str
    op: str
    shape_before: list[int]
    shape_after: list[int]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    bits: int | None = None


class Frozen(_Part):
    """A channel group that was not pruned, and why."""

    group: str
    reason: str


class Target(_Part):
    """One line of the budget."""

    name: str
    limit: float
    reached: float
    unit: str
    met: bool


class Input(_Part):
    """One input of the exported graph; the batch, where it is free, is 1 here."""

    name: str
    shape: list[int]
    dtype: str


class Report(_Part):
    """The truth about one run; the terminal table, report.html and the model card are views of it.

    ``simulated`` is the top-1 of the compressed network in torch, where that was measured too; ``preprocessing`` says in words what the
    artefact expects its inputs to have gone through.
    """

    gossamer: str
    model: str
    data: str | None
    seed: int
    created: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    before: Measured
    after: Measured
    parity: Parity
    steps: list[StepReport]
    layers: list[LayerRow]
    frozen: list[Frozen] = []
    budget: list[Target] = []
    warnings: list[str] = []
    inputs: list[Input] = []
    preprocessing: str | None = None
    simulated: Accuracy | None = None
    storage: Storage | None = None
    executorch: Executorch | None = None
