"""From a captured graph to steps: each node runs on tensors without memory, and what it would compute becomes steps.

A dispatch mode sees the primitive operations that composite ones fall into. Views stay views because tensors without memory
have strides like any others; strides are those that the kernels will write.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.errors import UsageError
from gossamer.memory.lowering.strides import channels_last_strides, contiguous, dense_strides
from gossamer.memory.program import Argument, Program, Step, View


class Recorder(TorchDispatchMode):
    """Collects steps.

    ``homes`` (from `joining`): key of an allocation -> key, shape and strides of the buffer that a concatenation reads, and the offset in it.
    """

    def __init__(self, homes: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...], int]] | None = None) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.sizes: dict[int, int] = {}
        self.keys: dict[int, str] = {}
        self.node = self.place = ""
        self._homes = dict(homes or {})
        self._ids: dict[int, int] = {}
        self.bases: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._slabs: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}
        self._constants: dict[int, Tensor] = {}

    # --- tensors without memory

    def allocate(self, shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        """A new dense buffer, or its home in a slab that a concatenation reads."""
        shape, stride = tuple(shape), tuple(stride)
        n = self._count.get(self.node, 0)
        self._count[self.node] = n + 1
        key = f"{self.node}:{n}"
        home = self._homes.get(key)
        if home is None:
            return self._base(key, shape, stride, dtype)
        slab_key, slab_shape, slab_stride, offset = home
        if slab_key not in self._slabs:
            self._slabs[slab_key] = self._base(slab_key, slab_shape, slab_stride, dtype)
        return self._slabs[slab_key].as_strided(shape, slab_stride, offset)

    def _base(self, key: str, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new buffer: its number, its name, and a tensor without memory that stands for it."""
        base = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        number = len(self.bases)
        self.bases.append(base)  # keeps the storage's address from being used again
        self._ids[base.untyped_storage()._cdata] = number
        self.sizes[number] = torch.Size(shape).numel() * dtype.itemsize
        self.keys[number] = key
        return base

    def like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A new buffer of a tensor's shape, dense, with its dimensions in the same order in memory."""
        return self.allocate(tensor.shape, dense_strides(tensor), dtype or tensor.dtype)

    def view(self, tensor: Any) -> Argument:
        """A step's argument: a view of a buffer, or a constant as it is."""
        if tensor is None or not isinstance(tensor, Tensor) or not tensor.is_meta:
            return tensor
        constant = self._constants.get(tensor.untyped_storage()._cdata)
        if constant is not None:
            return constant.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        number = self._ids[tensor.untyped_storage()._cdata]
        return View(number, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def key(self, tensor: Tensor) -> str:
        """The name of a tensor's buffer."""
        return self.keys[self._ids[tensor.untyped_storage()._cdata]]

    def without_memory(self, value: Any) -> Any:
        """A constant as a tensor without memory, for operations that want all their arguments on one device."""
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        real = value.detach().contiguous()
        bare = torch.empty(real.shape, dtype=real.dtype, device="meta")
        self._kept.append(bare)
        self._constants[bare.untyped_storage()._cdata] = real.view(-1)
        return bare

    def emit(self, kernel: str, reads: Any, writes: Any, /, **rest: Any) -> None:
        """Add a step; ``into``, ``scratch`` and ``outside`` are the step's, everything else becomes its options."""
        own = {k: rest.pop(k) for k in ("into", "scratch", "outside") if k in rest}
        written = tuple(self.view(w) for w in writes)
        self.steps.append(Step(self.place or self.node, kernel, tuple(map(self.view, reads)), written, options=rest, **own))  # type: ignore[arg-type]

    # --- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record an operation on tensors in the arena; views and constants are computed as they are."""
        from gossamer.memory.lowering.rules import primitive

        kwargs = kwargs or {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(t.is_meta for t in tensors) or (_is_view(func) and func is not torch.ops.aten.view.default):
            return func(*args, **kwargs)
        return primitive(self, func, args, kwargs)


def _is_view(func: Any) -> bool:
    """Whether an operation returns views of its inputs, from its schema."""
    if func.namespace != "aten":
        return False
    written = [r.alias_info for r in func._schema.returns]
    return bool(written) and all(a is not None and not a.is_write for a in written)


def record(graph: fx.GraphModule, inputs: list[Any], *, homes: Any = None) -> Program:
    """The steps of a captured graph for inputs of these sizes.

    Args:
        graph: what `gossamer.trace.capture.capture` returned.
        inputs: one item for each input of the graph, tensors or plain values.
        homes: where buffers that a concatenation reads have their place; see `gossamer.memory.joining`.
    """
    from gossamer.memory.lowering.rules import op_name

    recorder = Recorder(homes)
    env: dict[fx.Node, Any] = {}
    places: list[View | None] = []
    rest = iter(inputs)
    outputs: Any = None
    with torch.no_grad():
        for node in graph.graph.nodes:
            recorder.node, recorder.place = node.name, _module_path(node)
            if node.op == "placeholder":
                value = next(rest)
                env[node] = _input(recorder, node, value) if isinstance(value, Tensor) else value
                place = recorder.view(env[node]) if isinstance(value, Tensor) else None
                places.append(place if isinstance(place, View) and node.users else None)
            elif node.op == "get_attr":
                env[node] = _attribute(graph, str(node.target)).detach()
            elif node.op == "output":
                outputs = fx.node.map_arg(node.args[0], env.__getitem__)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = _run(recorder, node, op_name(node.target), args, kwargs)
    leaves = pytree.tree_leaves(outputs)
    return Program(
        tuple(recorder.steps),
        recorder.sizes,
        tuple(places),
        tuple(recorder.view(v) if isinstance(v, Tensor) else v for v in leaves),
        recorder.keys,
        {recorder.keys[i]: (tuple(b.shape), b.stride()) for i, b in enumerate(recorder.bases)},
    )


ONE_DEVICE = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


def _run(recorder: Recorder, node: fx.Node, name: str, args: Any, kwargs: Any) -> Any:
    """The outcome of one node: by a rule for the whole operation, or by recording what it decomposes into."""
    from gossamer.memory.lowering.rules import NODES

    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if node.target is operator.getitem or not any(t.is_meta for t in tensors):
        assert callable(node.target)
        return node.target(*args, **kwargs)
    rule = NODES.get(name)
    if rule is not None:
        result = rule(recorder, *args, **kwargs)
        if result is not NotImplemented:
            return result
    assert callable(node.target)
    if name in ONE_DEVICE:
        args, kwargs = pytree.tree_map(recorder.without_memory, (args, kwargs))
    with recorder:
        return node.target(*args, **kwargs)


def _input(recorder: Recorder, node: fx.Node, value: Tensor) -> Tensor:
    """An input's buffer: channels-last where a convolution, a pooling or a norm reads it."""
    from gossamer.memory.lowering.rules import SPATIAL, op_name

    if value.is_sparse or value.is_quantized or value.is_complex():
        raise UsageError(f"input {node.name!r} is {value.layout}, {value.dtype}: memory is planned for dense real tensors")
    last = value.dim() in (4, 5) and any(op_name(u.target) in SPATIAL for u in node.users)
    stride = channels_last_strides(value.shape) if last else contiguous(value.shape)
    return recorder.allocate(value.shape, stride, value.dtype)


def _module_path(node: fx.Node) -> str:
    """Path of the module whose forward made the call, ``""`` for the network's own."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    return re.sub(r"@\d+", "", path.removeprefix("L['self']").lstrip("."))


def _attribute(module: torch.nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    path, _, leaf = name.rpartition(".")
    found = getattr(module.get_submodule(path), leaf)
    assert isinstance(found, Tensor)
    return found
