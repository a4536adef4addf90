"""The plan: what was done to a network, as plain data. Applied to a copy, saved as JSON, loaded again."""

from gossamer.plan.application import apply_structure
from gossamer.plan.edits import (
    AdaptAttention,
    AddBias,
    AsGraph,
    Edit,
    InputSpec,
    Keep,
    QuantizeActivation,
    QuantizeWeight,
    RescaleCall,
    SetAttribute,
    StructureEdit,
)
from gossamer.plan.plan import Plan, input_specs

__all__ = [
    "AdaptAttention",
    "AddBias",
    "AsGraph",
    "Edit",
    "InputSpec",
    "Keep",
    "Plan",
    "QuantizeActivation",
    "QuantizeWeight",
    "RescaleCall",
    "SetAttribute",
    "StructureEdit",
    "apply_structure",
    "input_specs",
]
