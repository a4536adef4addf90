"""Networks whose code holds sizes of its own are cut all the same, run at other batch sizes, in train mode, reloaded and exported."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.plan import AdaptAttention, Plan, RescaleCall, SetAttribute
from gossamer.surgery import cut
from gossamer.trace import trace


class Attention(nn.Module):
    """Head count and size from the constructor, in a reshape, a scale and a view with the batch multiplied in."""

    def __init__(self, dim=32, heads=4, style="attribute"):
        super().__init__()
        self.num_heads, self.style, self.width = heads, style, dim
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        y = self.norm(x)
        if self.style == "attribute":
            q, k, v = self.qkv(y).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if self.style == "numbers":
            q, k, v = self.qkv(y).view(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4)
            attn = (q @ k.transpose(-2, -1) / math.sqrt(c // 4)).softmax(-1)
            return x + self.proj((attn @ v).transpose(1, 2).reshape(b, n, 32))
        if self.style == "batch":
            q, k, v = self.qkv(y).split(32, dim=-1)
            q, k, v = (t.view(b, n, 4, c // 4).transpose(1, 2).reshape(b * 4, n, c // 4) for t in (q, k, v))
            out = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * (c // 4) ** -0.5).softmax(-1), v)
            return x + self.proj(out.view(b, 4, n, -1).transpose(1, 2).reshape(b, n, -1))
        q, k, v = self.qkv(y).chunk(3, -1)  # slices at fixed positions
        out = [self._head(q[..., 8 * i : 8 * i + 8], k[..., 8 * i : 8 * i + 8], v[..., 8 * i : 8 * i + 8]) for i in range(4)]
        return x + self.proj(torch.cat(out, -1))

    def _head(self, q, k, v):
        return (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v


class Net(nn.Module):
    def __init__(self, style):
        super().__init__()
        self.embed, self.attention, self.again = nn.Linear(6, 32), Attention(style=style), Attention(style=style)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.again(self.attention(self.embed(x))).mean(1))


def expected_when_heads_go(net: nn.Module, x: torch.Tensor, gone: dict[str, list[int]]) -> torch.Tensor:
    """The original, with the columns of the projection that read a removed head set to zero."""
    import copy

    zeroed = copy.deepcopy(net)
    with torch.no_grad():
        for name, heads in gone.items():
            for h in heads:
                zeroed.get_submodule(name).proj.weight[:, 8 * h : 8 * h + 8] = 0
        return zeroed(x)


@pytest.mark.parametrize("style", ["attribute", "numbers", "batch"])
def test_heads_leave_an_attention_that_counts_them_itself(style):
    torch.manual_seed(0)
    net, inputs = Net(style).eval(), (torch.randn(2, 5, 6),)
    traced = trace(net, inputs)
    removed = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    heads = {g.name: g for g in traced.channels.groups if g.width == 24}
    assert set(heads) == {"attention.qkv", "again.qkv"}
    removed[heads["attention.qkv"].classes[[1, 3]]] = True
    removed[heads["again.qkv"].classes[[0]]] = True
    made = cut(net, traced, removed)
    assert made.proof.holds
    assert not made.notes
    assert made.model.attention.qkv.out_features == 48
    assert made.model.again.proj.in_features == 24
    for batch in (1, 2, 7):
        x = torch.randn(batch, 5, 6)
        torch.testing.assert_close(made.model(x), expected_when_heads_go(net, x, {"attention": [1, 3], "again": [0]}), rtol=1e-4, atol=1e-5)
    made.model.train()(torch.randn(3, 5, 6)).sum().backward()


@pytest.mark.parametrize("style", ["attribute", "numbers", "batch"])
def test_positions_leave_all_heads_and_the_scale_stays(style):
    """Oracle: the original whose query, key and value rows at those positions are zero, so that they add nothing to any score."""
    import copy

    torch.manual_seed(0)
    net, inputs = Net(style).eval(), (torch.randn(2, 5, 6),)
    traced = trace(net, inputs, attention="head_dim")
    group = next(g for g in traced.channels.groups if g.name == "attention.qkv")
    assert (len(group.classes), group.width) == (8, 12)
    removed = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    removed[group.classes[[0, 3, 6]]] = True
    made = cut(net, traced, removed)
    assert not made.notes
    assert made.model.attention.qkv.out_features == 60
    zeroed = copy.deepcopy(net)
    rows = [part * 32 + head * 8 + d for part in range(3) for head in range(4) for d in (0, 3, 6)]
    with torch.no_grad():
        zeroed.attention.qkv.weight[rows] = 0
        zeroed.attention.qkv.bias[rows] = 0
    x = torch.randn(7, 5, 6)
    torch.testing.assert_close(made.model(x), zeroed(x), rtol=1e-4, atol=1e-5)


def test_slices_at_fixed_positions_follow_what_is_left_of_each():
    torch.manual_seed(0)
    net, inputs = Net("slices").eval(), (torch.randn(2, 5, 6),)
    result = gs.prune(net, inputs, ratio=0.5)
    assert result.proof.holds or result.proof.inexact
    assert result.model.attention.qkv.out_features < 96
    assert any(isinstance(e, RescaleCall) and e.call == "__getitem__" for e in result.plan)
    result.model(torch.randn(7, 5, 6))


def test_a_size_that_the_code_insists_on_is_found_in_an_attribute():
    class Groups(nn.Module):
        def __init__(self, channels, groups):
            super().__init__()
            self.weight, self.groups = nn.Parameter(torch.rand(channels)), groups

        def forward(self, x):
            b, c, h, w = x.shape
            assert c == 4 * self.groups
            y = x.view(b, self.groups, c // self.groups, h, w)
            return (y / (1 + y.abs().amax((2, 3, 4), keepdim=True))).view(b, c, h, w) * self.weight.view(1, -1, 1, 1)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), Groups(16, 4), nn.Conv2d(16, 8, 3), Groups(8, 2), nn.Conv2d(8, 2, 3)).eval()
    inputs = (torch.randn(2, 3, 12, 12),)
    traced = trace(net, inputs)
    removed = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    for group in traced.channels.groups:
        assert group.width == 4
        removed[group.classes[:1]] = True
    made = cut(net, traced, removed)
    assert (made.model[1].groups, made.model[3].groups) == (3, 1)
    assert not made.notes
    assert made.proof.holds


def test_an_attribute_is_preferred_to_a_number_in_a_call():
    net, inputs = Net("attribute").eval(), (torch.randn(2, 5, 6),)
    result = gs.prune(net, inputs, ratio=0.5, scope="layer")
    assert {(e.module, e.name, e.value) for e in result.plan if isinstance(e, SetAttribute) and "heads" in e.name} == {
        ("attention", "num_heads", 2),
        ("again", "num_heads", 2),
    }
    assert not [e for e in result.plan if isinstance(e, RescaleCall)]


def test_a_whole_number_that_scales_stays_what_it_was():
    """Divided by the head size as a whole number, read off the width: half the width must not change the scores."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.q, self.head = nn.Linear(6, 32), nn.Linear(32, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.embed(x)
            return self.head(self.q(x) / (x.shape[-1] // 4))

    torch.manual_seed(0)
    net, inputs = Net().eval(), (torch.randn(2, 6),)
    result = gs.prune(net, inputs, ratio=0.5, ignore=["q"])
    assert result.model.embed.out_features == 16
    assert result.proof.holds
    assert [e.ratios[0][1:] for e in result.plan if isinstance(e, RescaleCall)] == [(8, 4)]


def test_the_width_goes_too_and_the_scale_stays():
    net, inputs = Net("numbers").eval(), (torch.randn(2, 5, 6),)
    result = gs.prune(net, inputs, ratio=0.5, scope="layer")
    assert result.model.embed.out_features == 16
    scales = [e for e in result.plan if isinstance(e, RescaleCall) and e.call in ("div", "__truediv__", "true_divide")]
    assert len(scales) == 2  # the width is read off the input, and is no longer four times the head size
    assert scales[0].ratios[0][1] == pytest.approx(math.sqrt(8))


def test_a_network_with_rescaled_calls_reloads_bit_for_bit_and_exports(tmp_path):
    torch.manual_seed(0)
    net, inputs = Net("batch").eval(), (torch.randn(2, 5, 6),)
    result = gs.prune(net, inputs, ratio=0.5, scope="layer")
    assert any(isinstance(e, RescaleCall) for e in result.plan)
    assert Plan.model_validate_json(result.plan.model_dump_json()) == result.plan
    assert "rescale" in str(result.plan)
    folder = result.save(tmp_path / "run")
    again = gs.load(folder, model=Net("batch"))
    assert torch.equal(again.eval()(*inputs), result.model.eval()(*inputs))
    exported = gs.export(result, tmp_path / "net.onnx")
    assert exported is not None


@pytest.mark.parametrize("style", ["attribute", "numbers", "batch"])
def test_as_a_graph_it_computes_the_same_at_any_batch_size_and_reloads(style, tmp_path):
    from torch import fx

    torch.manual_seed(0)
    net, inputs = Net(style).eval(), (torch.randn(2, 5, 6),)
    module = gs.prune(net, inputs, ratio=0.5, scope="layer")
    graph = gs.prune(net, inputs, ratio=0.5, scope="layer", form="graph")
    assert isinstance(graph.model, fx.GraphModule)
    assert not isinstance(module.model, fx.GraphModule)
    more = torch.randn(7, 5, 6)
    assert torch.allclose(graph.model(more), module.model(more), atol=1e-6)
    sizes = {n.target for n in graph.model.graph.nodes if n.op == "call_function"}
    assert any("view" in str(t) or "reshape" in str(t) for t in sizes)
    again = gs.load(graph.save(tmp_path / "run"), model=Net(style))
    assert isinstance(again, fx.GraphModule)
    assert torch.equal(again(more), graph.model(more))
    assert "as graph" in str(graph.plan)
    assert gs.quantize(graph.model, inputs, calibration=[more]).model(more).shape == (7, *graph.model(more).shape[1:])


def test_pruning_twice_composes():
    torch.manual_seed(0)
    net, inputs = Net("batch").eval(), (torch.randn(2, 5, 6),)
    once = gs.prune(net, inputs, ratio=0.25, scope="layer")
    twice = gs.prune(once.model, inputs, ratio=0.4, scope="layer")
    assert twice.proof.holds
    assert twice.model.attention.qkv.out_features < once.model.attention.qkv.out_features < 96
    twice.model(torch.randn(5, 5, 6))
    loaded = (once.plan + twice.plan).apply(net)
    loaded.load_state_dict(twice.model.state_dict())
    assert torch.equal(loaded(*inputs), twice.model(*inputs))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_heads_leave_torchs_own_attention(batch_first, kind):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.m = nn.Linear(6, 16), nn.Linear(5, 12)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, **({"kdim": 12, "vdim": 12} if kind == "cross" else {}))
            self.head = nn.Linear(16, 3)

        def forward(self, x, memory):
            x, memory = self.a(x), self.m(memory)
            out, _ = self.attention(x, memory, memory) if kind == "cross" else self.attention(x, x, x)
            return self.head(out + x)

    torch.manual_seed(0)
    net, inputs = Block().eval(), (torch.randn(2, 5, 6), torch.randn(2, 5, 5))
    result = gs.prune(net, inputs, ratio=0.5, scope="layer")
    assert result.proof.holds
    assert [e.module for e in result.plan if isinstance(e, AdaptAttention)] == ["attention"]
    assert result.model.attention.num_heads == 2
    assert result.model.attention.out_proj.in_features == 8
    result.model.train()(torch.randn(3, 4, 6), torch.randn(3, 4, 5))


def test_an_encoder_layer_does_not_take_the_fused_path_once_heads_are_gone():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    net = nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)).eval()
    inputs = (torch.randn(2, 5, 6),)
    result = gs.prune(net, inputs, ratio=0.5, scope="layer")
    assert result.model[1].layers[0].self_attn.in_proj_weight.shape == (24, 8)
    with torch.no_grad():  # gradients off and eval mode: where the fused path would be taken
        off = result.model(*inputs)
    on = result.model(*inputs)
    torch.testing.assert_close(off, on, rtol=1e-5, atol=1e-6)


