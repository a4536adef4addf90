"""In-place operations rewritten ahead of torch's own pass, against that pass alone."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision
from torch import nn

from gossamer.trace.capture import capture, quiet
from gossamer.trace.inplace import without_inplace


class Seen(nn.Module):
    """Values that are seen under another name when they are overwritten, or after."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        view_before = (a := x + y).view(-1)
        a.relu_()
        b = (x * 2).view(-1)
        b.relu_()
        kept = (c := x - y).mul(3)
        c.relu_().add_(1)
        d = nn.functional.dropout(e := x + 2, 0.5, self.training)
        d.mul_(2)
        whole = (f := x * y).flatten()
        f.add_(x, alpha=2).mul_(f)
        wide = (x + 1).half().add_(y)
        last = (g := x * 3).transpose(0, 1)
        g.transpose(0, 1).add_(1)
        return view_before, a, b, kept, c, d, e, whole, f, wide, last, g


def code(exported: torch.export.ExportedProgram) -> str:
    names: dict[str, str] = {}
    return re.sub(r"\b[a-z_0-9]+_\d+\b", lambda m: names.setdefault(m.group(0), f"v{len(names)}"), exported.graph_module.code)


def exported(net: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    shared = torch.export.Dim("batch")
    with quiet(), torch.no_grad():
        return torch.export.export(net.eval(), inputs, dynamic_shapes=tuple({0: shared} for _ in inputs), strict=False)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_the_graph_is_the_one_that_torch_gives(name):
    x = (torch.randn(2, 3, 64, 64),)
    net = torchvision.models.get_model(name, weights=None)
    usual = code(exported(net, x).run_decompositions({}))
    program = exported(net, x)
    assert without_inplace(program.graph) > 20
    assert code(program.run_decompositions({})) == usual


def test_what_is_seen_elsewhere_stays_right():
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    program = exported(Seen(), inputs)
    before = sum(n.op == "call_function" and str(n.target).split(".")[1].endswith("_") for n in program.graph.nodes)
    changed = without_inplace(program.graph)
    assert 0 < changed < before
    with torch.no_grad():
        wanted, got = Seen().eval()(*inputs), program.run_decompositions({}).module()(*inputs)
        again = capture(Seen(), inputs)(*inputs)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(wanted, got, again, strict=True))
