"""Class twins of the losses: frozen settings that can be called. A setting may be a schedule; `at` fixes all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from gossamer.distillation.losses import dense, features, logits, teacherless
from gossamer.distillation.schedules import Scheduled, value_at
from gossamer.errors import UsageError, near

T = TypeVar("T", bound="_Settings")


class _Settings:
    """What the twins share: settings as data, fixed at a moment of the training."""

    name: ClassVar[str]

    def at(self: T, done: float) -> T:
        """The loss where ``done`` of the training, in [0, 1], is done."""
        moving = {f.name: value_at(getattr(self, f.name), done) for f in fields(self) if callable(getattr(self, f.name))}  # type: ignore[arg-type]
        return replace(self, **moving) if moving else self  # type: ignore[type-var]

    def describe(self) -> dict[str, Any]:
        """Name and settings, as JSON takes them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {"loss": self.name} | {k: repr(v) if callable(v) else v for k, v in values.items()}


class OutputLoss(_Settings):
    """A loss of the student's and the teacher's outputs and of labels: ``loss(student, teacher, labels)``."""

    @property
    def needs_labels(self) -> bool:
        """Whether the loss cannot be computed without labels."""
        return True

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class FeatureLoss(_Settings):
    """A loss of features: ``loss(student, teacher)``.

    Attributes:
        matches: what must agree, and is made to by an adapter: ``"shape"``, ``"positions"`` or ``"nothing"``.
    """

    matches: ClassVar[str] = "nothing"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class KD(OutputLoss):
    """Class twin of `kd_loss`."""

    name: ClassVar[str] = "kd"
    alpha: Scheduled = 0.9
    tau: Scheduled = 4.0
    standardize: bool = False

    @property
    def needs_labels(self) -> bool:
        return callable(self.alpha) or self.alpha < 1

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return logits.kd_loss(student, teacher, labels, **_numbers(self))


@dataclass(frozen=True)
class DKD(OutputLoss):
    """Class twin of `dkd_loss`."""

    name: ClassVar[str] = "dkd"
    alpha: Scheduled = 1.0
    beta: Scheduled = 8.0
    tau: Scheduled = 4.0
    ce: Scheduled = 1.0

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return logits.dkd_loss(student, teacher, labels, **_numbers(self))


@dataclass(frozen=True)
class NKD(OutputLoss):
    """Class twin of `nkd_loss`."""

    name: ClassVar[str] = "nkd"
    gamma: Scheduled = 1.5
    tau: Scheduled = 1.0
    ce: Scheduled = 1.0

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return logits.nkd_loss(student, teacher, labels, **_numbers(self))


@dataclass(frozen=True)
class DIST(OutputLoss):
    """Class twin of `dist_loss`."""

    name: ClassVar[str] = "dist"
    beta: Scheduled = 1.0
    gamma: Scheduled = 1.0
    tau: Scheduled = 1.0
    ce: Scheduled = 1.0

    @property
    def needs_labels(self) -> bool:
        return callable(self.ce) or self.ce > 0

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return logits.dist_loss(student, teacher, labels, **_numbers(self))


