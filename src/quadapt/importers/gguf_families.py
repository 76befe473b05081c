"""The families of models whose GGUF files are read and written, each as one declaration.

A new family of llama.cpp's is a new entry here, if its tensors go out as they are or with their rows in another order.
The tests run each of them in llama.cpp (`tests/exporters/test_gguf_families.py`), so that an entry that says too little
does not stay.

Source: llama.cpp, `src/models/` (what each family computes) and `conversion/` (what its files say).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from quadapt.importers.gguf_family import Family, Of, apart, pairs

_SIZES: dict[str, Of] = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_GROUPED: dict[str, Of] = {**_SIZES, "attention.head_count_kv": "num_key_value_heads"}
_RMS: dict[str, Of] = {**_GROUPED, "attention.layer_norm_rms_epsilon": "rms_norm_eps"}

_EXPERTS: dict[str, Of] = {
    **_RMS,
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}

_SILU = {"hidden_act": ("silu",)}
_ALL_LAYERS = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
"""That every layer has experts."""

_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")
"""llama.cpp has the approximation by tanh alone. That of gelu itself is noted, see `gguf_metadata.py`."""


def _scale_of_queries(layers_of_27b: int) -> Any:
    """What llama.cpp divides the square of queries by: the size of a head, but for the largest Gemma of its kind."""

    def wanted(config: Any) -> int:
        largest = config.num_hidden_layers == layers_of_27b
        return int(config.hidden_size // config.num_attention_heads if largest else config.head_dim)

    return wanted


def _every(period: int) -> Any:
    """Kinds of layers of which the last of `period` attends to all tokens."""

    def wanted(config: Any) -> list[str]:
        kinds = ("sliding_attention", "full_attention")
        return [kinds[(index + 1) % period == 0] for index in range(config.num_hidden_layers)]

    return wanted


def _falcon_keys(config: Any) -> int:
    """Keys of a layer of Falcon, which has three ways to say it."""
    return int(config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1)


_LLAMA = Family(
    arch="llama",
    metadata=_RMS,
    computes=_SILU,
    shown={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
    rows={"q_proj": pairs("num_attention_heads"), "k_proj": pairs("num_key_value_heads")},
    ropes=("default", "linear", "yarn", "llama3"),
)

_GEMMA = {
    "attention_bias": (False,),
    "use_bidirectional_attention": (False, None),
}

_GEMMA3 = Family(
    arch="gemma3",
    metadata={
        **_RMS,
        "attention.sliding_window": "sliding_window",
        "rope.freq_base_swa": lambda config: config.rope_parameters["sliding_attention"]["rope_theta"],
    },
    computes={
        **_GEMMA,
        "hidden_activation": _GELU,
        "query_pre_attn_scalar": _scale_of_queries(62),
        "layer_types": _every(6),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
    },
    windows=True,
    norms_from_one=True,
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": replace(
        _LLAMA,
        metadata={**_RMS, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    ),
    "Qwen2ForCausalLM": Family(arch="qwen2", metadata=_RMS, computes=_SILU, ropes=("default", "linear", "yarn")),
    "Qwen3ForCausalLM": Family(
        arch="qwen3", metadata=_RMS, computes={**_SILU, "attention_bias": (False,)}, ropes=("default", "linear", "yarn")
    ),
    "Qwen2MoeForCausalLM": Family(
        arch="qwen2moe",
        metadata={
            **_EXPERTS,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        computes={**_SILU, **_ALL_LAYERS, "norm_topk_prob": (False,)},
        own_head=True,
    ),
    "Qwen3MoeForCausalLM": Family(
        arch="qwen3moe",
        metadata=_EXPERTS,
        computes={**_SILU, **_ALL_LAYERS, "norm_topk_prob": (True,), "attention_bias": (False,)},
    ),
    "OlmoeForCausalLM": Family(
        arch="olmoe",
        metadata={**_RMS, "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
        computes={
            **_SILU,
            "attention_bias": (False,),
            "clip_qkv": (None,),
            "norm_topk_prob": (False,),
            "num_key_value_heads": lambda config: config.num_attention_heads,
        },
        own_head=True,
        read=False,
    ),
    "GraniteMoeForCausalLM": Family(
        arch="granitemoe",
        metadata={
            **_RMS,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "logit_scale": "logits_scaling",
            "residual_scale": "residual_multiplier",
            "embedding_scale": "embedding_multiplier",
            "attention.scale": "attention_multiplier",
        },
        computes={**_SILU, "attention_bias": (False,)},
        renamed={
            "block_sparse_moe.router.": "block_sparse_moe.router.layer.",
            "block_sparse_moe.experts": "mlp.experts",
        },
        rows=_LLAMA.rows,
        read=False,
    ),
    "GemmaForCausalLM": Family(
        arch="gemma",
        metadata=_RMS,
        computes={**_GEMMA, "hidden_act": _GELU},
        norms_from_one=True,
        read=False,
    ),
    "Gemma2ForCausalLM": Family(
        arch="gemma2",
        metadata={
            **_RMS,
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        computes={
            **_GEMMA,
            "hidden_activation": _GELU,
            "query_pre_attn_scalar": _scale_of_queries(46),
            "layer_types": _every(2),
            "attn_logit_softcapping": lambda config: config.attn_logit_softcapping or 50.0,  # what a file without means
            "final_logit_softcapping": lambda config: config.final_logit_softcapping or 30.0,
        },
        windows=True,
        norms_from_one=True,
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": replace(
        _GEMMA3,
        renamed={"model.language_model.": "model."},
        besides=("model.vision_tower.", "model.multi_modal_projector."),
        read=False,
    ),
    "GPT2LMHeadModel": Family(
        arch="gpt2",
        metadata={
            **_SIZES,
            "feed_forward_length": lambda config: config.n_inner or 4 * config.hidden_size,
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        computes={
            "activation_function": _GELU,
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        ropes=(),
    ),
    "PhiForCausalLM": Family(
        arch="phi2",
        metadata={**_GROUPED, "attention.layer_norm_epsilon": "layer_norm_eps"},
        computes={"hidden_act": _GELU, "qk_layernorm": (False,)},
        partial=True,
        own_head=True,
        read=False,
    ),
    "Phi3ForCausalLM": Family(
        arch="phi3",
        metadata={
            **_RMS,
            "attention.sliding_window": lambda _: 0,
        },  # said to be none: older llama.cpp takes one for granted
        computes=_SILU,
        ropes=("default", "longrope"),
        partial=True,
    ),
    "GPTNeoXForCausalLM": Family(
        arch="gptneox",
        metadata={
            **_SIZES,
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual",
        },
        computes={"hidden_act": _GELU, "attention_bias": (True,)},
        rows={"query_key_value": apart(lambda config: int(config.num_attention_heads))},
        partial=True,
        own_head=True,
        read=False,
    ),
    "BloomForCausalLM": Family(
        arch="bloom",
        metadata={
            **_SIZES,
            "context_length": lambda config: getattr(config, "seq_length", 2048),  # it has no longest one
            "feed_forward_length": lambda config: 4 * config.hidden_size,
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        computes={"apply_residual_connection_post_layernorm": (False,)},
        renamed={"transformer.": ""},
        rows={"query_key_value": apart(lambda config: int(config.num_attention_heads))},
        ropes=(),
    ),
    "MptForCausalLM": Family(
        arch="mpt",
        metadata={
            **_SIZES,
            "context_length": "max_seq_len",
            "feed_forward_length": lambda config: config.expansion_ratio * config.hidden_size,
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "attention.max_alibi_bias": lambda _: 8.0,
            "attention.clamp_kqv": lambda config: config.attn_config.clip_qkv,
        },
        computes={"attn_config.softmax_scale": (None,)},
        ropes=(),
        read=False,
    ),
    "StableLmForCausalLM": Family(
        arch="stablelm",
        metadata={
            **_GROUPED,
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual",
        },
        computes=_SILU,
        shown={"use_qkv_bias": "blk.0.attn_q.bias", "qk_layernorm": "blk.0.attn_q_norm.weight"},
        partial=True,
        own_head=True,
    ),
    "FalconForCausalLM": Family(
        arch="falcon",
        read=False,
        metadata={
            **_SIZES,
            "feed_forward_length": "ffn_hidden_size",
            "attention.head_count_kv": _falcon_keys,
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        computes={"activation": _GELU, "alibi": (False,), "bias": (False,), "parallel_attn": (True,)},
        rows={"query_key_value": apart(_falcon_keys)},
    ),
}
"""The families that can be written, and most of them read as codes, by the model's class."""


def family_names(*, read: bool = False) -> str:
    """The names of the families in a row: all that are written, or those whose files are read as well."""
    found = [name for name, family in FAMILIES.items() if family.read or not read]
    return ", ".join(dict.fromkeys(re.sub(r"For\w+|LMHeadModel", "", name) for name in found))
