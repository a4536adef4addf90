"""Addresses for ExecuTorch: on plain objects, and in real programs run by its runtime."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

from gossamer.errors import UsageError
from gossamer.memory.executorch import POINTWISE, executorch_memory, plan_addresses
from gossamer.trace.capture import quiet

ADD, EXP = torch.ops.aten.add.out, torch.ops.aten.exp.out


class Spec:
    """What a planner sees of a tensor."""

    def __init__(self, shape, lifetime, *, mem_id=None, base=None, offset=0, dynamic=0, order=None):
        self.shape, self.lifetime, self.mem_id, self.storage_base, self.storage_base_offset = (
            list(shape),
            list(lifetime),
            mem_id,
            base,
            offset,
        )
        self.scalar_type, self.shape_dynamism = torch.float32, dynamic
        self.dim_order = tuple(range(len(shape))) if order is None else order
        self.alignment, self.mem_offset, self.mem_obj_id = 1, None, None

    def realign(self, alignment):
        self.alignment = alignment

    @property
    def allocated_memory(self):
        return -(-4 * torch.Size(self.shape).numel() // self.alignment) * self.alignment


def end(spec):
    return spec.mem_offset + spec.allocated_memory


def apart(specs):
    """No two that live together overlap."""
    for a, b in itertools.combinations(specs, 2):
        if (
            a.mem_id == b.mem_id
            and a.lifetime[0] <= b.lifetime[1]
            and b.lifetime[0] <= a.lifetime[1]
            and a.allocated_memory
            and b.allocated_memory
        ):
            assert end(a) <= b.mem_offset or end(b) <= a.mem_offset


def program(*steps):
    """A graph of operations that write into allocations: (target, reads, output), tensors by name; and the specs, with lifetimes filled in."""
    graph, nodes, specs = fx.Graph(), {}, {}
    for name, spec in steps[0].items():
        nodes[name], specs[name] = graph.placeholder(name), spec
        nodes[name].meta["spec"] = spec
    for target, reads, out, spec in steps[1:]:
        place = graph.call_function(len, ())  # stands for an allocation
        place.meta["spec"] = spec
        nodes[out] = graph.call_function(target, tuple(nodes[r] for r in reads), {"out": place})
        nodes[out].meta["spec"] = specs[out] = spec
    graph.output(nodes[out])
    for now, node in enumerate(graph.nodes):
        for n in (node, *node.all_input_nodes):
            spec = n.meta.get("spec")
            if spec is not None:
                first, last = spec.lifetime
                spec.lifetime = [0 if n.op == "placeholder" else min(first, now), max(last, now)]
    return SimpleNamespace(graph=graph), specs


def spec(*shape, **options):
    return Spec(shape, (10**9, -1), **options)


def test_tensors_that_live_together_lie_apart_and_the_buffer_is_the_bound():
    draw = random.Random(0)
    for _ in range(30):
        specs = []
        for _ in range(draw.randint(1, 14)):
            first = draw.randint(0, 20)
            specs.append(Spec((draw.randint(0, 40),), (first, first + draw.randint(0, 6))))
        module = SimpleNamespace(graph=fx.Graph())
        sizes = plan_addresses(16, specs, module)
        apart(specs)
        live = [sum(s.allocated_memory for s in specs if s.lifetime[0] <= t <= s.lifetime[1]) for t in range(28)]
        assert sizes[0] == 0
        assert max(live) <= sizes[1] <= max(live) * 1.25
        assert sizes[1] == max((end(s) for s in specs), default=0)
        assert all(s.mem_offset % 16 == 0 and s.mem_id == 1 for s in specs)


def test_an_output_lies_on_an_input_that_ends():
    module, specs = program(
        {"x": spec(8, 8)}, (EXP, ["x"], "a", spec(8, 8)), (EXP, ["a"], "b", spec(8, 8)), (ADD, ["b", "x"], "y", spec(8, 8))
    )
    plan_addresses(16, specs.values(), module)
    where = {n: s.mem_offset for n, s in specs.items()}
    assert where["a"] == where["b"] == where["y"] != where["x"]  # x is read at the end
    assert plan_addresses(16, specs.values(), module) == [0, 512]
    assert plan_addresses(16, specs.values(), module, inplace=False) == [0, 768]


@pytest.mark.parametrize(
    ("first", "made"),
    [
        (spec(8, 8), spec(8, 8, dynamic=1)),  # of a size known when it runs
        (spec(8, 8), spec(8, 8, order=(1, 0))),  # elements in another order
        (spec(1, 8), spec(8, 8)),  # read again and again
        (spec(8, 8, mem_id=2), spec(8, 8)),  # in another memory
    ],
    ids=["dynamic", "order", "broadcast", "memory"],
)
def test_an_output_that_is_not_alike_lies_apart(first, made):
    module, specs = program({"x": first}, (EXP, ["x"], "y", made))
    sizes = plan_addresses(16, specs.values(), module)
    apart(specs.values())
    assert sum(sizes) == sum(s.allocated_memory for s in specs.values())


def test_an_operation_that_reads_elsewhere_is_not_done_in_place():
    module, specs = program({"x": spec(8, 8), "w": spec(8, 8)}, (torch.ops.aten.mm.out, ["x", "w"], "y", spec(8, 8)))
    assert plan_addresses(16, specs.values(), module) == [0, 768]
    apart(specs.values())


def test_a_tensor_stored_in_another_lies_in_it():
    base, inner = Spec((64,), (0, 9)), Spec((16,), (2, 3))
    inner.storage_base, inner.storage_base_offset = base, 64
    other = Spec((8,), (0, 9))
    plan_addresses(16, [inner, base, other], SimpleNamespace(graph=fx.Graph()))
    assert inner.mem_offset == base.mem_offset + 64
    apart([base, other])


def test_memory_of_control_flow_and_padding_are_kept_free():
    one = Spec((4,), (0, 1))
    module = SimpleNamespace(graph=fx.Graph(), input_mem_buffer_sizes=[0, 128])
    assert plan_addresses(16, [one], module, None, 64) == [0, 128 + 16 + 64]
    assert one.mem_offset == 128
    assert plan_addresses(16, [], SimpleNamespace(graph=fx.Graph())) == [0, 0]


def test_without_executorch_the_error_says_how_to_install_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "executorch.exir.passes", None)
    with pytest.raises(UsageError, match=r"pip install 'gossamer\[executorch\]'") as e:
        executorch_memory()
    assert "\n" not in str(e.value)


def lowered(net, inputs, planning):
    """An unlowered program: its bytes and its planned buffer."""
    with quiet():
        from executorch.exir import ExecutorchBackendConfig, to_edge

        made = to_edge(torch.export.export(net, inputs)).to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    return made.buffer, made.executorch_program.execution_plan[0].non_const_buffer_sizes[1]


def outputs(program_bytes, inputs, tmp_path):
    from gossamer.exporting.executorch_runtime import Method

    (tmp_path / "net.pte").write_bytes(program_bytes)
    method = Method(tmp_path / "net.pte")
    first = method.run(inputs)
    return first, method.run(inputs)


def greedy():
    with quiet():
        from executorch.exir.passes import MemoryPlanningPass

        return MemoryPlanningPass()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.rows, self.head = nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, x):
        y = torch.relu(self.norm(self.a(x)) + x)
        y = torch.sigmoid(y) * y - x.tanh() / (y.abs() + 1)
        y = self.head(self.rows(y)).softmax(-1)
        return nn.functional.gelu(nn.functional.hardtanh(y.exp(), 0, 2)), y.mean((2, 3))


def test_a_program_runs_in_the_smaller_buffer_to_the_same_bytes(tmp_path):
    pytest.importorskip("executorch", reason="executorch is not installed")
    torch.manual_seed(0)
    net, inputs = Residual().eval(), (torch.randn(1, 8, 12, 12),)
    theirs, large = lowered(net, inputs, greedy())
    ours, small = lowered(net, inputs, executorch_memory())
    _, between = lowered(net, inputs, executorch_memory(inplace=False))
    assert small < between <= large
    wanted, _ = outputs(theirs, inputs, tmp_path)
    found, again = outputs(ours, inputs, tmp_path)
    for a, b, c in zip(wanted, found, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)
    with torch.no_grad():
        assert torch.allclose(found[1], net(*inputs)[1], atol=1e-5)


class One(nn.Module):
    """One operation between two that are none of those that can be done in place."""

    def __init__(self, name):
        super().__init__()
        self.name, self.w = name, nn.Parameter(torch.rand(6), requires_grad=False)

    def forward(self, x, y):
        x, y = x.flip(1) + 0, y.flip(1)
        match self.name:
            case "_native_batch_norm_legit_no_training":
                x = nn.functional.batch_norm(x, self.w, self.w + 1, self.w, self.w)
            case "native_layer_norm":
                x = nn.functional.layer_norm(x, (5,), self.w[:5], self.w[:5])
            case "_softmax":
                x = x.softmax(-1)
            case "hardtanh" | "elu" | "gelu" | "leaky_relu":
                x = getattr(nn.functional, self.name)(x)
            case "clamp":
                x = x.clamp(0.2, 0.8)
            case "pow":
                x = x**3
            case "add" | "div" | "maximum" | "minimum" | "mul" | "sub":
                x = getattr(torch, self.name)(x, y)
            case name:
                x = getattr(torch, name)(x)
        return x.flip(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(n.removeprefix("aten::") for n in POINTWISE))
def test_each_kernel_of_the_list_gives_the_same_in_place(name, tmp_path):
    pytest.importorskip("executorch", reason="executorch is not installed")
    torch.manual_seed(0)
    net, inputs = One(name).eval(), (torch.rand(3, 6, 5) + 0.1, torch.rand(3, 6, 5) + 0.1)
    ours, small = lowered(net, inputs, executorch_memory())
    theirs, large = lowered(net, inputs, executorch_memory(inplace=False))
    assert small <= large
    wanted, _ = outputs(theirs, inputs, tmp_path)
    found, again = outputs(ours, inputs, tmp_path)
    assert torch.equal(wanted[0], found[0])
    assert torch.equal(found[0], again[0])
    with torch.no_grad():
        assert torch.allclose(found[0], net(*inputs), atol=1e-5)
