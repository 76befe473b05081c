"""Tiny random models whose matrices are no linear layers in transformers: Conv1D, and stacks of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ROUTED = {"num_experts_per_tok": 2}
_DEEPSEEK = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}

FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2": _GPT2,
    "Mixtral": {**_ROUTED, "num_local_experts": 4},
    "Qwen2Moe": {**_ROUTED, "num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64},
    "Qwen3Moe": {**_ROUTED, "num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16},
    "Olmoe": {**_ROUTED, "num_experts": 4},
    "GptOss": {**_ROUTED, "num_local_experts": 4, "head_dim": 16, "sliding_window": 32},
    "DeepseekV2": _DEEPSEEK,
    "DeepseekV3": _DEEPSEEK,
    "GraniteMoe": {**_ROUTED, "num_local_experts": 4},
    "Phimoe": {**_ROUTED, "num_local_experts": 4},
    "Dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "Llama4": {
        "num_experts_per_tok": 1,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 1,
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "attention_chunk_size": 32,
    },
}
"""Changes of the sizes, by the beginning of the name of the class."""

IDS: Tensor = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
"""Token ids `[2, 24]`."""


def tiny_of(name: str, **changes: Any) -> Any:
    """A random model of a family in evaluation mode, whose experts transformers runs one by one ("eager")."""
    import transformers

    config = getattr(transformers, f"{name}{'Text' * (name == 'Llama4')}Config")(
        **{**_SIZES, **FAMILIES[name], **changes}
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, name + kind)(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1 or path.endswith("_bias") or ".gate.weight" in path or "router" in path:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    """The logits of a model."""
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def tensors_in(folder: Any) -> dict[str, Tensor]:
    """All tensors in the files of a folder, by name."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