def test_lookups_kept_between_passes_follow_the_cut():
    class Cached(nn.Module):
        """Keeps its bias table for eval mode, as levit does."""

        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.heads = nn.Linear(16, 48), nn.Linear(16, 3), 4
            self.table, self.kept = nn.Parameter(torch.randn(4, 9)), None
            self.register_buffer("index", torch.randint(0, 9, (5, 5)))

        def train(self, mode=True):
            super().train(mode)
            if mode:
                self.kept = None
            return self

        def forward(self, x):
            if self.training or self.kept is None:
                self.kept = self.table[:, self.index]
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, v, self.kept).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net = Cached().eval()
    inputs = (torch.randn(2, 5, 16),)
    with torch.no_grad():
        net(*inputs)
    result = gs.prune(net, inputs, ratio=0.5)
    assert result.proof.holds
    assert result.model.table.shape == (2, 9)
    result.model.eval()(*inputs)


def test_a_buffer_filled_part_by_part():
    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 16, 1), nn.Conv2d(24, 4, 1)

        def forward(self, x):
            y = x.new_zeros(x.shape[0], 24, *x.shape[2:])
            y[:, :8] = self.a(x)
            y[:, 8:] = self.b(x)
            return self.c(y)

    torch.manual_seed(0)
    net, inputs = Filled().eval(), (torch.randn(2, 3, 4, 4),)
    result = gs.prune(net, inputs, ratio=0.5, scope="layer")
    assert result.proof.holds
    assert result.proof.difference < 1e-6
    assert (result.model.a.out_channels, result.model.b.out_channels, result.model.c.in_channels) == (4, 8, 12)
    result.model(torch.randn(5, 3, 6, 6))


