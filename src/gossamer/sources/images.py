"""Data sets of small images in fixed formats: scikit-learn's digits, Fashion-MNIST's IDX files, CIFAR-10's binary files.

Shape letters: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from gossamer.errors import SourceError, near

Splits = tuple[Dataset[Any], Dataset[Any], int, tuple[int, ...]]
"""Training samples, evaluation samples, classes, input shape."""
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
"""Where the package ``dataset-fashion-mnist`` of Debian and Ubuntu puts the files."""
CIFAR_RECORD = 1 + 3 * 32 * 32
"""Bytes of one CIFAR-10 image: its label, then the red, the green and the blue plane."""


class PixelDataset(Dataset[tuple[Tensor, int]]):
    """Bytes in memory or in a mapped file, turned into ``(x - mean) / std`` with x in 0..1 when they are read.

    Examples:
        >>> data = PixelDataset(np.full((1, 1, 2, 2), 255, np.uint8), np.array([7]), mean=(0.5,), std=(0.25,))
        >>> data[0]
        (tensor([[[2., 2.],
                 [2., 2.]]]), 7)

    Args:
        images_NCHW: uint8.
        labels_N: integers.
        mean, std: one for each channel, of pixels in 0..1.
        most: the pixel value that is 1.
    """

    def __init__(
        self,
        images_NCHW: npt.NDArray[np.uint8],
        labels_N: npt.NDArray[Any],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        most: int = 255,
    ) -> None:
        self.images_NCHW, self.labels_N = images_NCHW, labels_N
        self._scale = 1 / (most * torch.tensor(std).view(-1, 1, 1))
        self._shift = torch.tensor(mean).view(-1, 1, 1) / torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels_CHW = torch.from_numpy(np.array(self.images_NCHW[index], dtype=np.float32))
        return pixels_CHW * self._scale - self._shift, int(self.labels_N[index])


def read_digits() -> Splits:
    """scikit-learn's digits: 1437 to train on and 360 to evaluate on, the same fraction of each class, always the same ones.

    Returns:
        Samples of shape (1, 8, 8): pixels 0..16 scaled to 0..1, then normalised by mean 0.305 and standard deviation 0.376.

    Raises:
        SourceError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise SourceError("digits needs scikit-learn: pip install 'gossamer[demo]'") from None
    found = load_digits()
    images_NCHW = found.images.astype(np.uint8)[:, None]
    train, val = train_test_split(np.arange(len(images_NCHW)), test_size=0.2, random_state=0, stratify=found.target)
    made = [PixelDataset(images_NCHW[i], found.target[i], mean=(0.305,), std=(0.376,), most=16) for i in (train, val)]
    return made[0], made[1], 10, (1, 1, 8, 8)


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """An array of bytes from an IDX file, gzipped or not.

    Args:
        path: the file; its first four bytes are 0, 0, 8 (unsigned byte) and the number of dimensions, then come big-endian sizes.

    Returns:
        The array, read-only.

    Raises:
        SourceError: the file cannot be read, is no IDX file of bytes, or is cut off.

    Source: the description of the format at the MNIST database of handwritten digits.
    """
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as e:
        raise SourceError(f"cannot read {path}: {e}") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4 or len(data) < 4 + 4 * data[3]:
        raise SourceError(f"{path} is not an IDX file of unsigned bytes")
    shape = tuple(int(s) for s in np.frombuffer(data, ">u4", count=data[3], offset=4))
    wanted, got = int(np.prod(shape, dtype=np.int64)), len(data) - 4 - 4 * data[3]
    if wanted != got:
        raise SourceError(f"{path} should hold {wanted} values for shape {shape}, but holds {got}: download it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def read_fashion_mnist(folder: Path) -> Splits:
    """Fashion-MNIST, or any data set in the four files of MNIST: 60000 images to train on, 10000 to evaluate on.

    Args:
        folder: holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same with ``t10k``, each possibly with ``.gz``.

    Returns:
        Samples of shape (1, 28, 28), scaled to 0..1, then normalised by mean 0.2860 and standard deviation 0.3530.

    Raises:
        SourceError: a file is missing or broken, or images and labels differ in number.

    Source: Xiao et al., "Fashion-MNIST", arXiv:1708.07747.
    """
    if not folder.is_dir():
        raise SourceError(
            f"there is no folder {folder} for fashion-mnist: write fashion-mnist:PATH (on Debian, apt install dataset-fashion-mnist)"
        )
    splits = []
    for part in ("train", "t10k"):
        images_NHW, labels_N = (read_idx(_one_of(folder, f"{part}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
        if images_NHW.ndim != 3 or labels_N.ndim != 1 or len(images_NHW) != len(labels_N) or len(labels_N) == 0:
            raise SourceError(f"{folder}: {part} has images {images_NHW.shape} and labels {labels_N.shape}, which do not belong together")
        if int(labels_N.max()) > 9:
            raise SourceError(f"{folder}: {part} has a label {int(labels_N.max())}, but there are ten classes")
        splits.append(PixelDataset(images_NHW[:, None], labels_N, mean=(0.2860,), std=(0.3530,)))
    return splits[0], splits[1], 10, (1, *splits[1].images_NCHW.shape[1:])


def read_cifar10(folder: Path) -> Splits:
    """CIFAR-10 in its binary version: 50000 images to train on, 10000 to evaluate on.

    Args:
        folder: holds ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, itself or in ``cifar-10-batches-bin``.

    Returns:
        Samples of shape (3, 32, 32), scaled to 0..1, then normalised by the training images' mean and standard deviation. The files
        are mapped, not read into memory.

    Raises:
        SourceError: a file is missing or broken, or only the Python version is there (its files are pickles, which run code when read).

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    if not folder.is_dir():
        raise SourceError(f"there is no folder {folder} for cifar10")
    inner = folder / "cifar-10-batches-bin"
    home = inner if inner.is_dir() else folder
    if not list(home.glob("*.bin")):
        pickled = (folder / "data_batch_1").exists() or (folder / "cifar-10-batches-py").exists()
        tail = "the Python version there is made of pickles, which are not read: get" if pickled else "get"
        raise SourceError(f"{folder} does not hold data_batch_1.bin: {tail} the binary version of CIFAR-10 (cifar-10-binary.tar.gz)")
    train: Dataset[Any] = ConcatDataset([_cifar_file(_one_of(home, f"data_batch_{i}.bin")) for i in range(1, 6)])
    return train, _cifar_file(_one_of(home, "test_batch.bin")), 10, (1, 3, 32, 32)


def _cifar_file(path: Path) -> PixelDataset:
    size = path.stat().st_size
    if size == 0 or size % CIFAR_RECORD:
        raise SourceError(f"{path} has {size} bytes, which is not a number of CIFAR-10 images of {CIFAR_RECORD} bytes: download it again")
    try:
        records = np.memmap(path, np.uint8, mode="r").reshape(-1, CIFAR_RECORD)
    except OSError as e:
        raise SourceError(f"cannot read {path}: {e.strerror}") from None
    labels_N = np.array(records[:, 0])
    if int(labels_N.max()) > 9:
        raise SourceError(f"{path} has a label {int(labels_N.max())}: it is not CIFAR-10 (ten classes)")
    images_NCHW = records[:, 1:].reshape(-1, 3, 32, 32)
    return PixelDataset(images_NCHW, labels_N, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def _one_of(folder: Path, name: str) -> Path:
    """The file ``name`` or ``name.gz`` in ``folder``."""
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise SourceError(f"{folder} does not hold {name}{near(name, [p.name for p in folder.iterdir()])}")
