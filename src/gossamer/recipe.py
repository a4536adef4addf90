"""Recipes and budgets as typed data, in Python and in YAML, with a published JSON schema."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gossamer.errors import RecipeError, near


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str]


class Prune(_Step):
    """Remove whole channels.

    Exactly one of ``ratio`` (fraction of channels to remove), ``macs``, ``params`` (fractions to keep) and ``latency`` (fraction of the
    original's in ONNX Runtime, or ``"5ms"``). In several ``steps``, with ``epochs`` of distillation from the original after each.
    """

    kind: ClassVar[str] = "prune"
    ratio: float | None = Field(None, gt=0, lt=1)
    macs: float | None = Field(None, gt=0, lt=1)
    params: float | None = Field(None, gt=0, lt=1)
    latency: Annotated[float, Field(gt=0, lt=1)] | str | None = None
    importance: Literal["l1", "l2", "bn_scale", "taylor", "fisher", "fpgm", "activation", "random"] = "l2"
    scope: Literal["global", "layer"] = "global"
    round_to: int = Field(1, ge=1)
    compensate: bool = True
    reestimate_bn: bool = True
    ignore: tuple[str, ...] = ()
    attention: Literal["heads", "head_dim"] = "heads"
    schedule: Literal["one_shot", "iterative", "cubic"] = "one_shot"
    steps: int = Field(1, ge=1)
    epochs: int = Field(0, ge=0)
    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(64, ge=1)
    patience: int | None = Field(None, ge=1)
    monitor: Literal["val_loss", "val_accuracy"] = "val_loss"

    @model_validator(mode="after")
    def _one_target(self) -> Prune:
        if sum(t is not None for t in (self.ratio, self.macs, self.params, self.latency)) != 1:
            raise ValueError("prune needs exactly one of ratio, macs, params and latency")
        if self.schedule == "one_shot" and self.steps != 1:
            raise ValueError("prune in several steps needs schedule: iterative or cubic")
        if self.patience is not None and not self.epochs:
            raise ValueError("patience needs epochs")
        return self


class Factorize(_Step):
    """Replace layers by products of smaller ones.

    Exactly one of ``rank`` (of each group: an integer, a fraction of the full rank, two of either for Tucker-2, or ``evbmf``), ``energy``
    (fraction to keep of the squared singular values), ``macs``, ``params`` (fractions of the network's to keep) and ``latency`` (fraction of
    the original's in ONNX Runtime, or ``"5ms"``). ``method`` is one, or several to choose from; ``auto`` takes what is faster in the runtime.
    """

    kind: ClassVar[str] = "factorize"
    method: Literal["auto", "svd", "spatial_svd", "tucker2", "cp"] | tuple[Literal["svd", "spatial_svd", "tucker2", "cp"], ...] = "auto"
    rank: (
        Annotated[int, Field(ge=1)]
        | Annotated[float, Field(gt=0, lt=1)]
        | Literal["evbmf"]
        | tuple[Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)], ...]
        | None
    ) = None
    energy: float | None = Field(None, gt=0, le=1)
    macs: float | None = Field(None, gt=0, lt=1)
    params: float | None = Field(None, gt=0, lt=1)
    latency: Annotated[float, Field(gt=0, lt=1)] | str | None = None
    ignore: tuple[str, ...] = ()
    round_to: int | None = Field(None, ge=1)
    reestimate_bn: bool = True
    samples: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _one_target(self) -> Factorize:
        if sum(t is not None for t in (self.rank, self.energy, self.macs, self.params, self.latency)) != 1:
            raise ValueError("factorize needs exactly one of rank, energy, macs, params and latency")
        return self


class Decouple(_Step):
    """Replace dense convolutions by cheaper kinds of convolution.

    ``form`` is ``depthwise_separable`` with ``terms`` for each input channel, ``grouped`` with ``groups``, or ``bottleneck`` with a ``width``
    (fraction of the channels inside); or, in place of these sizes, ``macs`` (fraction of the network's to keep).
    """

    kind: ClassVar[str] = "decouple"
    form: Literal["depthwise_separable", "grouped", "bottleneck"] = "depthwise_separable"
    terms: int = Field(1, ge=1)
    groups: int | None = Field(None, ge=2)
    width: float | None = Field(None, gt=0, lt=1)
    macs: float | None = Field(None, gt=0, lt=1)
    ignore: tuple[str, ...] = ()
    reestimate_bn: bool = True
    samples: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _one_size(self) -> Decouple:
        sizes = {"depthwise_separable": self.terms != 1, "grouped": self.groups is not None, "bottleneck": self.width is not None}
        if any(given and (form != self.form or self.macs is not None) for form, given in sizes.items()):
            raise ValueError("decouple takes terms, groups or width, the one of its form, or macs")
        if self.form != "depthwise_separable" and not sizes[self.form] and self.macs is None:
            raise ValueError(f"decouple to form {self.form} needs {'groups' if self.form == 'grouped' else 'width'} or macs")
        return self


class Sparsify(_Step):
    """Set single weights to zero: the coded weights file shrinks; ONNX Runtime gets neither faster nor smaller.

    ``sparsity`` or an N:M ``pattern``, or ``l0`` or ``l1``. With ``epochs`` of distillation from the original the zeros come on a ``schedule``, and
    may ``regrow``; training steps after this one keep the zeros.
    """

    kind: ClassVar[str] = "sparsify"
    sparsity: float | None = Field(None, gt=0, lt=1)
    l0: int | None = Field(None, ge=0)
    l1: Annotated[float, Field(ge=0)] | str | None = None
    pattern: str | None = None
    scope: Literal["layer", "global", "row"] = "layer"
    criterion: Literal["magnitude", "taylor", "fisher", "snip", "wanda", "second_order"] = "magnitude"
    ignore: tuple[str, ...] = ()
    reestimate_bn: bool = True
    schedule: Literal["one_shot", "iterative", "cubic"] = "one_shot"
    regrow: Literal["gradient", "random"] | None = None
    epochs: int = Field(0, ge=0)
    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(64, ge=1)
    patience: int | None = Field(None, ge=1)
    monitor: Literal["val_loss", "val_accuracy"] = "val_loss"

    @model_validator(mode="after")
    def _one_target(self) -> Sparsify:
        regular = self.pattern is not None and ":" in self.pattern
        if sum(t is not None for t in (self.sparsity, self.l0, self.l1)) + regular != 1:
            raise ValueError("sparsify needs exactly one of sparsity, l0, l1 and an N:M pattern")
        if not self.epochs and (self.schedule != "one_shot" or self.regrow is not None):
            raise ValueError("a schedule and regrowth need epochs")
        if self.patience is not None and not self.epochs:
            raise ValueError("patience needs epochs")
        if self.patience is not None and (self.schedule != "one_shot" or self.regrow is not None):
            raise ValueError("patience may bring weights back from before the zeros were final: not with a schedule or regrowth")
        return self


class Cluster(_Step):
    """Weight sharing: every weight takes one of a few values of a codebook, so that the coded weights file shrinks.

    Training steps after this one move the values of the codebook, and weights with them.
    """

    kind: ClassVar[str] = "cluster"
    bits: int = Field(4, ge=2, le=8)
    groups: int = Field(1, ge=1)
    scope: Literal["tensor", "shape", "network"] = "tensor"
    ignore: tuple[str, ...] = ()


class Fit(_Step):
    """Train on the data's own labels.

    With ``patience``, here and in all steps that train, it ends after so many epochs in which ``monitor`` got no better on validation data, with
    the weights of the best one.
    """

    kind: ClassVar[str] = "fit"
    epochs: int = Field(1, ge=1)
    lr: float = Field(1e-3, gt=0)
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw8bit"] = "adamw"
    weight_decay: float = Field(0.01, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    warmup: float = Field(0.05, ge=0, lt=1)
    layer_decay: float = Field(1.0, gt=0, le=1)
    clip: float | None = Field(None, gt=0)
    accumulate: int = Field(1, ge=1)
    ema: float | None = Field(None, gt=0, lt=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    memory_budget: str | None = None
    optimizer_in_backward: bool = False
    batch_size: int = Field(64, ge=1)
    penalty: Literal["bn_l1", "group_lasso"] | None = None
    penalty_weight: float = Field(1e-4, gt=0)
    patience: int | None = Field(None, ge=1)
    monitor: Literal["val_loss", "val_accuracy"] = "val_loss"

    @model_validator(mode="after")
    def _check_memory(self) -> Fit:
        if self.memory_budget is not None:
            quantity(self.memory_budget, SIZE_UNITS, "memory_budget")
        return self


class Distill(Fit):
    """Train on labels and on the original network's outputs: (1-alpha) CE + alpha tau^2 KL, or another loss.

    ``alpha`` and ``tau`` default to those of the loss. ``features`` maps modules of the student to those of the original network.
    """

    kind: ClassVar[str] = "distill"
    loss: Literal["kd", "kd_standardized", "dkd", "dist", "nkd", "self", "regression"] = "kd"
    alpha: float | None = Field(None, ge=0)
    tau: float | None = Field(None, gt=0)
    features: dict[str, str] | tuple[str, ...] = ()
    feature_loss: Literal["fitnet", "attention", "similarity", "rkd", "channelwise"] = "fitnet"
    feature_weight: float = Field(1.0, ge=0)
    teacher_cache: bool = False

    @model_validator(mode="after")
    def _check_alpha(self) -> Distill:
        if self.alpha is not None and self.loss in ("dist", "nkd"):
            raise ValueError(f"loss {self.loss} takes no alpha")
        if self.alpha is not None and self.alpha > 1 and self.loss != "dkd":
            raise ValueError("alpha must be in [0, 1]")
        if self.tau is not None and self.loss == "regression":
            raise ValueError("loss regression takes no tau")
        return self


class Quantize(_Step):
    """Integer weights and activations, calibrated without training.

    ``weight_bits`` may name bits by pattern of weight names (``{"features.0.*": 8, "*": 4}``); ``average_bits`` chooses each weight's.
    """

    kind: ClassVar[str] = "quantize"
    weight_bits: Annotated[int, Field(ge=2, le=8)] | dict[str, Annotated[int, Field(ge=2, le=8)]] = 8
    activation_bits: Literal[8, 16, "auto"] = 8
    average_bits: Annotated[float, Field(ge=2, le=8)] | None = None
    dynamic: bool = False
    weight_only: bool = False
    group_size: Literal[32, 64, 128] = 32
    step: Literal["mse", "minmax"] = "mse"
    granularity: Literal["channel", "tensor"] = "channel"
    observer: Literal["output", "mse", "percentile", "minmax", "moving_average", "entropy"] = "output"
    rounding: Literal["nearest", "gptq", "adaround"] = "nearest"
    equalize: bool = True
    bias_correction: bool | Literal["analytic"] = True
    target: Literal["auto", "avx2", "vnni", "arm"] = "auto"
    prefer: Literal["size", "latency"] = "size"
    ignore: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> Quantize:
        if self.average_bits is not None and self.weight_bits != 8:
            raise ValueError("quantize takes weight_bits or average_bits, not both")
        if self.dynamic and self.weight_only:
            raise ValueError("quantize is dynamic or weight_only, not both")
        if self.dynamic and self.weight_bits != 8:
            raise ValueError("dynamic quantisation has 8 bits")
        if self.weight_only and self.weight_bits not in (4, 8):
            raise ValueError("weight_only takes 4 or 8 weight_bits")
        return self


class Qat(_Step):
    """Integer weights and activations, calibrated and then trained with the rounding in place, taught by the float network so far.

    ``freeze_norms`` is the part of the training after which folded batch norms keep their running statistics.
    """

    kind: ClassVar[str] = "qat"
    weight_bits: int = Field(8, ge=2, le=8)
    activation_bits: int = Field(8, ge=2, le=8)
    target: Literal["auto", "avx2", "vnni", "arm"] = "auto"
    ignore: tuple[str, ...] = ()
    loss: Literal["kd", "kd_standardized", "dkd", "dist", "nkd", "regression"] = "kd"
    alpha: float | None = Field(None, ge=0)
    tau: float | None = Field(None, gt=0)
    freeze_norms: float = Field(0.5, ge=0, le=1)
    epochs: int = Field(1, ge=1)
    lr: float = Field(1e-3, gt=0)
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw8bit"] = "adamw"
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    clip: float | None = Field(None, gt=0)
    accumulate: int = Field(1, ge=1)
    batch_size: int = Field(64, ge=1)
    patience: int | None = Field(None, ge=1)
    monitor: Literal["val_loss", "val_accuracy"] = "val_loss"


Step = Prune | Factorize | Decouple | Sparsify | Cluster | Fit | Distill | Quantize | Qat
_ORDER = ("prune", "factorize", "decouple", "sparsify", "cluster")
STEPS: dict[str, type[_Step]] = {s.kind: s for s in (Prune, Factorize, Decouple, Sparsify, Cluster, Fit, Distill, Quantize, Qat)}


class Budget(BaseModel):
    """What the artefact may cost: fractions of the original when at most 1, absolute with a unit otherwise.

    Examples:
        >>> Budget.parse("latency=0.5,size=1MB,drop=1%")
        Budget(latency=0.5, size='1MB', macs=None, max_drop=0.01)

    Attributes:
        latency: median latency, ``0.5`` or ``"5ms"``.
        size: bytes of the file, ``0.25`` or ``"1MB"`` (10^6 bytes; also ``"kB"``, ``"KiB"``, ``"MiB"``).
        macs: multiply-adds, as a fraction.
        max_drop: accuracy that may be lost, as a fraction of 1 (0.01 is one point).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    latency: float | str | None = None
    size: float | str | None = None
    macs: float | None = Field(None, gt=0, le=1)
    max_drop: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Budget:
        for name, units in (("latency", LATENCY_UNITS), ("size", SIZE_UNITS)):
            value = getattr(self, name)
            if isinstance(value, str):
                quantity(value, units, name)
            elif value is not None and not 0 < value <= 1:
                raise ValueError(
                    f"{name}={value}: a fraction of the original lies in (0, 1]; absolute values carry a unit ({', '.join(units)})"
                )
        return self

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``latency=0.5,drop=1%`` (also ``size=``, ``macs=``; ``max_drop`` is the same as ``drop``)."""
        fields: dict[str, Any] = {}
        for item in filter(None, (t.strip() for t in text.split(","))):
            name, eq, value = item.partition("=")
            name = "max_drop" if name == "drop" else name
            if not eq or name not in cls.model_fields:
                known = ["latency", "size", "macs", "drop"]
                raise RecipeError(f"budget {item!r}: write NAME=VALUE with NAME one of {', '.join(known)}{near(name, known)}")
            percent = re.fullmatch(r"([\d.]+)%", value)
            if percent:
                fields[name] = float(percent[1]) / 100
            else:
                try:
                    fields[name] = float(value)
                except ValueError:
                    fields[name] = value
        if not fields:
            raise RecipeError("the budget is empty: write for example latency=0.5,drop=1%")
        return _validated(cls, fields, "budget")


LATENCY_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
SIZE_UNITS = {"B": 1, "kB": 1000, "KB": 1000, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def quantity(text: str, units: dict[str, float] | dict[str, int], what: str) -> float:
    """``"5ms"`` as a number in the base unit; ValueError where it is none.

    Examples:
        >>> quantity("1.5MB", SIZE_UNITS, "size")
        1500000.0
    """
    m = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)\s*", text)
    if not m or m[2] not in units:
        raise ValueError(f"{what}={text!r}: write a number with a unit ({', '.join(units)})")
    return float(m[1]) * units[m[2]]


class Recipe(BaseModel):
    """A list of steps and, optionally, the budget that the artefact must meet.

    Examples:
        >>> Recipe.parse("steps: [{prune: {macs: 0.7}}, quantize]").steps[1].kind
        'quantize'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: tuple[Annotated[Step, Field(union_mode="left_to_right")], ...]
    budget: Budget | None = None

    @classmethod
    def of(cls, steps: Recipe | list[Any] | tuple[Any, ...] | str | Path) -> Recipe:
        """A recipe from one, a list of steps, or a YAML file."""
        if isinstance(steps, Recipe):
            return steps
        if isinstance(steps, str | Path):
            return cls.load(steps)
        for s in steps:
            if not isinstance(s, _Step):
                raise RecipeError(f"a recipe is a list of steps such as gs.Prune(macs=0.5), not {type(s).__name__}")
        return cls._build(tuple(steps), None)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML recipe; RecipeError where it is missing or not valid."""
        try:
            text = Path(path).read_text()
        except OSError as e:
            raise RecipeError(f"cannot read recipe {path}: {e.strerror}") from None
        return cls.parse(text, where=str(path))

    @classmethod
    def parse(cls, text: str, *, where: str = "recipe") -> Recipe:
        """Read a recipe from YAML text."""
        try:
            raw = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise RecipeError(f"{where} is not YAML: {' '.join(str(e).split())}") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("steps"), list):
            raise RecipeError(f"{where}: a recipe has a list 'steps'; write for example  steps: [quantize]")
        for key in raw:
            if key not in ("steps", "budget"):
                raise RecipeError(f"{where}: unknown key {key!r}{near(str(key), ['steps', 'budget'])}")
        steps = tuple(_step(item, f"{where}: step {i + 1}") for i, item in enumerate(raw["steps"]))
        budget = _validated(Budget, raw["budget"], f"{where}: budget") if raw.get("budget") else None
        return cls._build(steps, budget, where)

    @classmethod
    def _build(cls, steps: tuple[_Step, ...], budget: Budget | None, where: str = "recipe") -> Recipe:
        if not steps:
            raise RecipeError(f"{where} has no steps: name at least one of {', '.join(STEPS)}")
        kinds = [s.kind for s in steps]
        early = next((k for k in kinds[:-1] if k in ("quantize", "qat")), None)
        if early:
            hint = "; qat quantises first, by itself" if kinds[-1] == "qat" else ""
            raise RecipeError(f"{where}: {early} must be the last step; nothing can be trained or cut after it{hint}")
        for first, then in (("prune", _ORDER[1:]), ("factorize", _ORDER[3:]), ("decouple", _ORDER[3:]), ("sparsify", _ORDER[4:])):
            late = next((k for i, k in enumerate(kinds) if k in then and first in kinds[i:]), None)
            if late:
                raise RecipeError(f"{where}: {first} comes before {late}, which it would undo")
        return cls.model_construct(steps=steps, budget=budget)  # type: ignore[arg-type]

    def dump(self) -> str:
        """The recipe as YAML that `parse` reads back."""
        raw: dict[str, Any] = {"steps": [{s.kind: s.model_dump(mode="json")} for s in self.steps]}
        if self.budget:
            raw["budget"] = self.budget.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(raw, sort_keys=False)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of the YAML form, as published in ``docs/recipe.schema.json``."""
        defs = {kind: step.model_json_schema() for kind, step in STEPS.items()}
        one = [
            {"type": "object", "properties": {k: {"$ref": f"#/$defs/{k}"}}, "required": [k], "additionalProperties": False} for k in STEPS
        ]
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "gossamer recipe",
            "type": "object",
            "properties": {
                "steps": {"type": "array", "minItems": 1, "items": {"anyOf": [{"enum": list(STEPS)}, *one]}},
                "budget": {"$ref": "#/$defs/budget"},
            },
            "required": ["steps"],
            "additionalProperties": False,
            "$defs": {**defs, "budget": Budget.model_json_schema()},
        }


def _step(item: Any, where: str) -> _Step:
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, dict) or len(item) != 1:
        raise RecipeError(f"{where}: write one step, for example  - prune: {{macs: 0.5}}")
    ((name, fields),) = item.items()
    if name not in STEPS:
        raise RecipeError(f"{where}: unknown step {name!r}, known are {', '.join(STEPS)}{near(str(name), STEPS)}")
    return _validated(STEPS[name], fields or {}, f"{where} ({name})")


def _validated(cls: type[Any], fields: Any, where: str) -> Any:
    if not isinstance(fields, dict):
        raise RecipeError(f"{where}: write options as NAME: VALUE")
    try:
        return cls(**fields)
    except ValidationError as e:
        first = e.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise RecipeError(
                f"{where}: unknown option {name!r}, known are {', '.join(cls.model_fields)}{near(name, cls.model_fields)}"
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{where}: {name + ': ' if name else ''}{message}") from None
