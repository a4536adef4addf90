"""Networks for tests of memory planning."""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.memory import MemoryPlan
from gossamer.memory import plan as planning
from gossamer.models import mobilenet_v2


def livened(model: nn.Module) -> nn.Module:
    """Eval mode, with batch norms that do something."""
    torch.manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.2, 0.2)
            m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.uniform_(-0.3, 0.3)
    return model.eval()


def again(plan: MemoryPlan, inputs: tuple, **changes) -> MemoryPlan:
    """Another plan of the same captured network."""
    return planning._plan(dataclasses.replace(plan._source, **changes), list(inputs))


def block(i: int, o: int, k: int = 3, s: int = 1, g: int = 1, d: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, s, d * (k // 2), d, g, bias=False), nn.BatchNorm2d(o), act or nn.ReLU())


class Dense(nn.Module):
    """Growing concatenations, normed before each convolution."""

    def __init__(self, layers: int = 4, growth: int = 8) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + growth * i) for i in range(layers))
        self.thin = nn.ModuleList(nn.Conv2d(16 + growth * i, 32, 1, bias=False) for i in range(layers))
        self.convs = nn.ModuleList(nn.Conv2d(32, growth, 3, padding=1, bias=False) for i in range(layers))
        self.head = nn.Linear(16 + growth * layers, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for norm, thin, conv in zip(self.norms, self.thin, self.convs, strict=True):
            parts.append(conv(thin(F.relu(norm(torch.cat(parts, 1))))))
        return self.head(torch.cat(parts, 1).mean((2, 3)))


class Attention(nn.Module):
    """A transformer layer with the operations that vision transformers use."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch, self.qkv, self.out = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        n, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(n, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width))
        return (x + self.second(F.gelu(self.first(self.norms[1](x)))))[:, 0]


class Branches(nn.Module):
    """An early wide branch that the given order holds while the narrow ones run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = block(3, 8), block(8, 96, 1), block(96, 4, 1)
        self.other, self.thin = block(8, 96, 3), block(96, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = self.wide(x), self.other(x)
        return self.narrow(a) + self.thin(b)


class Random(nn.Module):
    """A random graph of convolutions, sums, products, concatenations, splits and pooling, all of one size."""

    def __init__(self, seed: int, nodes: int = 14) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.stem = block(3, 8)
        self.plan: list[tuple[str, int, int]] = []
        self.convs = nn.ModuleList()
        for i in range(nodes):
            kind = ["conv", "pointwise", "depthwise", "add", "mul", "cat", "split", "pool", "act"][
                int(torch.randint(9, (), generator=generator))
            ]
            a, b = (int(torch.randint(max(0, i - 4), i + 1, (), generator=generator)) for _ in range(2))
            self.plan.append((kind, a, b))
            self.convs.append(
                {"pointwise": block(8, 8, 1), "depthwise": block(8, 8, 3, g=8, act=nn.Hardswish()), "cat": nn.Conv2d(16, 8, 1)}.get(
                    kind, block(8, 8)
                )
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [self.stem(x)]
        for (kind, i, j), conv in zip(self.plan, self.convs, strict=True):
            a, b = values[i], values[j]
            if kind in ("conv", "pointwise", "depthwise"):
                values.append(conv(a))
            elif kind == "cat":
                values.append(conv(torch.cat([a, b], 1)))
            elif kind == "split":
                first, second = a.chunk(2, 1)
                values.append(torch.cat([torch.sigmoid(second), first], 1))
            elif kind == "pool":
                values.append(F.max_pool2d(a, 3, 1, 1) + F.avg_pool2d(b, 3, 1, 1))
            else:
                values.append({"add": lambda a, b: a + b, "mul": lambda a, b: a * torch.tanh(b), "act": lambda a, b: F.gelu(a)}[kind](a, b))
        return values[-1], torch.stack(values[-3:]).sum(0)


@cache
def planned_mobilenet():
    """MobileNetV2, an input, and its plan: made once."""
    torch.manual_seed(0)
    net, x = livened(mobilenet_v2()), torch.randn(1, 3, 224, 224)
    return net, x, gs.plan_memory(net, (x,))
