"""Distillation as an objective of the one training loop: teachers, the loss of the outputs, the losses of features."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.distillation.cache import TeacherCache, fingerprint
from gossamer.distillation.losses.twins import LOSSES, FeatureLoss, OutputLoss, named
from gossamer.distillation.schedules import Scheduled, value_at
from gossamer.distillation.taps import Adapter, FeatureTaps, as_features
from gossamer.errors import SourceError, UsageError
from gossamer.result import Result
from gossamer.sources.batches import Batch
from gossamer.training import set_layout
from gossamer.training.feeding import tensors_of
from gossamer.training.objectives import check_labels, logits_of


class Distillation:
    """A loss of distillation as an objective for `gossamer.fit`. Teachers are copies, in eval mode for good, and get no gradients.

    Examples:
        >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> objective = Distillation(teacher, alpha=1.0)
        >>> objective(student, Batch((torch.zeros(2, 4),), {}, None)).requires_grad
        True

    Args:
        teacher: a network, a `Result`, or several of them; each takes the same inputs as the student. Left as they are. None only with
            ``loss="self"``.
        loss: a name, ``"kd"``, ``"kd_standardized"``, ``"dkd"``, ``"dist"``, ``"nkd"``, ``"self"``, ``"regression"``, or an `OutputLoss`
            such as ``DKD(beta=2.0)`` or `Combined`; None for features alone.
        alpha, tau: of a loss that is given by name; default: its own.
        features: names of modules, ``{student: teacher}``, or `Feature` objects. Adapters between them are trained with the student.
        teacher_weights: what the losses of several teachers are multiplied by; default: all alike, with the sum 1.
        cache: a folder for the teachers' outputs, found again by the sample's content.

    Raises:
        UsageError: an unknown loss (near names are listed), or an argument outside its range.
        RunFolderError: the cache is another teacher's.
    """

    def __init__(
        self,
        teacher: nn.Module | Result | Sequence[nn.Module | Result] | None,
        *,
        loss: str | OutputLoss | None = "kd",
        alpha: Scheduled | None = None,
        tau: Scheduled | None = None,
        features: Any = (),
        teacher_weights: Sequence[float] | None = None,
        cache: str | Path | None = None,
    ) -> None:
        given = {k: v for k, v in (("alpha", alpha), ("tau", tau)) if v is not None}
        if not isinstance(loss, str) and given:
            raise UsageError(f"{' and '.join(given)} go with a loss that is given by name: set them in {loss or 'the features'} itself")
        self.loss: OutputLoss | None = named(loss, LOSSES, "loss", **given) if isinstance(loss, str) else loss
        self.features = as_features(features)
        teachers = [] if teacher is None else [teacher] if isinstance(teacher, nn.Module | Result) else list(teacher)
        networks = [t.model if isinstance(t, Result) else t for t in teachers]
        self.teachers = [copy.deepcopy(t).eval().requires_grad_(False) for t in networks]
        self.weights = _weights(teacher_weights, len(self.teachers))
        self._check()
        self.caches: list[TeacherCache] = []
        if cache is not None:
            several = len(self.teachers) > 1
            self.caches = [TeacherCache(Path(cache) / str(i) if several else cache, t) for i, t in enumerate(self.teachers)]
        self.adapters = nn.ModuleList()
        self.done = 0.0
        self.__name__ = self.loss.name if self.loss is not None else "features"
        self._channels_last = [False] * len(self.teachers)

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed training must agree with."""
        found: dict[str, Any] = self.loss.describe() if self.loss is not None else {"loss": None}
        found |= {"teachers": [fingerprint(t) for t in self.teachers], "teacher_weights": self.weights}
        return found | {"features": [f.describe() for f in self.features]}

    def prepare(self, model: nn.Module, batch: Batch) -> nn.Module:
        """Build the adapters that this student needs, from one pass in eval mode; they are trained with it."""
        self.adapters = nn.ModuleList()
        modes = [(m, m.training) for m in model.modules()]
        try:
            with torch.no_grad(), FeatureTaps(model.eval(), [f.student for f in self.features]) as taps:
                if self.features:
                    model(*batch.args, **batch.kwargs)
                    theirs = self._tapped(batch)
                    for feature in self.features:
                        features = theirs[feature.of][1]
                        assert isinstance(feature.loss, FeatureLoss) and features is not None
                        mine, other = taps[feature.student], features[str(feature.teacher)]
                        self.adapters.append(Adapter(mine.shape, other.shape, matches=feature.loss.matches).to(mine.device))
        finally:
            for module, mode in modes:
                module.training = mode
        return self.adapters

    def progress(self, done: float) -> None:
        """Told before each step how much of the training, in [0, 1], is done: schedules follow it."""
        self.done = done

    def divide(self, rank: int) -> None:
        """Called in each process of a parallel training: a cache is then a folder of its own, which no other process writes."""
        if self.caches:
            folders = [cache.folder / f"process-{rank}" for cache in self.caches]
            self.caches = [TeacherCache(folder, teacher) for folder, teacher in zip(folders, self.teachers, strict=True)]

    def teach(self, batch: Batch, which: int = 0) -> Tensor:
        """A teacher's logits, on the device and in the memory layout of the batch."""
        if self.caches:
            return self.caches[which].outputs(batch, lambda b: self._run(b, which))
        return self._run(batch, which)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.features and len(self.adapters) != len(self.features):
            self.prepare(model, batch)
        with FeatureTaps(model, [f.student for f in self.features]) as taps:
            student = logits_of(model(*batch.args, **batch.kwargs))
        theirs = self._tapped(batch) if self.features else [(self.teach(batch, i), None) for i in range(len(self.teachers))]
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        if self.loss is not None:
            total = total + self._on_outputs(self.loss.at(self.done), student, [out for out, _ in theirs], batch)
        for feature, adapter in zip(self.features, self.adapters, strict=True):
            now = feature.at(self.done)
            assert isinstance(now.loss, FeatureLoss)
            features = theirs[now.of][1]
            assert features is not None
            total = total + value_at(now.weight, 0.0) * now.loss(*adapter(taps[now.student], features[str(now.teacher)]))
        return total

    def _on_outputs(self, loss: OutputLoss, student: Tensor, teachers: list[Tensor], batch: Batch) -> Tensor:
        labels = batch.target if isinstance(batch.target, Tensor) and loss.needs_labels else None
        if labels is None and loss.needs_labels:
            how = f"alpha={value_at(loss.alpha, self.done):g}" if hasattr(loss, "alpha") else f"loss {loss.name!r}"
            raise SourceError(f"a batch has no labels, which {how} needs: give (inputs, labels), or use alpha=1")
        if labels is not None and not labels.is_floating_point():
            check_labels(student, labels)
        if not teachers:
            return loss(student, student, labels)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for weight, teacher in zip(self.weights, teachers, strict=True):
            if student.shape != teacher.shape:
                raise UsageError(
                    f"the student returns {tuple(student.shape)} and the teacher {tuple(teacher.shape)}: both must have the same classes"
                )
            total = total + weight * loss(student, teacher, labels)
        return total

    def _tapped(self, batch: Batch) -> list[tuple[Tensor, FeatureTaps | None]]:
        """Each teacher's logits and features."""
        found: list[tuple[Tensor, FeatureTaps | None]] = []
        for i, teacher in enumerate(self.teachers):
            with ExitStack() as stack:
                taps = stack.enter_context(FeatureTaps(teacher, [str(f.teacher) for f in self.features if f.of == i]))
                found.append((self._run(batch, i), taps))
        return found

    def _run(self, batch: Batch, which: int) -> Tensor:
        self._follow(batch, which)
        teacher = self.teachers[which]
        if teacher.training:
            teacher.eval()
        with torch.no_grad():
            return logits_of(teacher(*batch.args, **batch.kwargs))

    def _follow(self, batch: Batch, which: int) -> None:
        inputs = tensors_of(batch)
        wanted = any(t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last) for t in inputs)
        if wanted != self._channels_last[which]:
            set_layout(self.teachers[which], wanted)
            self._channels_last[which] = wanted
        if inputs and inputs[0].device.type != "cpu":
            self.teachers[which].to(inputs[0].device)

    def _check(self) -> None:
        if self.loss is None and not self.features:
            raise UsageError("distillation needs a loss or features")
        if not self.teachers and (self.features or not _needs_no_teacher(self.loss)):
            raise UsageError("distillation needs a teacher: only loss='self' works without one")
        for feature in self.features:
            if not 0 <= feature.of < len(self.teachers):
                raise UsageError(f"feature {feature.student!r} is of teacher {feature.of}, but there are {len(self.teachers)}")
        for i, teacher in enumerate(self.teachers):
            FeatureTaps(teacher, [str(f.teacher) for f in self.features if f.of == i])  # names that do not exist, before anything runs


def _needs_no_teacher(loss: OutputLoss | None) -> bool:
    return loss is not None and loss.name == "self"


def _weights(given: Sequence[float] | None, n: int) -> list[float]:
    if given is None:
        return [1 / n] * n if n else []
    if len(given) != n or not all(w >= 0 for w in given) or not sum(given) > 0:
        raise UsageError(f"{n} teachers need {n} weights of at least 0, not {list(given)}")
    return [float(w) for w in given]
