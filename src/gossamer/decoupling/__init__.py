"""Dense convolutions as depthwise-separable terms, grouped convolutions with learned groups, or bottlenecks, fitted to their inputs."""

from gossamer.decoupling.decouple import decouple
from gossamer.decoupling.fitting import Fitted, decouple_layer, fit_layer
from gossamer.decoupling.forms import FORMS, check, convolutions, cost, exchange, most_terms, parts_of, sizes_of, skeleton, unfit
from gossamer.decoupling.partition import part

__all__ = [
    "FORMS",
    "Fitted",
    "check",
    "convolutions",
    "cost",
    "decouple",
    "decouple_layer",
    "exchange",
    "fit_layer",
    "most_terms",
    "part",
    "parts_of",
    "sizes_of",
    "skeleton",
    "unfit",
]
