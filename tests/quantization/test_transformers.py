"""Encoders of images and of text: what runs in integers, how far from float, and that the file is small."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.exporting import runtime_ops


class Encoder(nn.Module):
    """Two blocks of attention and GELU, on embedded words with a mask, or on patches of an image."""

    def __init__(self, *, words: bool, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = words
        self.start = nn.Embedding(300, width) if words else nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.2 * torch.randn(16, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))
        self.head = nn.Linear(width, 7)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = (self.start(x) if self.words else self.start(x).flatten(2).mT) + self.places
        bias = None if mask is None else (1 - mask[:, None, None].float()) * -1e9
        for i in range(2):
            q, k, v = self.qkv[i](self.norms[2 * i](h)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            h = h + self.out[i](F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
            h = h + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](h))))
        return self.head(h.mean(1))


def inputs(*, words: bool, n: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    if not words:
        return (torch.randn(n, 3, 16, 16, generator=generator),)
    mask = torch.ones(n, 16, dtype=torch.long)
    mask[0, 9:] = 0
    return torch.randint(0, 300, (n, 16), generator=generator), mask


def db(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))


@pytest.mark.parametrize(
    ("words", "how"),
    [
        (True, "dynamic"),
        (False, "calibrated"),
        *(pytest.param(w, how, marks=pytest.mark.slow) for w, how in [(False, "dynamic"), (True, "calibrated")]),
        *(pytest.param(w, "weight_only", marks=pytest.mark.slow) for w in (True, False)),
    ],
)
def test_linear_layers_run_in_integers_and_the_rest_is_named(words, how, tmp_path):
    net, x = Encoder(words=words).eval(), inputs(words=words)
    options = {"calibration": [x]} if how == "calibrated" else {how: True}
    result = gs.quantize(net, x, **options)
    with torch.no_grad():
        assert db(net(*x), result.model(*x)) > 25
    assert any("scaled_dot_product_attention" in n for n in result.notes)
    file = gs.export(result, tmp_path / "net.onnx", calibration=[x])
    assert file.sqnr_db > 30
    kernels = runtime_ops(file.path)
    if how == "weight_only":
        assert kernels["MatMulNBits"] == 9
    elif how == "dynamic":
        assert kernels["DynamicQuantizeMatMul"] + kernels["MatMulIntegerToFloat"] == 9
    else:
        assert sum(n for k, n in kernels.items() if k in ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm")) == 9
    state = result.model.state_dict()
    if words:
        assert state["start.weight"].dtype == torch.int8
    assert torch.equal(gs.load(result.save(tmp_path / "run"), Encoder(words=words))(*x), result.model(*x))


def test_an_encoder_of_words_trains_with_its_table_rounded():
    net, x = Encoder(words=True).eval(), inputs(words=True)
    data = [(*inputs(words=True, n=n), torch.arange(n) % 7) for n in (5, 6, 7)]
    trained = gs.qat(net, data, example_inputs=x, weight_bits=2, epochs=20, lr=1e-3, loss="regression", alpha=1.0)
    with torch.no_grad():
        calibrated = gs.quantize(net, x, calibration=[b[:2] for b in data], weight_bits=2)
        wanted = [torch.cat([m(*b[:2]) for b in data]) for m in (net, calibrated.model, trained.model)]
    assert db(wanted[0], wanted[2]) > db(wanted[0], wanted[1])
    assert trained.model.state_dict()["start.weight"].dtype == torch.int8