class SharedKeys(nn.Module):
    """Four query heads of 8 that share two key and value heads, in each way that this is written."""

    def __init__(self, style):
        super().__init__()
        self.style = style
        self.q, self.k, self.v, self.proj = nn.Linear(6, 32), nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(32, 3)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.style == "repeat":
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        if self.style == "expand":
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.style == "fused")
        return self.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("style", ["fused", "repeat", "expand"])
def test_queries_leave_with_the_key_head_that_they_share(style):
    torch.manual_seed(0)
    net, inputs = SharedKeys(style).eval(), (torch.randn(2, 5, 6),)
    with torch.no_grad():
        net.k.weight[:8] *= 0.01  # the first key head, and with it query heads 0 and 1, matter least
        net.v.weight[:8] *= 0.01
        net.q.weight[:16] *= 0.01
        net.proj.weight[:, :16] *= 0.01
    result = gs.prune(net, inputs, ratio=0.5)
    assert result.proof.holds
    assert (result.model.q.out_features, result.model.k.out_features, result.model.v.out_features) == (16, 8, 8)
    x = torch.randn(3, 7, 6)
    with torch.no_grad():
        net.proj.weight[:, :16] = 0
        torch.testing.assert_close(result.model(x), net(x), rtol=1e-5, atol=1e-6)


