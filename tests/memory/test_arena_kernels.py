"""Every kernel against torch's own operation, and what it takes from the allocator."""

from __future__ import annotations

import pytest
import torch
from networks import block, livened
from torch import nn
from torch.nn import functional as F
from watching import taken

import gossamer as gs
from gossamer.memory.kernels import ALLOCATION_FREE, KERNEL_BYTES
from gossamer.memory.kernels.pointwise import COMPARISONS, POINTWISE

IMAGE, ROWS = (2, 48, 40, 36), (4, 96, 64)


class Of(nn.Module):
    """A function as a network."""

    def __init__(self, run, *parts: nn.Module) -> None:
        super().__init__()
        self.run, self.parts = run, nn.ModuleList(parts)

    def forward(self, *inputs):
        return self.run(*self.parts, *inputs)


NORM = livened(nn.BatchNorm2d(48))
CASES = {
    "affine": (Of(lambda n, x: n(torch.sigmoid(x)) * 2, NORM), IMAGE),
    "attention": (Of(lambda x: F.scaled_dot_product_attention(x, x + 1, x * 2)), (2, 4, 96, 16)),
    "attention, causal, two queries a key": (
        Of(lambda x: F.scaled_dot_product_attention(x, x[:, :2] + 1, x[:, 2:], is_causal=True, enable_gqa=True)),
        (2, 4, 96, 16),
    ),
    "avg_pool": (Of(lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)), IMAGE),
    "avg_pool, adaptive": (Of(lambda x: F.adaptive_avg_pool2d(x, (10, 6))), IMAGE),
    "convolution": (nn.Conv2d(48, 32, 3, 2, 1), IMAGE),
    "convolution, groups": (nn.Conv2d(48, 96, (3, 1), padding="same", groups=4, dilation=(2, 1)), IMAGE),
    "convolution, one dimension": (nn.Conv1d(96, 64, 5, 2, 2), ROWS),
    "convolution, three dimensions": (nn.Conv3d(2, 8, 3, padding=1), (1, 2, 12, 20, 20)),
    "convolution, depthwise": (nn.Conv2d(48, 48, 5, 1, 2, groups=48, bias=False), IMAGE),
    "copy": (Of(lambda x: x.permute(0, 2, 3, 1).reshape(2, -1)), IMAGE),
    "copy, roll": (Of(lambda x: torch.roll(x, (3, -5), (2, 3))), IMAGE),
    "copy, concatenation of rows": (Of(lambda x: torch.cat([x[:, :3], x * 2, x], 1)), ROWS),
    "copy, stack": (Of(lambda x: torch.stack([x, x + 1], -1)), ROWS),
    "copy, assignment": (Of(lambda x: torch.slice_scatter(x, x[:, ::3] * 2, 1, 0, None, 3)), ROWS),
    "fill": (Of(lambda x: F.pad(x, (1, 2, -3, 4), value=0.5)), IMAGE),
    "index_select": (Of(lambda x: x[:, torch.tensor([3, 1, 3])]), ROWS),
    "matrix": (nn.Linear(64, 80), ROWS),
    "matrix, batches": (Of(lambda x: x @ x.transpose(1, 2)), ROWS),
    "max_pool": (nn.MaxPool2d(3, 2, 1), IMAGE),
    "max_pool, dilated": (nn.MaxPool2d((2, 3), 1, (0, 1), (3, 2), ceil_mode=True), IMAGE),
    "norm": (nn.LayerNorm(64), ROWS),
    "norm, groups": (livened(nn.GroupNorm(6, 48)), IMAGE),
    "norm, plain": (nn.LayerNorm((96, 64), elementwise_affine=False), ROWS),
    "patches": (
        nn.Sequential(block(48, 32, 3, 2), block(32, 64, 3, 2), nn.Conv2d(64, 4, 1), nn.Flatten(), nn.Linear(360, 3)).eval(),
        IMAGE,
    ),
    "pointwise": (Of(lambda x: torch.where(x > 0, x.clamp(0.1, 0.9), 1 - x) / (2 + torch.tanh(x).abs())), ROWS),
    "reduce": (Of(lambda x: x.mean((2, 3)) + x.amax((2, 3)) + x.sum((2, 3)) + torch.linalg.vector_norm(x, dim=(2, 3))), IMAGE),
    "softmax": (Of(lambda x: F.softmax(x, -1)), ROWS),
    "softmax, over channels": (Of(lambda x: F.softmax(x * 2, 1)), IMAGE),
    "strips": (livened(nn.Sequential(nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 12, 1))), (1, 48, 160, 130)),
    "upsample": (Of(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), IMAGE),
    "upsample, nearest": (Of(lambda x: F.interpolate(x, size=(50, 41))), IMAGE),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "," in n else n for n in CASES])
def test_a_kernel_computes_what_torch_does_and_allocates_next_to_nothing(name):
    net, shape = CASES[name]
    net.eval()
    x = torch.randn(shape)
    kernel = name.partition(",")[0]
    plan = gs.plan_memory(net, (x,), patches=(2, 2) if kernel == "patches" else None)
    assert kernel in {s.kernel for s in plan.program.steps}
    assert not plan.outside
    compiled = plan.compile()
    with torch.no_grad():
        wanted = net(x)
    torch.testing.assert_close(compiled(x), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled.run_poisoned(x), wanted, atol=1e-5, rtol=1e-5)
    (arena,) = compiled._pool[plan.signature]
    for calls in arena.calls:
        for call in calls:
            assert taken(call).peak <= KERNEL_BYTES


def test_every_kernel_has_a_case():
    assert {name.partition(",")[0] for name in CASES} == ALLOCATION_FREE


BINARY = {"add", "sub", "mul", "div", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "rsub"}
EXTRA = {"pow": (2.0,), "clamp": (0.2, 0.7), "clamp_min": (0.3,), "clamp_max": (0.6,), "hardtanh": (0.1, 0.8), "leaky_relu": (0.2,)}


@pytest.mark.parametrize("name", sorted(set(POINTWISE) - {"where", "masked_fill", "addcmul"}))
def test_an_operation_element_by_element_writes_where_it_is_told(name):
    x, y = torch.rand(1, 32, 24, 24) + 0.1, torch.rand(1, 32, 24, 24) + 0.1
    arguments = (x, y) if name in BINARY else (x, *EXTRA.get(name, ()))
    operation = getattr(torch.ops.aten, name)
    wanted = operation(*arguments)
    out = torch.empty_like(x, dtype=torch.bool if name in COMPARISONS else x.dtype)
    address = out.data_ptr()
    assert taken(lambda: POINTWISE[name](out, *arguments)).peak <= 64
    torch.testing.assert_close(out, wanted)
    assert out.data_ptr() == address
    if name not in COMPARISONS:
        POINTWISE[name](x, *arguments)
        torch.testing.assert_close(x, wanted)
