"""Feature taps: the outputs of named modules, read while a network runs, and adapters between those of student and teacher.

Shape letters: N batch, C channels (S of the student, T of the teacher); positions follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.distillation.losses.twins import FEATURE_LOSSES, FeatureLoss, named
from gossamer.distillation.schedules import Scheduled, value_at
from gossamer.errors import SelectorError, UsageError, near
from gossamer.sources.batches import outputs


class FeatureTaps(AbstractContextManager["FeatureTaps"]):
    """Reads the outputs of modules while the network runs inside ``with``; the hooks are gone afterwards, also after an exception.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with FeatureTaps(net, ["1"]) as taps:
        ...     _ = net(torch.zeros(3, 4))
        >>> taps["1"].shape, len(net[1]._forward_hooks)
        (torch.Size([3, 8]), 0)

    Args:
        model: the network; it is not changed.
        names: of modules, as ``named_modules`` gives them. One that is called several times gives its last output; operations that work
            in place on an output afterwards (``ReLU(inplace=True)``) show in it.

    Raises:
        SelectorError: there is no such module (near names are listed).
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules or not name:
                raise SelectorError(f"no module is called {name!r}{near(name, modules)}")
        self._modules = {name: modules[name] for name in names}
        self._handles: list[Any] = []
        self._found: dict[str, Tensor] = {}

    def __enter__(self) -> FeatureTaps:
        self._found = {}
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._reader(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()

    def __getitem__(self, name: str) -> Tensor:
        """The output of a module; SelectorError where the forward pass did not call it or it returned no tensor."""
        if name not in self._found:
            raise SelectorError(f"the forward pass did not call module {name!r}, or no tensor came out of it: tap another one")
        return self._found[name]

    def clear(self) -> None:
        """Let go of the tensors."""
        self._found = {}

    def _reader(self, name: str) -> Any:
        def read(_module: nn.Module, _inputs: Any, out: Any) -> None:
            tensors = outputs(out)
            if tensors:
                self._found[name] = tensors[0]

        return read


@dataclass(frozen=True)
class Feature:
    """A pair of modules whose outputs a loss compares.

    Args:
        student: name of the student's module.
        teacher: name of the teacher's module; default: the same name.
        loss: ``"fitnet"``, ``"attention"``, ``"similarity"``, ``"rkd"``, ``"channelwise"``, or a `FeatureLoss`.
        weight: of the loss in the sum, a number at least 0 or a schedule.
        of: which teacher, where there are several.

    Raises:
        UsageError: an unknown loss (near names are listed), or a negative weight.
    """

    student: str
    teacher: str | None = None
    loss: str | FeatureLoss = "fitnet"
    weight: Scheduled = 1.0
    of: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.loss, str):
            object.__setattr__(self, "loss", named(self.loss, FEATURE_LOSSES, "feature loss"))
        if self.teacher is None:
            object.__setattr__(self, "teacher", self.student)
        if not callable(self.weight) and not self.weight >= 0:
            raise UsageError(f"the weight of feature {self.student!r} is {self.weight}: must be at least 0")

    def at(self, done: float) -> Feature:
        """The feature with its schedules fixed where ``done`` of the training is done."""
        assert isinstance(self.loss, FeatureLoss)
        return replace(self, loss=self.loss.at(done), weight=value_at(self.weight, done))

    def describe(self) -> list[Any]:
        """All of it, as JSON takes it."""
        assert isinstance(self.loss, FeatureLoss)
        weight = repr(self.weight) if callable(self.weight) else self.weight
        return [self.student, self.teacher, self.loss.describe(), weight, self.of]


class Adapter(nn.Module):
    """Makes features comparable: a learned map between channels where they differ, mean pooling to the coarser positions.

    Examples:
        >>> import torch
        >>> adapter = Adapter((2, 8, 4, 4), (2, 16, 2, 2), matches="shape")
        >>> [tuple(x.shape) for x in adapter(torch.zeros(2, 8, 4, 4), torch.zeros(2, 16, 2, 2))]
        [(2, 16, 2, 2), (2, 16, 2, 2)]

    Args:
        student: shape of the student's features: (N, C), (N, C, positions...), or tokens (N, P, C).
        teacher: shape of the teacher's.
        matches: of a `FeatureLoss`: ``"shape"`` needs both alike, ``"positions"`` the positions only, ``"nothing"`` nothing.

    Raises:
        UsageError: one has positions in more dimensions than the other.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int], *, matches: str = "shape") -> None:
        super().__init__()
        self.matches, self.map = matches, nn.Identity()
        if matches == "nothing":
            return
        if len(student) != len(teacher) or len(student) < 2:
            raise UsageError(f"no adapter between features of shape {tuple(student)} and {tuple(teacher)}: tap modules of the same rank")
        # tokens (N, P, C), unless the last dimension agrees and the one before does not
        self.tokens = len(student) == 3 and not (student[2] == teacher[2] and student[1] != teacher[1])
        channel = 2 if self.tokens else 1
        if matches == "shape" and student[channel] != teacher[channel]:
            self.map = nn.Linear(student[channel], teacher[channel], bias=False)  # type: ignore[assignment]

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both features, channels first and comparable."""
        if self.matches == "nothing":
            return student, teacher
        if self.tokens:
            student, teacher = student.mT, teacher.mT
        positions = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        student, teacher = _pool(student, positions), _pool(teacher, positions)
        if isinstance(self.map, nn.Linear):
            student = self.map(student.movedim(1, -1)).movedim(-1, 1)
        return student, teacher


def _pool(x: Tensor, positions: list[int]) -> Tensor:
    if list(x.shape[2:]) == positions:
        return x
    pools: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    pooled: Tensor = pools[len(positions)](x, positions)
    return pooled


def as_features(given: Any) -> tuple[Feature, ...]:
    """Features from names, a dict of names, `Feature` objects, or a mix of them.

    Examples:
        >>> [(f.student, f.teacher) for f in as_features({"stage1": "layer1"})], as_features(["stem"])[0].teacher
        ([('stage1', 'layer1')], 'stem')

    Raises:
        UsageError: something else.
    """
    if isinstance(given, str | Feature):
        given = [given]
    if isinstance(given, dict):
        given = [Feature(student, teacher) for student, teacher in given.items()]
    found = []
    for item in given or ():
        if not isinstance(item, str | Feature):
            raise UsageError(f"features are names of modules or Feature(...), not {type(item).__name__}")
        found.append(Feature(item) if isinstance(item, str) else item)
    return tuple(found)
