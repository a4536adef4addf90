"""The plan: what was done to a network, as plain data. Applied to a copy, saved as JSON, loaded again."""

from gossamer.plan.application import apply_structure, replace_module
from gossamer.plan.edits import (
    AdaptAttention,
    AddBias,
    AsGraph,
    Decouple,
    Edit,
    Factorize,
    InputSpec,
    Keep,
    Mask,
    QuantizeActivation,
    QuantizeGroups,
    QuantizeInput,
    QuantizeWeight,
    RescaleCall,
    SetAttribute,
    Share,
    StructureEdit,
)
from gossamer.plan.plan import Plan, input_specs
from gossamer.plan.weights import pack_mask, snap, unpack_mask

__all__ = [
    "AdaptAttention",
    "AddBias",
    "AsGraph",
    "Decouple",
    "Edit",
    "Factorize",
    "InputSpec",
    "Keep",
    "Mask",
    "Plan",
    "QuantizeActivation",
    "QuantizeGroups",
    "QuantizeInput",
    "QuantizeWeight",
    "RescaleCall",
    "SetAttribute",
    "Share",
    "StructureEdit",
    "apply_structure",
    "input_specs",
    "pack_mask",
    "replace_module",
    "snap",
    "unpack_mask",
]
