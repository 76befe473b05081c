"""A tiny model of every architecture, made from what its config class declares.

Numbers that are sizes are made small by what they are called, alike in all configs, so that what fitted together still
does; the few that do not are in `EXCEPTIONS`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from tests.architectures.exceptions import EXCEPTIONS

HIDDEN, HEADS, LAYERS, VOCABULARY, PICTURE, PATCH = 64, 4, 2, 128, 32, 8

_SIZES: list[tuple[str, Any]] = [
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|linear_num_.*heads", HEADS),
    (r"mamba_d_head|mamba_headdim|mamba_head_dim", 32),
    (r"dff|dim_ff|.*linear_units|intermediate_size_mlp|poly_.*dim", 96),
    (r"classifier_proj_size|subsampling_conv_channels|entity_emb_size|mask_feature_size|fpn_feature_size", 32),
    (r"num_codevectors_per_group|output_emb_size|.*_predictor_channels|auxiliary_channels", 32),
    (r"num_conv_pos_embeddings|index_topk|num_hash_buckets|max_pos_emb|context_size", 16),
    (r"encoder_hash_byte_group_vocab|.*vocab_size_base|hidden_size_global", 64),
    (r"mamba_d_ssm", 128),
    (r"upsample_groups", HIDDEN),
    (r"(.*_)?vocab_size(_per_layer_input)?|num_embeddings|codebook_size", VOCABULARY),
    (r"(.*_)?(num_)?key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num", 2),
    (r"(.*_)?(num_attention_heads|num_heads|n_heads?|attention_heads|nhead|num_head|attn_heads)", HEADS),
    (r"(.*_)?(num_.*layers|n_layers?|layers|depth|num_blocks|num_layers_.*)", LAYERS),
    (r"(.*_)?(head_dim|d_kv|head_size|kv_channels|d_head|attention_head_dim|dim_head|qk_head_dim)", 16),
    (r"qk_nope_head_dim|v_head_dim|index_head_dim", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank|.*_rank", 32),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|ffn_size|dim_feedforward|d_inner|.*_ffn_dim)", 96),
    (r"(moe|shared).*intermediate.*|.*expert.*(size|dim)", 32),
    (r"(.*_)?num_experts_per_tok|moe_topk|moe_k|top_k|num_selected_experts|moe_top_k|num_experts_per_token", 2),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|n_experts|moe_num_experts)", 4),
    (r"n_group|topk_group|num_expert_group.*", 1),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"max_(source|target)_positions", 32),
    (r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|max_2d_position_embeddings", 64),
    (r"sliding_window|attention_window|local_attention|window_size|.*chunk_size(_.*)?|block_size", 4),
    (r"image_size|crop_size|input_image_size|.*image_resolution|img_size", PICTURE),
    (r"(.*_)?patch_size|tubelet_size", PATCH),
    (r"num_frames|.*_frames|frames_per_clip", 2),
    (r"num_queries|num_query_tokens|two_stage_num_proposals|num_latents", 8),
    (r"num_denoising|num_feature_levels", None),
    (r"num_mel_bins|feature_size|input_feat_per_channel", 16),
    (r"state_size|mamba_d_state|ssm_state_size|d_state|linear_.*_head_dim", 16),
    (r"mamba_n_groups|n_groups|mamba_ngroups|num_groups|num_conv_pos_embedding_groups", 1),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|dim|model_dim|projection_dim|emb_dim|width"
        r"|projection_hidden_size|hidden_channels|decoder_dim|out_hidden_size|embedding_dim|projector_dim|attention_size"
        r"|encoder_embed_dim|adapter_dim|.*_embed_dim|.*_hidden_size|proj_dim|d_embed|word_embed_proj_dim|hidden_sizes?"
        r"|lru_width|.*_hidden_dim|cross_attention_hidden_size|num_features|embed_size)",
        HIDDEN,
    ),
]
_RULES = [(re.compile(pattern), size) for pattern, size in _SIZES]

_NEVER = re.compile(
    r"(num|max|min)_(labels|length|channels)|num_channels|.*_token_id|.*token_index|.*_idx|.*ratio.*|.*_eps"
)
"""Names that are no sizes of matrices."""

_COUNTED = re.compile(
    r"hidden_sizes|embed_dims?|dims?|out_channels|encoder_hidden_channels|decoder_hidden_channels|"
    r"embed_dim|embed_dim_per_stage|hidden_channels|neck_hidden_sizes|encoder_in_channels|in_channels_list"
)


def _small(name: str, value: Any, layers: int) -> Any:
    """A small value for one entry of a config."""
    if isinstance(value, bool) or _NEVER.fullmatch(name):
        return _token(name, value)
    if isinstance(value, int):
        for pattern, size in _RULES:
            if pattern.fullmatch(name):
                return value if size is None or value <= 0 else min(size, value)
        return value
    if isinstance(value, (list, tuple)) and value:
        return _small_list(name, list(value), layers)
    if isinstance(value, dict):
        return _small_rope(value) if "rope" in name else value
    return value


def _token(name: str, value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool) or not name.endswith(("token_id", "token_index", "_idx")):
        return value
    if value < VOCABULARY - 28:
        return value
    return VOCABULARY - 1 - sum(map(ord, name)) % 27  # one of its own for each name, nearly


def _small_list(name: str, values: list[Any], layers: int) -> Any:
    if "layer_types" in name or name in ("layers_block_type", "block_types", "mlp_layer_types", "layer_type"):
        kinds = list(dict.fromkeys(values))
        return (kinds * layers)[:layers] if len(kinds) < layers else kinds[:layers]
    if name in ("depths", "depth", "num_layers", "layers", "num_hidden_layers") and isinstance(values[0], int):
        return [1] * len(values)
    if name in ("image_size", "img_size", "input_size") and isinstance(values[0], int):
        return [PICTURE] * len(values)
    if name in ("patch_size", "patch_sizes") and len(values) == 2 and isinstance(values[0], int):
        return [PATCH] * 2
    if _COUNTED.fullmatch(name) and all(isinstance(each, int) for each in values):
        return [32 * 2 ** min(at, 2) for at in range(len(values))]
    if re.fullmatch(r"(.*_)?(num_heads|num_attention_heads|n_heads)", name):
        return [min(2 * 2 ** min(at, 1), each) for at, each in enumerate(values)]
    if name in ("decoder_in_channels", "vision_features_channels"):
        return [HIDDEN] * len(values)
    if name in ("conv_dim", "tdnn_dim", "conv_channels"):
        return [32] * len(values)
    if re.search(r"mrope_section", name):
        return [2, 3, 3]
    return values


def _small_rope(value: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings whose sections fit heads of 16."""
    return {
        key: [2, 3, 3] if key == "mrope_section" else _small_rope(each) if isinstance(each, dict) else each
        for key, each in value.items()
    }


