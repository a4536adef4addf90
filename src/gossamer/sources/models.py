"""Networks by name: torchvision's, timm's, gossamer's own, or a factory of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import SourceError, near
from gossamer.result import ExampleInputs
from gossamer.sources.batches import check_inputs
from gossamer.sources.factory import call_factory, format_options, parse_options
from gossamer.sources.weights import fill, read_state

Transform = Callable[[Any], Tensor]
"""From a PIL image to a float tensor (C, H, W)."""
SCHEMES = ("torchvision", "timm", "gossamer")
"""What may stand before the colon, besides a module or a file."""


@dataclass(frozen=True)
class LoadedModel:
    """A network from a specification, with what belongs to it.

    Attributes:
        spec: the specification, options included: `load_model` builds the same structure from it again.
        model: in eval mode.
        transform: how its images are prepared (PIL image -> (C, H, W) tensor); None where that is not known.
        input_shape: of one input with a batch of 1, ``(1, 3, 224, 224)``; None where it is not known.
        example_inputs: inputs of the shape it takes: a tuple or a dict; None where they are not known.
        pretrained: False where the weights are known to be random.
    """

    spec: str
    model: nn.Module
    transform: Transform | None = None
    input_shape: tuple[int, ...] | None = None
    example_inputs: ExampleInputs = None
    pretrained: bool = True


def is_spec(text: str) -> bool:
    """Whether ``text`` is written as a model specification, rather than as the path of a run folder.

    Examples:
        >>> is_spec("torchvision:resnet18"), is_spec("runs/mine")
        (True, False)
    """
    return ":" in text and not Path(text).is_dir()


def complete(text: str) -> str:
    """The specification that a bare name stands for: gossamer's own network of that name, or else torchvision's.

    Examples:
        >>> complete("resnet18?small=true"), complete("vgg11"), complete("timm:resnet10t")
        ('gossamer:resnet18?small=true', 'torchvision:vgg11', 'timm:resnet10t')

    Args:
        text: ``NAME`` or ``NAME?OPTIONS``; a specification stays as it is.

    Returns:
        A specification for `load_model`.

    Raises:
        SourceError: no network has that name, or several begin with it; they are listed.
    """
    if ":" in text:
        return text
    name = parse_options(text)[0]
    known = _known()
    for scheme in ("gossamer", "torchvision"):
        if f"{scheme}:{name}" in known:
            return f"{scheme}:{text}"
    longer = sorted({n for k in known if (n := k.partition(":")[2]).startswith(name or ":")})
    if longer:
        raise SourceError(f"{text!r} may be {', '.join(longer[:5])}{' and more' * (len(longer) > 5)}: name one of them")
    raise SourceError(f"{text!r} is neither a file, a run folder nor a model{_suggest(name)}")


def load_model(
    spec: str, *, weights: str | Path | None = None, num_classes: int | None = None, in_channels: int | None = None, seed: int = 0
) -> LoadedModel:
    """Build the network that a specification names, and fill it with weights where a file is given.

    Examples:
        >>> loaded = load_model("gossamer:mobilenet_v2?width_mult=0.5", num_classes=10, in_channels=1)
        >>> loaded.spec, loaded.input_shape, loaded.pretrained
        ('gossamer:mobilenet_v2?width_mult=0.5&num_classes=10&in_channels=1', (1, 1, 224, 224), False)

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, ``gossamer:NAME``, ``package.module:factory`` or ``path/file.py:factory``, each with
            options where wanted: ``gossamer:resnet8?width=64&in_channels=1``. A factory returns a module, or a module and its
            example inputs. Nothing is downloaded.
        weights: a state dict, as safetensors or as a torch file that loads without unpickling.
        num_classes, in_channels: the same as the options of these names.
        seed: of the random weights; the global random state is left alone.

    Returns:
        A `LoadedModel`; without weights, those of a factory count as trained, all others as random.

    Raises:
        SourceError: the specification cannot be used; near names are listed.
        WeightsError: the file cannot be used or does not fit; names and shapes are listed.
    """
    scheme, colon, rest = spec.partition(":")
    if not colon:
        raise SourceError(f"{spec!r} is neither a run folder nor a model: write for example torchvision:mobilenet_v2{_suggest(spec)}")
    name, options = parse_options(rest)
    options |= {k: v for k, v in (("num_classes", num_classes), ("in_channels", in_channels)) if v is not None}
    full = format_options(f"{scheme}:{name}", options)
    state = read_state(weights) if weights is not None else None
    with seeded(seed):
        match scheme:
            case "torchvision":
                loaded = _torchvision(full, name, options, weights)
            case "timm":
                loaded = _timm(full, name, options)
            case "gossamer":
                loaded = _own(full, name, options)
            case _:
                loaded = _factory(full, f"{scheme}:{name}", options)
    if state is not None:
        fill(loaded.model, state, where=str(weights))
    loaded.model.eval()
    pretrained = state is not None or scheme not in SCHEMES
    return LoadedModel(full, loaded.model, loaded.transform, loaded.input_shape, loaded.example_inputs, pretrained)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of the CPU come from ``seed`` inside this block; the global state is put back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _known() -> list[str]:
    from torchvision.models import list_models

    from gossamer.models import MODELS

    return [f"gossamer:{n}" for n in MODELS] + [f"torchvision:{n}" for n in list_models()]


def _suggest(name: str) -> str:
    known = _known()
    exact = [k for k in known if k.partition(":")[2] == name]
    if exact:
        return f"; did you mean {' or '.join(map(repr, exact))}?"
    return near(name, known) or near(name, {k.partition(":")[2] for k in known})


def _torchvision(spec: str, name: str, options: dict[str, Any], weights: str | Path | None) -> LoadedModel:
    from torchvision import models
    from torchvision.transforms._presets import ImageClassification

    if name not in models.list_models():
        raise SourceError(f"torchvision has no model {name!r}{near(name, models.list_models())}")
    builder = models.get_model_builder(name)
    if "in_channels" in options:
        raise SourceError(f"torchvision:{name} takes images of 3 channels only: leave out in_channels")
    options = dict(options)
    if "init_weights" in inspect.signature(builder).parameters or name in ("inception_v3", "googlenet"):
        options.setdefault("init_weights", weights is None)
    try:
        model = builder(weights=None, **({"weights_backbone": None} if _has_backbone(builder) else {}), **options)
    except (TypeError, ValueError) as e:
        raise SourceError(f"{spec}: torchvision cannot build it: {' '.join(str(e).split())}") from None
    known = list(models.get_model_weights(name))
    file = Path(weights).name if weights is not None else ""
    preset = next((w for w in known if w.url.rpartition("/")[2] == file), None)
    preset = preset or next((w for w in known if w.name == "IMAGENET1K_V1"), known[0] if known else None)
    transform = preset.transforms() if preset is not None else None
    if not isinstance(transform, ImageClassification):
        return LoadedModel(spec, model)
    side = transform.crop_size[0]
    return LoadedModel(spec, model, transform, (1, 3, side, side))


def _has_backbone(builder: Callable[..., nn.Module]) -> bool:
    return "weights_backbone" in inspect.signature(builder).parameters


def _timm(spec: str, name: str, options: dict[str, Any]) -> LoadedModel:
    try:
        import timm
    except ModuleNotFoundError:
        raise SourceError(f"{spec} needs timm: pip install 'gossamer[timm]'") from None
    if name.partition(".")[0] not in timm.list_models():
        raise SourceError(f"timm has no model {name!r}{near(name, timm.list_models())}")
    options = {("in_chans" if k == "in_channels" else k): v for k, v in options.items()}
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except (TypeError, RuntimeError, ValueError) as e:
        raise SourceError(f"{spec}: timm cannot build it: {' '.join(str(e).split())}") from None
    config = timm.data.resolve_data_config({}, model=model)
    channels = options.get("in_chans", config["input_size"][0])
    transform = timm.data.create_transform(**config, is_training=False) if channels == 3 else None
    return LoadedModel(spec, model, transform, (1, channels, *config["input_size"][1:]))


def _own(spec: str, name: str, options: dict[str, Any]) -> LoadedModel:
    from gossamer.models import build, input_side

    model = build(name, **options)
    side = input_side(name, **options)
    return LoadedModel(spec, model, None, (1, options.get("in_channels", 3), side, side))


def _factory(spec: str, target: str, options: dict[str, Any]) -> LoadedModel:
    made = call_factory(target, **options)
    inputs = None
    if isinstance(made, tuple) and len(made) == 2:
        made, inputs = made[0], check_inputs(made[1])
    if not isinstance(made, nn.Module):
        raise SourceError(f"{target} returned a {type(made).__name__}: a factory returns a torch.nn.Module, or (module, example_inputs)")
    only = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else None
    return LoadedModel(spec, made, None, tuple(only.shape) if isinstance(only, Tensor) else None, inputs)
