"""A job: everything `compress` was asked to do, resolved and checked before anything is written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.errors import RecipeError, SourceError, UsageError, WeightsError
from gossamer.recipe import Budget, Fit, Prune, Qat, Quantize, Recipe, Sparsify
from gossamer.result import ExampleInputs
from gossamer.sources import Data, LoadedModel, load_data, load_model
from gossamer.sources.batches import call, check_inputs, outputs
from gossamer.sources.folders import collate

if TYPE_CHECKING:
    from gossamer.parallel import Parallel

Progress = Callable[[str, int, int], None]  # stage, done, total
CALIBRATION_SAMPLES = 512  # taken from a training split where no calibration data is named


@dataclass(frozen=True)
class Job:
    """A checked request.

    Attributes:
        model: the source network, in eval mode; never changed.
        source: its specification, or None for a network in memory.
        example_inputs: one sample, batch of 1.
        evaluation, calibration, training: batches, each can be read again and again; training is None where there is none.
        validation: batches that training is judged on after each epoch, or None.
        data_name: for the report.
        warnings: what the user must know before reading any figure.
        preprocessing: in words, what images go through; None where it is not known.
        executorch: whether a ``.pte`` file is wanted, too.
        parallel: how steps that train are split over processes; None trains in one.
    """

    model: nn.Module
    source: str | None
    example_inputs: ExampleInputs
    evaluation: Iterable[Any]
    calibration: Iterable[Any]
    training: Any
    validation: Iterable[Any] | None
    data_name: str | None
    recipe: Recipe | None
    budget: Budget | None
    seed: int
    threads: int
    warnings: tuple[str, ...]
    preprocessing: str | None = None
    executorch: bool = False
    parallel: Parallel | None = None

    def recipe_name(self) -> str:
        """The recipe as one line."""
        return " -> ".join(s.kind for s in self.recipe.steps) if self.recipe else "chosen by the budget"

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        return {
            "model": self.source or type(self.model).__qualname__,
            "weights": digest.hexdigest()[:16],
            "data": self.data_name,
            "recipe": self.recipe.dump() if self.recipe else None,
            "budget": self.budget.model_dump(mode="json") if self.budget else None,
            "seed": self.seed,
        }


def resolve(
    model: nn.Module | LoadedModel | str,
    data: Any,
    *,
    recipe: Any = None,
    budget: Budget | str | None = None,
    calibration: Any = None,
    validation: Any = None,
    example_inputs: ExampleInputs = None,
    weights: str | Path | None = None,
    seed: int = 0,
    threads: int = 1,
    executorch: bool = False,
    parallel: Parallel | None = None,
) -> Job:
    """Turn what the caller gave into a `Job`, or say in one line what is wrong with it."""
    if executorch:
        from gossamer.exporting.executorch_runtime import load_runtime

        load_runtime()
    loaded = load_model(model, weights=weights) if isinstance(model, str) else model
    if not isinstance(loaded, LoadedModel | nn.Module):
        raise SourceError(
            f"the model must be a torch.nn.Module or a specification such as 'torchvision:mobilenet_v2', not {type(model).__name__}"
        )
    network = loaded.model if isinstance(loaded, LoadedModel) else loaded
    check_finite(network)
    warnings = []
    if isinstance(loaded, LoadedModel) and not loaded.pretrained:
        warnings.append("the network has random weights (no weights were given): its accuracy means nothing")
    if isinstance(budget, str):
        budget = Budget.parse(budget)
    steps = Recipe.of(recipe) if recipe is not None else None
    if steps is None and budget is None:
        steps = Recipe.of([Quantize()])
    budget = budget or (steps.budget if steps else None)

    transform = loaded.transform if isinstance(loaded, LoadedModel) else None
    data = load_data(data, transform=transform, seed=seed) if isinstance(data, str) else data
    if isinstance(validation, str):
        validation = load_data(validation, transform=transform, seed=seed)
    data, validation = _judged(data, validation, steps)
    name, evaluation, training = _splits(data, steps, seed, drop_last=parallel is not None and parallel.pipeline > 1)
    if isinstance(calibration, str):
        calibration = load_data(calibration, transform=transform, seed=seed)
    if isinstance(calibration, Data):
        calibration = calibration.loader("val", batch_size=32)
    if calibration is None and isinstance(data, Data) and data.train is not None:
        first = torch.utils.data.Subset(data.train, _spread(len(data.train), CALIBRATION_SAMPLES))  # type: ignore[arg-type]
        calibration = torch.utils.data.DataLoader(first, batch_size=32, collate_fn=collate)
    if calibration is None:
        calibration = evaluation
        warnings.append("calibrated on the evaluation data itself: its accuracy is slightly flattered; name calibration data")
    if example_inputs is None:
        example_inputs = _example(data, loaded)
    example_inputs = check_inputs(example_inputs)
    _check_fits(network, example_inputs, data, name)
    return Job(
        model=network,
        source=loaded.spec if isinstance(loaded, LoadedModel) else None,
        example_inputs=example_inputs,
        evaluation=evaluation,
        calibration=calibration,
        training=training,
        validation=validation,
        data_name=name,
        recipe=steps,
        budget=budget,
        seed=seed,
        threads=threads,
        warnings=tuple(warnings),
        preprocessing=" ".join(str(transform).split()) if transform is not None else None,
        executorch=executorch,
        parallel=parallel,
    )


def check_finite(model: nn.Module) -> None:
    """WeightsError that names the first tensor with a NaN or an infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise WeightsError(
                f"{name} holds {bad} values that are NaN or infinite: the network cannot be compressed, check how it was trained"
            )


