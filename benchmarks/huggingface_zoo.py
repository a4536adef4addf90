"""Structured pruning of Hugging Face's architectures with no configuration: one small network of each kind, random weights.

    pip install transformers
    python benchmarks/huggingface_zoo.py                 # all of them, as a table
    python benchmarks/huggingface_zoo.py --only bert vit

Every network loses half of its channels (`gs.prune(model, inputs, ratio=0.5)`), is held against the zeroed original, and runs again at another batch size.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from typing import Any

import torch

import gossamer as gs
from gossamer.errors import GossamerError

_TEXT = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_DECODER = _TEXT | {"use_cache": False}
_SHARED = _DECODER | {"num_key_value_heads": 2}  # grouped queries
_VIT = {"image_size": 64, "patch_size": 16, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
_SOUND = _TEXT | {"num_hidden_layers": 1, "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
_SOUND |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
_FOUR = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
_SEQ = {
    "vocab_size": 100,
    "d_model": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
_SEQ |= {"encoder_layers": 1, "decoder_layers": 1, "use_cache": False}

# Name -> class, configuration class, its arguments, kind of input.
ZOO: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT, "text"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 100, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
        "text",
    ),
    "roberta": ("RobertaModel", "RobertaConfig", _TEXT, "text"),
    "albert": ("AlbertModel", "AlbertConfig", _TEXT | {"embedding_size": 32}, "text"),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", _TEXT | {"embedding_size": 32}, "text"),
    "mobilebert": (
        "MobileBertModel",
        "MobileBertConfig",
        _TEXT | {"embedding_size": 32, "intermediate_size": 64, "intra_bottleneck_size": 32},
        "text",
    ),
    "deberta_v2": ("DebertaV2Model", "DebertaV2Config", _TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, "text"),
    "squeezebert": ("SqueezeBertModel", "SqueezeBertConfig", _TEXT | {"embedding_size": 64}, "text"),
    "funnel": (
        "FunnelBaseModel",
        "FunnelConfig",
        {"vocab_size": 100, "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128, "block_sizes": [1, 1]},
        "text",
    ),
    "convbert": ("ConvBertModel", "ConvBertConfig", _TEXT | {"embedding_size": 64}, "text"),
    "mpnet": ("MPNetModel", "MPNetConfig", _TEXT, "text"),
    "xlnet": ("XLNetModel", "XLNetConfig", {"vocab_size": 100, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}, "text"),
    "t5 encoder": (
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": 100, "d_model": 64, "d_kv": 16, "num_layers": 2, "num_heads": 4, "d_ff": 128},
        "text",
    ),
    "bart": ("BartModel", "BartConfig", _SEQ, "text"),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False},
        "tokens",
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128, "use_cache": False}
        | {"word_embed_proj_dim": 64},
        "text",
    ),
    "bloom": ("BloomModel", "BloomConfig", {"vocab_size": 100, "hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False}, "text"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _SHARED, "tokens"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _SHARED, "text"),
    "mistral": ("MistralForCausalLM", "MistralConfig", _SHARED, "text"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _DECODER | {"num_key_value_heads": 1, "head_dim": 16}, "text"),
    "phi": ("PhiForCausalLM", "PhiConfig", _DECODER, "text"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _SHARED | {"num_local_experts": 4}, "text"),
    "mamba": ("MambaModel", "MambaConfig", {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "use_cache": False}, "tokens"),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT, "image"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _VIT, "image"),
    "beit": ("BeitForImageClassification", "BeitConfig", _VIT, "image"),
    "vit_mae": ("ViTMAEModel", "ViTMAEConfig", _VIT | {"mask_ratio": 0.0}, "image"),
    "dinov2": ("Dinov2Model", "Dinov2Config", {k: v for k, v in _VIT.items() if k != "intermediate_size"}, "image"),
    "clip vision": ("CLIPVisionModel", "CLIPVisionConfig", _VIT, "image"),
    "siglip vision": ("SiglipVisionModel", "SiglipVisionConfig", _VIT, "image"),
    "yolos": ("YolosModel", "YolosConfig", _VIT | {"image_size": [64, 64], "num_detection_tokens": 5}, "image"),
    "dpt": (
        "DPTForDepthEstimation",
        "DPTConfig",
        _VIT
        | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [32] * 4, "fusion_hidden_size": 32}
        | {"is_hybrid": False},
        "image",
    ),
    "swin": ("SwinForImageClassification", "SwinConfig", _SWIN, "image"),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", _SWIN, "image"),
    "donut swin": ("DonutSwinModel", "DonutSwinConfig", _SWIN, "image"),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"},
        "image",
    ),
    "regnet": (
        "RegNetForImageClassification",
        "RegNetConfig",
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "groups_width": 16},
        "image",
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2},
        "image",
    ),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.35, "image_size": 64}, "image"),
    "mobilevit": ("MobileViTForImageClassification", "MobileViTConfig", {"image_size": 64}, "image"),
    "mobilevitv2": ("MobileViTV2ForImageClassification", "MobileViTV2Config", {"image_size": 64, "width_multiplier": 0.5}, "image"),
    "poolformer": ("PoolFormerForImageClassification", "PoolFormerConfig", _FOUR, "image"),
    "pvt": (
        "PvtForImageClassification",
        "PvtConfig",
        {"image_size": 64, "hidden_sizes": [32, 32, 64, 64], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 4]},
        "image",
    ),
    "levit": (
        "LevitForImageClassification",
        "LevitConfig",
        {"image_size": 64, "hidden_sizes": [64, 96, 128], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]},
        "image",
    ),
    "focalnet": (
        "FocalNetForImageClassification",
        "FocalNetConfig",
        {"image_size": 64, "embed_dim": 32, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3], "hidden_sizes": [32, 64]},
        "image",
    ),
    "swiftformer": (
        "SwiftFormerForImageClassification",
        "SwiftFormerConfig",
        {"image_size": 64, "embed_dims": [32, 32, 64, 64], "depths": [1] * 4},
        "image",
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"hidden_sizes": [16, 32, 64, 64], "depths": [1] * 4, "num_attention_heads": [1, 2, 4, 4], "decoder_hidden_size": 64},
        "image",
    ),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", {k: v for k, v in _SOUND.items() if k != "vocab_size"}, "sound"),
    "hubert": ("HubertModel", "HubertConfig", {k: v for k, v in _SOUND.items() if k != "vocab_size"}, "sound"),
}


def inputs_of(kind: str, batch: int) -> dict[str, torch.Tensor]:
    """Inputs of a kind, seeded."""
    g = torch.Generator().manual_seed(batch)
    tokens = torch.randint(0, 100, (batch, 16), generator=g)
    match kind:
        case "text":
            return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        case "tokens":
            return {"input_ids": tokens}
        case "image":
            return {"pixel_values": torch.randn(batch, 3, 64, 64, generator=g)}
        case _:
            return {"input_values": torch.randn(batch, 2000, generator=g)}


def row(name: str) -> tuple[str, str, str, str, str]:
    """Name, MACs left, proof, seconds, and what stays or fails."""
    import transformers

    network, config, options, kind = ZOO[name]
    torch.manual_seed(0)
    model = getattr(transformers, network)(getattr(transformers, config)(**options)).eval()
    inputs = inputs_of(kind, 1)
    with torch.no_grad():
        model(**inputs)  # a configuration that does not run is no result
    started = time.perf_counter()
    try:
        result = gs.prune(model, inputs, ratio=0.5)
    except GossamerError as e:
        return name, "", "", f"{time.perf_counter() - started:.1f}", str(e)
    took = time.perf_counter() - started
    with torch.no_grad():
        result.model(**inputs_of(kind, 3))
    stays = " ".join(n.split(", which")[0] for n in result.notes if n.startswith("left in"))
    difference = "" if result.proof.difference is None else f"{result.proof.difference:.0e}"
    return name, f"{result.after.macs / result.before.macs:.2f}", difference, f"{took:.1f}", stays


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(ZOO), metavar="NAME")
    only = parser.parse_args().only
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| network | MACs left | proof | seconds | what stays, or why it fails |\n|---|---|---|---|---|")
    for name in only or ZOO:
        print(f"| {' | '.join(row(name))} |", flush=True)


if __name__ == "__main__":
    main()