@dataclass(frozen=True)
class SelfDistillation(OutputLoss):
    """Class twin of `self_distillation_loss`; also an objective ``(outputs, labels)`` of `gossamer.fit`, as no teacher is needed."""

    name: ClassVar[str] = "self"
    alpha: Scheduled = 0.5
    tau: Scheduled = 4.0
    correct: float = 0.9

    def __call__(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """``(student, labels)``, or ``(student, teacher, labels)`` with a teacher that is not looked at."""
        return teacherless.self_distillation_loss(student, teacher if labels is None else labels, **_numbers(self))


@dataclass(frozen=True)
class RegressionKD(OutputLoss):
    """Class twin of `regression_kd_loss`."""

    name: ClassVar[str] = "regression"
    alpha: Scheduled = 0.5
    margin: float | None = None

    @property
    def needs_labels(self) -> bool:
        return callable(self.alpha) or self.alpha < 1 or self.margin is not None

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return dense.regression_kd_loss(student, teacher, labels, **_numbers(self))


@dataclass(frozen=True)
class Combined(OutputLoss):
    """A weighted sum of output losses.

    Examples:
        >>> import torch
        >>> both = Combined([(KD(alpha=1.0), 0.5), (DIST(ce=0.0), 2.0)])
        >>> z = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.5, 3.0]])
        >>> both(z, z).item() < 1e-5, both.needs_labels
        (True, False)

    Args:
        parts: pairs of a loss and its weight, which may be a schedule.
    """

    name: ClassVar[str] = "combined"
    parts: Sequence[tuple[OutputLoss, Scheduled]]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("a combined loss needs at least one part: [(KD(), 1.0), ...]")

    @property
    def needs_labels(self) -> bool:
        return any(loss.needs_labels for loss, _ in self.parts)

    def at(self, done: float) -> Combined:
        return Combined([(loss.at(done), value_at(weight, done)) for loss, weight in self.parts])

    def describe(self) -> dict[str, Any]:
        return {"loss": self.name, "parts": [[loss.describe(), repr(w) if callable(w) else w] for loss, w in self.parts]}

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        total = student.new_zeros((), dtype=torch.float32 if student.dtype.itemsize < 4 else student.dtype)
        for loss, weight in self.parts:
            total = total + value_at(weight, 0.0) * loss.at(0.0)(student, teacher, labels)
        return total


@dataclass(frozen=True)
class FitNet(FeatureLoss):
    """Class twin of `fitnet_loss`."""

    name: ClassVar[str] = "fitnet"
    matches: ClassVar[str] = "shape"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return features.fitnet_loss(student, teacher)


@dataclass(frozen=True)
class AttentionTransfer(FeatureLoss):
    """Class twin of `attention_transfer_loss`."""

    name: ClassVar[str] = "attention"
    matches: ClassVar[str] = "positions"
    p: float = 2.0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return features.attention_transfer_loss(student, teacher, p=self.p)


@dataclass(frozen=True)
class SimilarityPreserving(FeatureLoss):
    """Class twin of `similarity_preserving_loss`."""

    name: ClassVar[str] = "similarity"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return features.similarity_preserving_loss(student, teacher)


@dataclass(frozen=True)
class RKD(FeatureLoss):
    """Class twin of `rkd_loss`."""

    name: ClassVar[str] = "rkd"
    distance: Scheduled = 25.0
    angle: Scheduled = 50.0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return features.rkd_loss(student, teacher, **_numbers(self))


@dataclass(frozen=True)
class Channelwise(FeatureLoss):
    """Class twin of `channelwise_loss`."""

    name: ClassVar[str] = "channelwise"
    matches: ClassVar[str] = "shape"
    tau: Scheduled = 4.0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return dense.channelwise_loss(student, teacher, **_numbers(self))


LOSSES: Mapping[str, Callable[..., OutputLoss]] = {
    "kd": KD,
    "kd_standardized": lambda **settings: KD(standardize=True, **settings),
    "dkd": DKD,
    "dist": DIST,
    "nkd": NKD,
    "self": SelfDistillation,
    "regression": RegressionKD,
}
"""Losses of outputs by name, as ``distill(loss=...)`` takes them."""

FEATURE_LOSSES: Mapping[str, type[FeatureLoss]] = {c.name: c for c in (FitNet, AttentionTransfer, SimilarityPreserving, RKD, Channelwise)}
"""Losses of features by name, as `Feature` takes them."""


def named(name: str, known: Mapping[str, Callable[..., Any]], what: str, **settings: Any) -> Any:
    """A loss by name with settings; UsageError where there is none (near names are listed), or where it does not take one of them."""
    if name not in known:
        raise UsageError(f"unknown {what} {name!r}, known are {', '.join(known)}{near(name, known)}")
    try:
        return known[name](**settings)
    except TypeError:
        takes = ", ".join(f.name for f in fields(known[name]())) or "no settings"
        raise UsageError(f"{what} {name!r} takes {takes}, not {', '.join(settings)}") from None


def _numbers(loss: Any) -> dict[str, Any]:
    """All settings as numbers: schedules at the start of the training, where `at` has not fixed them."""
    return {f.name: value_at(getattr(loss, f.name), 0.0) for f in fields(loss)}
