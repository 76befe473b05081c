"""What some model types need besides sizes made small by name."""

from __future__ import annotations

from typing import Any

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 32, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
_WITHOUT_TIMM: dict[str, Any] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": _RESNET,
}
_ONE_MAP: dict[str, Any] = {**_WITHOUT_TIMM, "backbone_config": {**_RESNET, "out_features": ["stage4"]}}
_SWIN: dict[str, Any] = {"embed_dim": 32, "image_size": 64, "window_size": 2, "num_heads": [2, 2, 2, 2]}
_HEAD: dict[str, Any] = {"head_dim": 16}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "detr": _ONE_MAP,
    "conditional_detr": _ONE_MAP,
    "dab-detr": _ONE_MAP,
    "table-transformer": _ONE_MAP,
    "deformable_detr": _WITHOUT_TIMM,
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "hunyuan_vl_text": _HEAD,
    "ministral": _HEAD,
    "nemotron": {**_HEAD, "num_key_value_heads": 2},
    "grounding-dino": {"num_queries": 3},
    "mm-grounding-dino": {"num_queries": 3},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8], "attn_layers": ["local", "local"]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "depth_anything": {"neck_hidden_sizes": [32, 32], "reassemble_factors": [4, 2]},
    "perceiver": {"d_latents": 64},
    "dots1": _HEAD,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gpt2": {"n_inner": 96},
    "mamba2": {"head_dim": 32},
    "esm": {"vocab_size": 32, "pad_token_id": 1, "mask_token_id": 2},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "swin": _SWIN,
    "donut-swin": _SWIN,
    "maskformer-swin": _SWIN,
    "swinv2": _SWIN,
    "focalnet": {"embed_dim": 32},
    "hiera": {"embed_dim": 32},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "gemma3n_text": {
        "intermediate_size": [96, 96],
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "autoformer": {"prediction_length": 2},
    "informer": {"prediction_length": 2},
    "time_series_transformer": {"prediction_length": 2},
}
"""Entries of a config by the name of its model type."""
