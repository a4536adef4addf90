"""Networks and batches that tests train in one process and in several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gossamer as gs
from gossamer.models import mobilenet_v2


class SmallViT(nn.Module):
    """Patches of 4, two blocks of torch's own encoder, a class token."""

    def __init__(self, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        make = lambda: nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)  # noqa: E731
        self.blocks = nn.ModuleList([make() for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "vit":
        return SmallViT()
    if kind == "mlp":
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 4))
    net = mobilenet_v2(num_classes=5, width_mult=0.25, small=True, dropout=0.0)
    for name, module in net.named_modules():  # untrained, weights 1e-7 apart are 0.9 apart after 20 steps; with these norms 6e-7
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
            if name.endswith("conv.3"):
                nn.init.constant_(module.weight, 0.1)
    return net


def images(n: int = 77, side: int = 16) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 3, side, side, generator=g), torch.randint(5, (n,), generator=g))


def loader(n: int = 77, batch_size: int = 8, workers: int = 0) -> DataLoader[Any]:
    """77 samples in batches of 8: the last one has 5, of which two processes take 3 and 2."""
    own = torch.Generator().manual_seed(1)
    return DataLoader(images(n), batch_size=batch_size, shuffle=True, generator=own, num_workers=workers)


def rows(n: int = 38, batch_size: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 6, generator=g), torch.randint(4, (n,), generator=g)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def trained(kind: str, parallel: gs.Parallel | None, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """State dict and history after 20 steps, or what ``options`` say."""
    data: Any = rows() if kind == "mlp" else loader()
    val: Any = rows(14, 5) if kind == "mlp" else DataLoader(images(23), batch_size=7)
    defaults: dict[str, Any] = {"epochs": 2, "lr": 1e-3, "optimizer": "sgd", "val": val, "metrics": ["top5"], "parallel": parallel}
    result = gs.fit(options.pop("model", None) or network(kind), options.pop("data", None) or data, **(defaults | options))
    model = result.model
    return model.state_dict(), [{k: v for k, v in r.items() if k != "seconds"} for r in getattr(result, "history", ())]


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two state dicts of the same names."""
    assert list(a) == list(b)
    return max((float((x.double() - b[n].double()).abs().max()) for n, x in a.items() if x.numel()), default=0.0)


def assert_alike(ours: Any, reference: Any, tolerance: float = 1e-5) -> None:
    """Parameters, buffers and every number of the history."""
    assert furthest(ours[0], reference[0]) <= tolerance
    for mine, theirs in zip(ours[1], reference[1], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == value or abs(mine[key] - value) <= max(tolerance, 1e-6), key  # metrics are float32


def assert_same(states: list[dict[str, Tensor]]) -> None:
    """The same bits in every process."""
    for other in states[1:]:
        assert all(torch.equal(x, other[n]) for n, x in states[0].items())