def _check_fits(network: nn.Module, example_inputs: ExampleInputs, data: Any, name: str | None) -> None:
    """SourceError where the network does not run on a sample of the data, or has fewer outputs than the data has classes."""
    inputs = example_inputs.values() if isinstance(example_inputs, dict) else example_inputs
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            found = outputs(call(network, example_inputs))
    except (RuntimeError, TypeError, ValueError, IndexError) as e:
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs if isinstance(t, Tensor))
        reason = str(e).strip().splitlines()[0]
        raise SourceError(f"the network does not take inputs of shape {shapes}{f' from {name}' if name else ''}: {reason}") from e
    finally:
        network.train(training)
    if isinstance(data, Data) and found and found[0].dim() == 2:
        data.check(found[0].shape[1])


def check_folder(out: str | Path, *, resume: bool) -> Path:
    """A run folder that can be written; an occupied one only to resume in."""
    from gossamer.errors import RunFolderError

    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file: name a folder with --out")
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise RunFolderError(f"{folder} already holds files: name another folder with --out, or continue it with --resume")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        raise RunFolderError(f"{folder} cannot be written: no permission in {parent}")
    return folder


def _judged(data: Any, validation: Any, recipe: Recipe | None) -> tuple[Any, Any]:
    """The data, and batches to judge training on after each epoch: where patience asks for them, taken out of the training split by default."""
    if validation is not None:
        if recipe is not None and not _training(recipe):
            raise RecipeError(
                f"validation data is for steps that train, and {' -> '.join(s.kind for s in recipe.steps)} has none: leave it out"
            )
        if hasattr(validation, "__next__"):
            raise SourceError("the validation data is an iterator, which can be read only once: pass a DataLoader or a list of batches")
        return data, validation.loader("val") if isinstance(validation, Data) else validation
    patient = next((s.kind for s in _training(recipe) if getattr(s, "patience", None) is not None), None)
    if patient is None or (isinstance(data, Data) and data.train is None):
        return data, None
    if not isinstance(data, Data):
        raise RecipeError(f"step {patient}: patience needs validation data, on which nothing is trained: pass validation")
    data, held = data.hold_back()
    return data, held.loader("val")


def trains(step: object) -> bool:
    """Whether a step trains."""
    return isinstance(step, Fit | Qat) or (isinstance(step, Prune | Sparsify) and bool(step.epochs))


def _training(recipe: Recipe | None) -> list[Any]:
    return [s for s in recipe.steps if trains(s)] if recipe else []


def _splits(data: Any, recipe: Recipe | None, seed: int, *, drop_last: bool) -> tuple[str | None, Iterable[Any], Any]:
    trains = _training(recipe)
    if isinstance(data, Data):
        if trains and data.train is None:
            raise RecipeError(
                f"step {trains[0].kind} needs training data, and {data.name} has only one split (use PATH/train and PATH/val)"
            )
        batch_size = trains[0].batch_size if trains else 64
        training = None
        if data.train is not None:
            training = data.loader("train", batch_size=batch_size, shuffle=True, seed=seed, drop_last=drop_last)
        return data.name, data.loader("val", batch_size=32), training
    if isinstance(data, Tensor | dict) or not isinstance(data, Iterable):
        raise SourceError(f"data must be an iterable of batches or a specification such as 'digits', not {type(data).__name__}")
    if hasattr(data, "__next__"):
        raise SourceError("data is an iterator, which can be read only once: pass a DataLoader or a list of batches")
    if not trains and any(_needs_labels(s) for s in (recipe.steps if recipe else ())):
        return None, data, None
    return None, data, data if trains or recipe is None else None


def _needs_labels(step: object) -> bool:
    gradients = ("taylor", "fisher", "snip")
    return getattr(step, "importance", None) in gradients or getattr(step, "criterion", None) in gradients


def _spread(n: int, most: int) -> Sequence[int]:
    """At most ``most`` of ``n`` indices, evenly spread."""
    return range(n) if n <= most else [i * n // most for i in range(most)]


def _example(data: Any, loaded: LoadedModel | nn.Module) -> ExampleInputs:
    if isinstance(data, Data):
        sample = data.val[0]
        return (sample[0].unsqueeze(0),)
    batch = next(iter(data), None)
    if batch is None:
        raise SourceError("the data is empty: not one batch came out of it")
    if isinstance(batch, Tensor):
        return (batch[:1],)
    if isinstance(batch, dict):
        return {k: v[:1] if isinstance(v, Tensor) else v for k, v in batch.items()}
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], dict):
        return {k: v[:1] if isinstance(v, Tensor) else v for k, v in batch[0].items()}
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        inputs = batch[:-1] if len(batch) > 1 else batch
        return tuple(t[:1] for t in inputs)
    raise UsageError(f"cannot tell the inputs from a batch of type {type(batch).__name__}: pass example_inputs")
