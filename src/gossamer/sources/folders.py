"""Folders of images, one folder for each class. Images are decoded when they are read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from gossamer.errors import SourceError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
"""Endings of files that count as images; all others are passed over."""


class Unreadable(NamedTuple):
    """A sample that could not be read, in place of it."""

    path: Path
    reason: str


def collate(samples: list[Any]) -> Any:
    """A batch of samples as torch makes it, without those that are `Unreadable`; each of them is named in a warning.

    Examples:
        >>> import torch
        >>> [t.tolist() for t in collate([(torch.zeros(2), 3), (torch.ones(2), 4)])]
        [[[0.0, 0.0], [1.0, 1.0]], [3, 4]]

    Args:
        samples: of one batch.

    Raises:
        SourceError: none of the samples of the batch is readable.
    """
    good = [s for s in samples if not isinstance(s, Unreadable)]
    for bad in (s for s in samples if isinstance(s, Unreadable)):
        warnings.warn(f"left out {bad.path}: {bad.reason}", stacklevel=2)
    if samples and not good:
        raise SourceError(f"not one image of a batch is readable, {samples[0].path} for example: check the folder")
    return default_collate(good)


class ImageFolder(Dataset[Any]):
    """The images below the class folders of one split, in sorted order.

    Args:
        root: holds one folder for each class.
        classes: folder name -> class index.
        transform: PIL image in RGB -> float tensor (C, H, W).
        skip_unreadable: give an `Unreadable` in place of an image that cannot be decoded, which `collate` leaves out of the batch;
            otherwise it is a SourceError that names the file.

    Raises:
        SourceError: no image is found.
    """

    def __init__(
        self, root: Path, classes: Mapping[str, int], transform: Callable[[Any], Tensor], *, skip_unreadable: bool = False
    ) -> None:
        self.transform = transform
        self.skip_unreadable = skip_unreadable
        self.samples = [
            (path, index)
            for name, index in sorted(classes.items(), key=lambda item: item[1])
            if (root / name).is_dir()
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES and path.is_file()
        ]
        if not self.samples:
            raise SourceError(f"{root} holds no images ({', '.join(sorted(SUFFIXES))}) in its class folders")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        path, label = self.samples[index]
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            reason = " ".join(str(e).split())
            if self.skip_unreadable:
                return Unreadable(path, reason)
            raise SourceError(f"cannot read image {path}: {reason}: replace or remove it, or skip such files") from None
        x_CHW = self.transform(image)
        if not isinstance(x_CHW, Tensor):
            raise SourceError(f"the transform made a {type(x_CHW).__name__} of {path}: it must return a tensor")
        return x_CHW, label


def imagenet_transform() -> Callable[[Any], Tensor]:
    """ImageNet's usual preparation: 256 on the short side, the central 224x224, normalised per channel."""
    from torchvision.transforms._presets import ImageClassification

    preset: Callable[[Any], Tensor] = ImageClassification(crop_size=224)
    return preset


def read_folder(
    root: Path, transform: Callable[[Any], Tensor] | None, *, skip_unreadable: bool = False
) -> tuple[Dataset[Any] | None, Dataset[Any], int, tuple[int, ...]]:
    """Training samples or None, evaluation samples, number of classes and input shape of ``imagefolder:ROOT``.

    Args:
        root: holds ``train`` and ``val``, or class folders.
        transform: PIL image -> tensor (C, H, W); default: `imagenet_transform`.
        skip_unreadable: of `ImageFolder`.

    Raises:
        SourceError: the path is missing, there are no class folders or no images, one split is missing, or ``val`` has a class that
            ``train`` does not have.
    """
    transform = transform or imagenet_transform()
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder" if root.exists() else f"there is no folder {root}")
    halves = [name for name in ("train", "val") if _subfolders(root / name)]
    if len(halves) == 1:
        missing = "val" if halves == ["train"] else "train"
        raise SourceError(f"{root} holds {halves[0]} but no class folders in {missing}: give both, or name {root / halves[0]} itself")
    if not halves:
        classes = class_indices(root)
        val = ImageFolder(root, classes, transform, skip_unreadable=skip_unreadable)
        return None, val, max(classes.values()) + 1, _shape(val)
    classes = class_indices(root / "train")
    known = class_indices(root / "val")
    strange = sorted(set(known) - set(classes))
    if strange and not all(name.isdigit() for name in (*known, *classes)):
        raise SourceError(f"{root / 'val'} has class folders that train does not have: {', '.join(strange[:3])}")
    classes = classes | {name: int(name) for name in strange}
    train, val = (ImageFolder(root / half, classes, transform, skip_unreadable=skip_unreadable) for half in halves)
    return train, val, max(classes.values()) + 1, _shape(val)


def _shape(images: ImageFolder) -> tuple[int, ...]:
    """Shape of the first image that is readable, with a batch of 1."""
    first = next((s for s in (images[i] for i in range(len(images))) if not isinstance(s, Unreadable)), None)
    if first is None:
        raise SourceError(f"not one of {len(images)} images is readable, {images.samples[0][0]} for example: check the folder")
    return (1, *first[0].shape)


def class_indices(root: Path) -> dict[str, int]:
    """Class folders and their indices: integers name themselves, other names are numbered in sorted order.

    Raises:
        SourceError: there are no folders, or two of them name the same integer.
    """
    names = _subfolders(root)
    if not names:
        loose = any(p.suffix.lower() in SUFFIXES for p in root.iterdir())
        raise SourceError(f"{root} holds " + ("images, but no folder for each class" if loose else "no class folders: is it empty?"))
    if not all(name.isascii() and name.isdigit() for name in names):
        return {name: i for i, name in enumerate(names)}
    if len({int(name) for name in names}) < len(names):
        raise SourceError(f"{root}: two class folders name the same index (0001 and 1, for example)")
    return {name: int(name) for name in names}


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []
