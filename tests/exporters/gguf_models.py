"""Models of each family that GGUF is written for, and what llama.cpp's own GELU makes of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

GEMMA: dict[str, Any] = {"head_dim": 32, "pad_token_id": 0, "tie_word_embeddings": True}
WINDOWS = {**GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 16}
HALF = {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "type": "yarn",  # as older configurations have it
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "attention_factor": None,
}
LONG: dict[str, Any] = {  # llama.cpp's contexts are multiples of 256 tokens
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "long_factor": [1.5 + index / 4 for index in range(8)],
        "short_factor": [1 + index / 8 for index in range(8)],
    },
}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

SCALES = {
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.125,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama 3's rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama with yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"head_dim": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen2, linear": ("Qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2 with yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "gemma": ("Gemma", GEMMA),
    "gemma 2": ("Gemma2", {**WINDOWS, "num_hidden_layers": 3}),
    "gemma 3": ("Gemma3", {**WINDOWS, "num_hidden_layers": 7}),
    "gemma 3, two ropes": ("Gemma3", {**WINDOWS, "num_hidden_layers": 6, "rope_parameters": TWO_ROPES}),
    "phi 2": ("Phi", {"rope_parameters": HALF}),
    "phi 2, tied": ("Phi", {"tie_word_embeddings": True, "rope_parameters": HALF}),
    "phi 3": ("Phi3", {"pad_token_id": 0}),
    "phi 3, long": ("Phi3", {"pad_token_id": 0, **LONG}),
    "phi 4": ("Phi3", {"pad_token_id": 0, "rope_parameters": HALF}),
    "gpt-neox": ("GPTNeoX", {}),
    "gpt-neox in sequence": ("GPTNeoX", {"use_parallel_residual": False, "rope_parameters": HALF}),
    "bloom": ("Bloom", {}),
    "bloom with 6 heads": ("Bloom", {"hidden_size": 96, "num_attention_heads": 6}),
    "stablelm": ("StableLm", {}),
    "stablelm 2": ("StableLm", {"use_parallel_residual": True, "use_qkv_bias": True, "tie_word_embeddings": True}),
    "stablelm 2 with norms of heads": ("StableLm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "falcon 7b": ("Falcon", {}),
    "falcon 40b": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 2": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon with a key a head": ("Falcon", {"multi_query": False}),
    "mpt": ("Mpt", {}),
    "mpt, clipped": ("Mpt", {"hidden_size": 96, "num_attention_heads": 6, "attn_config": {"clip_qkv": 0.5}}),
    "gpt-2": ("GPT2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2 with experts": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 128}),
    "qwen3 with experts": ("Qwen3Moe", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "granite with experts": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2, **SCALES}),
}
"""Models by name: the family, and what differs from the sizes of all."""


class Gelu(nn.Module):
    """GELU as llama.cpp's CPU kernels compute it: by a table over float16, of the approximation by tanh."""

    def forward(self, x: Tensor) -> Tensor:
        found = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x >= 10, x, torch.where(x <= -10, 0.0, found))


def with_their_gelu(model: nn.Module) -> bool:
    """Give a model llama.cpp's GELU in the place of its own; whether it has one."""
    found = [name for name, module in model.named_modules() if "gelu" in type(module).__name__.lower()]
    for name in found:
        model.set_submodule(name, Gelu())
    return bool(found)