_THREE_AXES = re.compile(r"qwen.*(vl|omni|3_5|3_6)|paddleocr|glm.*v|glm_(ocr|image)|keye|hunyuan_vl|.*_vl(_moe)?_text")
"""Model types whose rotary embeddings are parted by time, height and width: their sections fit heads of 16."""


def tiny_config(cls: Any, given: Any = None) -> Any:
    """A config of a class with small sizes.

    Args:
        cls: A config class of transformers.
        given: A config of the class to shrink. Default: the one with all defaults.
    """
    whole = cls() if given is None else given
    parts = {name: part for name in getattr(cls, "sub_configs", {}) if (part := getattr(whole, name, None)) is not None}
    names = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else list(vars(whole))
    layers = LAYERS
    changed: dict[str, Any] = {}
    for name in names:
        before = _entry(whole, name)
        if name in parts or name.startswith("_") or before is None or name in ("architectures", "dtype"):
            continue
        small = _small(name, before, layers)
        if small is not before:
            changed[name] = small
    if isinstance(given_range := _entry(whole, "initializer_range"), float) and given_range < 0.01:
        changed["initializer_range"] = 0.02  # SAM's weights would be so small that products of them vanish
    for name in (name for name in names if name.endswith("num_key_value_heads")):
        heads = name.replace("key_value", "attention")
        if _entry(whole, name) == _entry(whole, heads) is not None:
            changed[name] = changed.get(heads, HEADS)
    if "rope_parameters" in names and _THREE_AXES.match(cls.model_type):
        changed["rope_parameters"] = {**(_entry(whole, "rope_parameters") or {}), "mrope_section": [2, 3, 3]}
    changed |= {name: tiny_config(type(part), part).to_dict() for name, part in parts.items()}
    changed |= EXCEPTIONS.get(cls.model_type, {})
    config, stages = cls(**changed), _entry(whole, "out_features")
    if stages and "out_features" not in changed and {*stages} <= {*(_entry(config, "stage_names") or ())}:
        config.out_features = stages  # of a backbone: no entry of its own
    return config


def _entry(config: Any, name: str) -> Any:
    """An entry of a config, also where its layers differ in it."""
    try:
        return getattr(config, name, None)
    except Exception:
        return vars(config).get(name)


_HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "CTC",
    "ZERO_SHOT_OBJECT_DETECTION",
    "OBJECT_DETECTION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "TEXT_TO_WAVEFORM",
    "TIME_SERIES_PREDICTION",
)
"""Heads by the names of transformers' mappings, the first that a model type has is taken; else the bare model."""


def all_types() -> list[str]:
    """Every model type of transformers that has a class of its own: in its own order."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return [name for name in CONFIG_MAPPING_NAMES if class_of(name)[1]]


def class_of(model_type: str, named: str = "") -> tuple[str, str]:
    """What a model type is taken for (the name of a head), and the name of the class; empty if it has none.

    Args:
        model_type: Its name in transformers' mappings.
        named: The name of the class. Default: the first.
    """
    return next((each for each in _classes_of(model_type) if named in ("", each[1])), ("", named))


def _classes_of(model_type: str) -> Iterator[tuple[str, str]]:
    from transformers.models.auto import modeling_auto

    for head in (*_HEADS, ""):
        mapping = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES")
        found = mapping.get(model_type)
        if found:
            name = found if isinstance(found, str) else found[0]
            yield head.lower().replace("_", " ") or "bare model", name


def tiny_model(model_type: str) -> Any:
    """A tiny model with random weights, in evaluation mode.

    Raises:
        ValueError: It is not tiny.
    """
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = tiny_config(getattr(transformers, CONFIG_MAPPING_NAMES[model_type]))
    names = [name for _, name in _classes_of(model_type)]
    classes = (getattr(transformers, name) for name in names)
    cls = next((each for each in classes if each.config_class is type(config)), getattr(transformers, names[0]))
    with torch.device("meta"):
        weights = sum(each.numel() for each in cls(config).parameters())
    if weights > MOST:
        raise ValueError(f"it has {weights / 1e6:.0f} million weights and takes no smaller sizes")
    torch.manual_seed(0)
    return cls(config).eval()


MOST = 6_000_000
"""Weights of the largest model that is still tiny."""
