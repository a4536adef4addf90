"""Layers that others stand in for: which layers of a network can be exchanged, the form of their weights, stand-ins as rows of plain layers."""

from gossamer.exchange.finding import Place, check_finite, find_places
from gossamer.exchange.forms import Dims, Factor, Layer, bare, canonical, dims, put, row, walk

__all__ = ["Dims", "Factor", "Layer", "Place", "bare", "canonical", "check_finite", "dims", "find_places", "put", "row", "walk"]
