"""Data by name: digits, Fashion-MNIST, CIFAR-10, folders of images, or a factory of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from gossamer.errors import SourceError, near
from gossamer.sources.factory import call_factory, parse_options
from gossamer.sources.folders import collate, read_folder
from gossamer.sources.images import FASHION_MNIST, read_cifar10, read_digits, read_fashion_mnist

KINDS = ("digits", "fashion-mnist", "cifar10", "imagefolder")
"""Names of data specifications, besides ``package.module:factory``."""


@dataclass(frozen=True)
class Data:
    """Samples ``(input, label)`` to train on and to evaluate on.

    Attributes:
        name: the specification.
        train: samples to train on, or None where there is one split only.
        val: samples to evaluate on.
        num_classes: labels run from 0 to this; None where it is not known.
        input_shape: of one input with a batch of 1.
        seed: of shuffled loaders that are given none.
    """

    name: str
    train: Dataset[Any] | None
    val: Dataset[Any]
    num_classes: int | None
    input_shape: tuple[int, ...]
    seed: int = 0

    def loader(
        self,
        split: str,
        *,
        batch_size: int = 64,
        shuffle: bool = False,
        seed: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
    ) -> DataLoader[Any]:
        """Batches ``(inputs, labels)`` of one split.

        Examples:
            >>> len(load_data("digits").loader("val", batch_size=60))
            6

        Args:
            split: ``"train"`` or ``"val"``.
            batch_size: samples of a batch, at least 1.
            shuffle: in an order that depends on the seed and on how often the loader was read.
            seed: of the order; default: the data's own.
            drop_last: leave out a last batch that is not full.
            num_workers: processes that read ahead; 0 reads in this one.

        Returns:
            A DataLoader; it can be read any number of times.

        Raises:
            SourceError: there is no such split.
        """
        if split not in ("train", "val"):
            raise SourceError(f"data has the splits 'train' and 'val', not {split!r}{near(split, ['train', 'val'])}")
        dataset = self.train if split == "train" else self.val
        if dataset is None:
            raise SourceError(f"{self.name} has no training split, only one to evaluate on")
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        return DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=num_workers,
            generator=generator,
            collate_fn=collate,
        )

    def hold_back(self, part: float = 0.1) -> tuple[Data, Data]:
        """Take samples out of the training split, evenly spread over it, to judge a training on.

        Examples:
            >>> rest, held = load_data("digits").hold_back()
            >>> len(rest.train), len(held.val), len(rest.val)
            (1293, 144, 360)

        Args:
            part: of the samples, in (0, 1).

        Returns:
            This data with the samples that are left to train on, and data whose ``val`` are those that were taken.

        Raises:
            SourceError: there is no training split, or it is too small.
        """
        n = 0 if self.train is None else len(self.train)  # type: ignore[arg-type]
        k = max(1, round(n * part))
        if self.train is None or k >= n:
            raise SourceError(f"{self.name} has {n} samples to train on: none can be held back to judge the training on")
        taken = {i * n // k for i in range(k)}
        left, held = Subset(self.train, [i for i in range(n) if i not in taken]), Subset(self.train, sorted(taken))
        return replace(self, train=left), replace(self, train=None, val=held)

    def check(self, model_classes: int) -> None:
        """SourceError where labels go beyond the ``model_classes`` outputs of a network.

        Examples:
            >>> load_data("digits").check(10)
        """
        if self.num_classes is not None and self.num_classes > model_classes:
            raise SourceError(
                f"{self.name} has labels up to {self.num_classes - 1}, but the network has {model_classes} outputs: "
                f"build it with num_classes={self.num_classes}"
            )


def load_data(spec: str, *, transform: Callable[[Any], Tensor] | None = None, seed: int = 0, skip_unreadable: bool = False) -> Data:
    """Open the data that a specification names.

    Examples:
        >>> data = load_data("digits")
        >>> data.input_shape, data.num_classes, len(data.train), len(data.val)
        ((1, 1, 8, 8), 10, 1437, 360)

    Args:
        spec: one of

            - ``digits``: scikit-learn's 1797 digits, 1x8x8, a fifth of each class held out, always the same;
            - ``fashion-mnist[:PATH]``: the four IDX files, gzipped or not, 1x28x28;
            - ``cifar10:PATH``: the binary version (``data_batch_1.bin``, ...), 3x32x32;
            - ``imagefolder:PATH``: ``PATH/train`` and ``PATH/val`` where both exist, else PATH is one split to evaluate on. Folders
              named by integers are class indices; other names are numbered in sorted order;
            - ``package.module:factory`` or ``path/file.py:factory``, which returns a `Data`, a dataset to evaluate on, or
              ``(train, val)`` datasets.

            Pixels of the first three are scaled to 0..1, then by the mean and standard deviation of the training split, per channel.
        transform: PIL image -> float tensor (C, H, W), for ``imagefolder``; default: ImageNet's (256 on the short side, centre 224).
        seed: of shuffled loaders.
        skip_unreadable: leave out images of ``imagefolder`` that cannot be decoded, with a warning that names each; by default the first one is
            an error.

    Returns:
        A `Data`. Images of folders are decoded when they are read: memory does not grow with their number.

    Raises:
        SourceError: an unknown name (near names are listed), a missing path, an empty folder, an unreadable file, a missing package.
    """
    kind, colon, rest = spec.partition(":")
    match kind:
        case "digits" if not colon:
            data = Data(spec, *read_digits())
        case "fashion-mnist":
            data = Data(spec, *read_fashion_mnist(Path(rest or FASHION_MNIST)))
        case "cifar10":
            data = Data(spec, *read_cifar10(Path(_path(spec, rest))))
        case "imagefolder":
            data = Data(spec, *read_folder(Path(_path(spec, rest)), transform, skip_unreadable=skip_unreadable))
        case _ if colon and kind not in KINDS:
            data = _factory(spec)
        case _:
            raise SourceError(f"unknown data {spec!r}, known are {', '.join(KINDS)} and package.module:factory{near(kind, KINDS)}")
    return replace(data, seed=seed)


def _path(spec: str, rest: str) -> str:
    if not rest:
        raise SourceError(f"{spec!r} needs a path: write {spec.rstrip(':')}:PATH")
    return rest


def _factory(spec: str) -> Data:
    target, options = parse_options(spec)
    try:
        made = call_factory(target, **options)
    except SourceError as e:
        hint = near(spec.partition(":")[0], KINDS)
        raise SourceError(f"{e}{hint if 'did you mean' not in str(e) else ''}") from e
    if isinstance(made, Data):
        return replace(made, name=spec)
    train, val = made if isinstance(made, tuple) and len(made) == 2 else (None, made)
    for dataset in (train, val):
        if dataset is not None and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise SourceError(f"{spec} returned a {type(dataset).__name__}: a factory returns a Data, a dataset, or (train, val) datasets")
    if val is None or len(val) == 0:
        raise SourceError(f"{spec} returned no samples to evaluate on")
    sample = val[0]
    first = sample[0] if isinstance(sample, tuple | list) and sample else None
    if not isinstance(first, Tensor):
        raise SourceError(f"{spec}: a sample must be (tensor, label), not {type(sample).__name__}")
    classes = getattr(val, "num_classes", None) or (len(val.classes) if hasattr(val, "classes") else None)
    return Data(spec, train, val, classes, (1, *first.shape))
