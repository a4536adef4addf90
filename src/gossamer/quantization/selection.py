"""What dynamic and weight-only quantisation touch: linear layers, embeddings, recurrent layers; and why all else stays float."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from gossamer.errors import SelectorError, near
from gossamer.quantization.graph import CONVOLUTION, LINEAR, TRANSPOSED, WEIGHTED, is_float, module_path, op_name

RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
PRODUCT = {"matmul", "bmm", "einsum", "scaled_dot_product_attention", "bilinear"}


@dataclass
class Selection:
    """Nodes by the name of the weight that they read.

    Attributes:
        linear: linear layers with a constant weight.
        tables: embeddings.
        lstms: LSTM layers, by the name of their first weight.
        notes: one line for each kind of thing that stays float, with the reason.
    """

    linear: dict[str, list[fx.Node]] = field(default_factory=dict)
    tables: dict[str, list[fx.Node]] = field(default_factory=dict)
    lstms: dict[str, fx.Node] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to quantise."""
        return not (self.linear or self.tables or self.lstms)


def select(module: fx.GraphModule, ignore: Iterable[str], *, recurrent: bool) -> Selection:
    """Choose layers of a canonical graph.

    Args:
        module: what `canonical` returned.
        ignore: patterns (``fnmatch``) of module paths or weight names; those stay float.
        recurrent: whether LSTM layers are chosen too.

    Raises:
        SelectorError: a pattern matches no layer.
    """
    found, ignored, patterns = Selection(), dict[str, None](), tuple(ignore)
    used: set[str] = set()
    known: dict[str, None] = {}
    stay: dict[str, dict[str, None]] = {}

    def left_alone(node: fx.Node, name: str) -> bool:
        known.update({module_path(node): None, name: None})
        hits = matched(patterns, node, name)
        used.update(hits)
        if hits:
            ignored[name] = None
        return bool(hits)

    def keep(reason: str, node: fx.Node) -> None:
        stay.setdefault(reason, {})[f"{module_path(node)} ({op_name(node)})".lstrip()] = None

    for node in module.graph.nodes:
        op = op_name(node)
        position = 0 if op == "embedding" else 1
        if op in LINEAR | {"embedding"}:
            weight = node.args[position]
            if not (isinstance(weight, fx.Node) and weight.op == "get_attr" and is_float(weight)):
                keep("stay float, their weight depends on the input", node)
            elif not left_alone(node, str(weight.target)):
                (found.tables if op == "embedding" else found.linear).setdefault(str(weight.target), []).append(node)
        elif op == "lstm" and recurrent and _plain(node):
            if not left_alone(node, str(node.args[2][0].target)):
                found.lstms[str(node.args[2][0].target)] = node
        elif op in RECURRENT:
            keep("stay float, ONNX Runtime has no integer kernel for them that this version writes", node)
        elif op in CONVOLUTION | TRANSPOSED:
            keep("stay float, only linear layers, embeddings and LSTMs are quantised without calibration", node)
        elif op in PRODUCT:
            keep("stay float, products of two activations", node)
    for pattern in patterns:
        if pattern not in used:
            raise SelectorError(f"ignore pattern {pattern!r} matches no linear, embedding or recurrent layer{near(pattern, known)}")
    for name in ignored:  # a shared weight is one tensor: ignored once is ignored
        found.linear.pop(name, None)
        found.tables.pop(name, None)
    for name in [n for n in {**found.linear, **found.tables} if read_otherwise(module, n)]:
        keep("stay float, their weight is read in another way too", (found.linear.pop(name, []) + found.tables.pop(name, []))[0])
    found.notes = [f"{reason}: {', '.join(names)}" for reason, names in stay.items()]
    if ignored:
        found.notes.append(f"stay float, ignored: {', '.join(ignored)}")
    return found


def _plain(node: fx.Node) -> bool:
    """Whether an LSTM's weights are constants, without projections, on a sequence that is not packed."""
    weights = node.args[2]
    if not isinstance(weights, list | tuple) or str(node.target) != "aten.lstm.input":
        return False
    per = 4 if node.args[3] else 2
    layers = int(node.args[4]) * (2 if node.args[7] else 1)  # type: ignore[arg-type]
    return len(weights) == per * layers and all(isinstance(w, fx.Node) and w.op == "get_attr" and is_float(w) for w in weights)


def matched(patterns: Iterable[str], node: fx.Node, name: str) -> list[str]:
    """The patterns that a layer's module path or weight name matches."""
    path = module_path(node)
    return [p for p in patterns if any(fnmatch.fnmatchcase(n, p) for n in (path, name)) or path.startswith(p + ".")]


def read_otherwise(module: fx.GraphModule, name: str) -> bool:
    """Whether something but linear layers and embeddings reads a weight."""
    readers = [u for n in module.graph.nodes if n.op == "get_attr" and n.target == name for u in n.users]
    return any(op_name(u) not in (WEIGHTED & LINEAR) | {"embedding"} for u in readers)