def test_a_module_that_checks_its_input_against_an_attribute():
    class Patches(nn.Module):
        def __init__(self, channels, out):
            super().__init__()
            self.num_channels, self.projection = channels, nn.Conv2d(channels, out, 2, stride=2)

        def forward(self, x):
            if x.shape[1] != self.num_channels:
                raise ValueError("the number of channels is not the one in the configuration")
            return self.projection(x).flatten(2).transpose(1, 2)

    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second, self.head = Patches(3, 12), nn.LayerNorm(12), Patches(12, 20), nn.Linear(20, 2)

        def forward(self, x):
            b, _, h, w = x.shape
            y = self.norm(self.first(x)).transpose(1, 2).reshape(b, -1, h // 2, w // 2).contiguous(memory_format=torch.channels_last)
            return self.head(self.second(y).mean(1))

    torch.manual_seed(0)
    net = Stages().eval()
    result = gs.prune(net, (torch.randn(1, 3, 16, 16),), ratio=0.5)
    assert result.model.second.num_channels == result.model.second.projection.in_channels < 12
    assert not [n for n in result.notes if n.startswith("left in")]
    assert result.model(torch.randn(2, 3, 32, 32)).shape == (2, 2)


def test_a_table_of_positions_added_inside_the_fused_attention():
    class Windowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.table = nn.Linear(6, 96), nn.Linear(32, 3), nn.Parameter(torch.randn(9, 4))
            self.register_buffer("index", torch.arange(25) % 9)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            bias = self.table[self.index].view(5, 5, -1).permute(2, 0, 1)[None]
            return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net = Windowed().eval()
    result = gs.prune(net, (torch.randn(2, 5, 6),), ratio=0.5)
    assert result.model.table.shape == (9, 2)
    assert result.proof.holds
    assert not [n for n in result.notes if n.startswith("left in")]


def test_an_attribute_that_equals_a_size_by_chance_stays():
    class Reduced(nn.Module):
        """Two heads, and keys at half the positions: the same number, another meaning."""

        def __init__(self):
            super().__init__()
            self.reduction, self.num_heads = 2, 2
            self.reduce, self.q, self.kv, self.proj = nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(8, 32), nn.Linear(16, 3)

        def forward(self, x):
            b, n, c = x.shape
            q = self.q(x).view(b, n, self.num_heads, 8).transpose(1, 2)
            if self.reduction > 1:
                x = self.reduce(x.reshape(b, n // 2, 2 * c))
            k, v = (t.view(b, -1, self.num_heads, 8).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return self.proj(out.reshape(b, n, self.num_heads * 8))

    torch.manual_seed(0)
    result = gs.prune(Reduced().eval(), (torch.randn(1, 6, 8),), ratio=0.5, ignore=["reduce"])
    assert (result.model.reduction, result.model.num_heads, result.model.proj.in_features) == (2, 1, 8)
    assert result.proof.holds


def test_queries_that_are_normalised():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.out = nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(24, 3)

        def forward(self, x):
            q, k = F.normalize(self.q(x), dim=-1), self.k(x)
            return self.out(q * k + q)

    torch.manual_seed(0)
    result = gs.prune(Normalised().eval(), (torch.randn(2, 5, 6),), ratio=0.5)
    assert result.model.out.in_features == 12
    assert "q" in result.proof.inexact and not [n for n in result.notes if n.startswith("left in")]


def test_as_many_heads_as_samples_are_not_taken_for_the_batch():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True).eval()
    for batch in (3, 4):
        traced = trace(block, (torch.randn(batch, 5, 16),))
        heads = next(g for g in traced.channels.groups if g.name == "self_attn")
        removed = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
        removed[heads.classes[:2]] = True
        made = cut(block, traced, removed)
        assert made.model.self_attn.num_heads == 2 and not made.frozen.any(), batch
        assert made.proof.holds
