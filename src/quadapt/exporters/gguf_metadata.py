"""What llama.cpp must know of a model besides its weights: names, sizes, rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quadapt.errors import ExportError
from quadapt.importers.gguf_family import FAMILIES, Family, names_of

if TYPE_CHECKING:
    from gguf import GGUFWriter


def family_of(model: nn.Module) -> Family:
    """Find the family that a model belongs to.

    Raises:
        ExportError: It is not one that can be written, or it computes what llama.cpp would not.
    """
    class_name = type(model).__name__
    if class_name not in FAMILIES:
        raise ExportError(
            f"{class_name}: GGUF is written for {', '.join(FAMILIES)}. Use --format hf, and llama.cpp's own converter"
        )
    config: Any = model.config
    if config.hidden_act != "silu":
        raise ExportError(
            f"config.hidden_act={config.hidden_act!r}: llama.cpp computes {class_name} with silu. Use --format hf"
        )
    rope, known = _rope(config), ["default", "linear", *(["llama3"] if FAMILIES[class_name].rope_factors else [])]
    if rope["rope_type"] not in known or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(
            f"config.rope_parameters={rope}: for {class_name} rope_type {' or '.join(known)} over whole heads "
            "can be written. Use --format hf"
        )
    return FAMILIES[class_name]


def namer(family: Family, blocks: int) -> Callable[[str], str]:
    """A function from a tensor's name in transformers to its name in GGUF.

    The function raises ExportError for a tensor that the family does not have.
    """
    known = names_of(family, blocks)

    def name_of(name: str) -> str:
        found = known(name)
        if found is None:
            raise ExportError(f"{name}: llama.cpp's {family.arch} has no such tensor. Use --format hf")
        return found

    return name_of


def write_metadata(writer: GGUFWriter, model: nn.Module, name: str) -> list[str]:
    """Describe a model of a known family; returns notes."""
    import gguf

    config: Any = model.config
    head_dim, rope = _head_dim(config), _rope(config)
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_type("model")
    writer.add_name("Mistral" if name == "mistral" else name)  # which transformers takes for an architecture
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if window >= config.max_position_embeddings:
        return []
    return [
        f"this model attends to the last {window} tokens, llama.cpp to all: they agree up to {window} tokens, and "
        f"that is the context length written (the model allows {config.max_position_embeddings})"
    ]


def rope_factors(config: Any) -> Tensor | None:
    """What llama.cpp is to divide each rotary frequency by, float32 `[head_dim / 2]`; None if they are not Llama 3's.

    Taken from the frequencies that transformers computes.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, head_dim = _rope(config), _head_dim(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / scaled.double()).float()


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", **config.rope_parameters}


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
