"""Every edit that a plan can hold, as plain data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class BaseEdit(BaseModel):
    """What all edits have: fields that are known, and do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Keep(BaseEdit):
    """Keep some channels of one dimension of a parameter or buffer.

    ``index`` is a list of positions, or, for a grouped weight, one list per equal block of dimension 0 (all of the same length).
    """

    kind: Literal["keep"] = "keep"
    tensor: str
    dim: int
    index: tuple[int, ...] | tuple[tuple[int, ...], ...]


class SetAttribute(BaseEdit):
    """Set what a module declares about its own size (``in_channels``, ``groups``, ``num_heads``, ...)."""

    kind: Literal["set"] = "set"
    module: str
    name: str
    value: int | tuple[int, ...]


class AddBias(BaseEdit):
    """Give a convolution or linear layer that has no bias a bias of zeros, to hold what compensation or folding adds."""

    kind: Literal["add_bias"] = "add_bias"
    module: str
    size: int


class RescaleCall(BaseEdit):
    """Rescale numbers that a module's code passes to torch: in the ``ordinal``-th call of ``call`` in its forward, leaf ``position`` times ``up / down``.

    ``ratios`` lists ``(position, up, down)``.
    """

    kind: Literal["rescale_call"] = "rescale_call"
    module: str
    call: str
    ordinal: int
    ratios: tuple[tuple[int, int | float, int | float], ...]


class AdaptAttention(BaseEdit):
    """Let a `torch.nn.MultiheadAttention` have any number of heads, whatever its width; its parameters keep their names."""

    kind: Literal["adapt_attention"] = "adapt_attention"
    module: str


class Factorize(BaseEdit):
    """Replace a linear layer or convolution, wherever it is registered, by a sequence of smaller ones (see `gossamer.lowrank.factors_of`).

    ``ranks`` is one number, or two for Tucker-2 (of the inputs, of the outputs), of each group; ``bias`` says whether the last layer has a bias.
    """

    kind: Literal["factorize"] = "factorize"
    module: str
    method: Literal["svd", "spatial_svd", "tucker2", "cp"]
    ranks: tuple[int, ...]
    bias: bool


class Decouple(BaseEdit):
    """Replace a convolution, wherever it is registered, by depthwise-separable terms, a grouped convolution or a bottleneck.

    ``sizes`` are terms, groups, or inner inputs and outputs, of each group that there is; ``bias`` says whether the last convolution has one.
    ``inputs`` and ``outputs`` are the channels in the order of a grouped one's groups, empty where they stay in place. ``norm`` is the batch norm
    that takes what it gives, where that comes before the order back: tools fold it into the convolution then.
    """

    kind: Literal["decouple"] = "decouple"
    module: str
    form: Literal["depthwise_separable", "grouped", "bottleneck"]
    sizes: tuple[int, ...]
    bias: bool
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    norm: str | None = None


class Mask(BaseEdit):
    """Set entries of a weight to zero; where the network is trained afterwards, they stay zero.

    ``kept`` has one bit for each entry, row by row, 1 where it stays (see `pack_mask`); ``nonzeros`` counts them.
    """

    kind: Literal["mask"] = "mask"
    tensor: str
    shape: tuple[int, ...]
    nonzeros: int
    kept: str


class Share(BaseEdit):
    """Give every entry of some weights the nearest value of a codebook; where the network is trained afterwards, entries move together.

    ``codebooks`` holds one ascending list of values for each equal block of dimension 0; all ``tensors`` use the same. With ``zeros``,
    entries that are exactly zero stay zero and take no value of the codebook.
    """

    kind: Literal["share"] = "share"
    tensors: tuple[str, ...]
    bits: int
    codebooks: tuple[tuple[float, ...], ...]
    zeros: bool


class AsGraph(BaseEdit):
    """Write the network down as one graph of tensor operations, its sizes as constants (`torch.export`); parameters keep their names."""

    kind: Literal["as_graph"] = "as_graph"


class QuantizeWeight(BaseEdit):
    """Store a weight as integers: ``w = (q - zero_point) * step``, along ``axis`` (None: one step for the tensor)."""

    kind: Literal["quantize_weight"] = "quantize_weight"
    tensor: str
    bits: int
    axis: int | None
    signed: bool
    steps: tuple[float, ...]
    zero_points: tuple[int, ...]


class QuantizeActivation(BaseEdit):
    """Round an activation to ``(clamp(round(x / step) + zero_point) - zero_point) * step`` where it is computed.

    ``point`` names it: ``"module.path:op:n"`` is the n-th call of ``op`` inside that module, ``"input:0"`` the first graph input.
    """

    kind: Literal["quantize_activation"] = "quantize_activation"
    point: str
    bits: int
    signed: bool
    step: float
    zero_point: int


class QuantizeInput(BaseEdit):
    """Round what flows into the layers of a weight when they run: ``bits`` bits that cover the range it has then.

    Where there are ``factors``, one for each input feature, it is divided by them first, and the weight is multiplied by them.
    """

    kind: Literal["quantize_input"] = "quantize_input"
    tensor: str
    bits: Literal[8] = 8
    factors: tuple[float, ...] = ()


class QuantizeGroups(BaseEdit):
    """Store the weight of linear layers as integers, ``w = q * step``, with a step for each ``group`` of input features.

    ``steps`` packs float32 of shape (outputs, ceil(inputs / group)), see `gossamer.quantization.grouped.pack_steps`.
    """

    kind: Literal["quantize_groups"] = "quantize_groups"
    tensor: str
    bits: int
    group: int
    steps: str


Edit = Annotated[
    Keep
    | SetAttribute
    | RescaleCall
    | AdaptAttention
    | AddBias
    | Factorize
    | Decouple
    | Mask
    | Share
    | AsGraph
    | QuantizeWeight
    | QuantizeActivation
    | QuantizeInput
    | QuantizeGroups,
    Field(discriminator="kind"),
]
StructureEdit = Keep | SetAttribute | RescaleCall | AdaptAttention | AddBias | Factorize | Decouple | Mask | Share
QUANTIZE = (QuantizeWeight, QuantizeActivation, QuantizeInput, QuantizeGroups)


class InputSpec(BaseEdit):
    """Shape and dtype of one example input, so that a plan can be applied without data. ``name`` is set for keyword inputs."""

    shape: tuple[int, ...]
    dtype: str
    name: str | None = None
