"""Factorised layers: SVD, spatial SVD, Tucker-2 and CP of linear layers and convolutions, fitted to their inputs, ranks allocated to a budget."""

from gossamer.exchange import dims
from gossamer.lowrank.cp import CPFit, cp_als
from gossamer.lowrank.evbmf import evbmf_rank
from gossamer.lowrank.factorize import factorize
from gossamer.lowrank.fitting import Fitted, factorize_layer, fit_layer
from gossamer.lowrank.layers import Site, find_sites
from gossamer.lowrank.structure import METHODS, check_ranks, factors_of, full_ranks, skeleton

__all__ = [
    "METHODS",
    "CPFit",
    "Fitted",
    "Site",
    "check_ranks",
    "cp_als",
    "dims",
    "evbmf_rank",
    "factorize",
    "factorize_layer",
    "factors_of",
    "find_sites",
    "fit_layer",
    "full_ranks",
    "skeleton",
]
