"""The weights of layers: the matrices and kernels that hold nearly all of a network's numbers. Tables, gains and norms are none."""

from __future__ import annotations

import re

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

_LAYERS = (nn.Linear, _ConvNd, nn.Bilinear, nn.RNNBase, RNNCellBase)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_NO_LAYER = re.compile(r"Embed|Norm(\dd)?$")
"""Classes of a network's own that hold tables or gains, whatever they call them; torch's are among them by name."""


def layer_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of layers by name, in the network's order; a tied one is listed once, under its first name.

    These are floating-point parameters of two or more dimensions: weights of linear layers, convolutions, bilinear and recurrent layers,
    the projections of `torch.nn.MultiheadAttention`, subclasses of all these, what `torch.nn.utils.parametrizations` and weight norm
    compute a weight from, and what a module of another class calls ``weight...``. Embedding tables (tied ones too), norms, gains and
    tokens that are vectors but for dimensions of 1, and all that is called otherwise are none.

    Examples:
        >>> net = nn.ModuleDict({"table": nn.Embedding(9, 4), "rnn": nn.GRU(4, 3), "norm": nn.LayerNorm([2, 3]), "out": nn.Linear(3, 1)})
        >>> list(layer_weights(net))
        ['rnn.weight_ih_l0', 'rnn.weight_hh_l0', 'out.weight']
    """
    chosen: set[int] = set()
    tables: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter) or not parameter.is_floating_point() or parameter.dim() < 2:
                continue
            owner, attribute = module, name
            if isinstance(module, ParametrizationList):
                if name == "original0":  # the magnitudes of weight norm
                    continue
                home, _, attribute = f".{path}".rpartition(".parametrizations.")
                owner = model.get_submodule(home[1:])
            if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
                tables.add(id(parameter))
            elif _is_weight(owner, attribute, parameter):
                chosen.add(id(parameter))
    if isinstance(model, fx.GraphModule):  # a captured graph has no classes of layers left: its operations tell
        read = {node.args[0] for node in model.graph.nodes if "embedding" in str(node.target)}
        tables |= {id(_find(model, str(node.target))) for node in read if isinstance(node, fx.Node) and node.op == "get_attr"}
    return {name: p for name, p in model.named_parameters() if id(p) in chosen - tables}


def other_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating-point parameters of two or more dimensions that `layer_weights` leaves out: tables, gains and kernels under other names.

    Vectors with further dimensions of 1 are not listed.

    Examples:
        >>> list(other_parameters(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))))
        ['0.weight']
    """
    weights = layer_weights(model)
    return {
        name: p
        for name, p in model.named_parameters()
        if name not in weights and not is_lazy(p) and p.is_floating_point() and p.dim() >= 2 and p.numel() > max(p.shape)
    }


def _is_weight(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if name == "weight_g":  # the magnitudes of weight norm
        return False
    if isinstance(owner, _LAYERS):
        return name.startswith("weight")
    if isinstance(owner, nn.MultiheadAttention):
        return name in _ATTENTION
    kind = next((c.__name__ for c in type(owner).__mro__ if not c.__name__.startswith("Parametrized")), "")
    return name.startswith("weight") and not _NO_LAYER.search(kind) and parameter.numel() > max(parameter.shape)


def _find(model: nn.Module, name: str) -> object:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf, None)
