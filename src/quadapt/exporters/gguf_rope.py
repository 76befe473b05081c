"""Rotary embeddings in llama.cpp's terms: what a file says of them, and the factors of frequencies that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quadapt.errors import ExportError
from quadapt.importers.gguf_family import Family

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SAID = {
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "longrope": {"factor", "original_max_position_embeddings", "long_factor", "short_factor", "attention_factor"},
}
"""Fields of each kind of scaling that a file can say, beside those of all kinds."""

_ALWAYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
"""Fields of all kinds; older configurations have the kind under two names."""

_USUAL = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""Fields of YaRN, and the values that llama.cpp computes with."""


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary embedding of the layers that attend to all tokens; `rope_type` is always there."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {"rope_type": "default", **rope.get("full_attention", rope)}


def head_dim(config: Any) -> int:
    """The size of a head of queries."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_rope(family: Family, config: Any, class_name: str) -> None:
    """Raise ExportError if llama.cpp would turn queries and keys in another way than the model."""
    if not family.ropes:
        return
    rope = rope_of(config)
    kind, part = rope["rope_type"], rope.get("partial_rotary_factor", 1.0)
    known = kind in family.ropes and (kind == "default" or not _unsaid(rope))
    local = (config.rope_parameters or {}).get("sliding_attention", {})
    if not known or not (part == 1.0 or family.partial) or local.get("rope_type", "default") != "default":
        raise ExportError(
            f"config.rope_parameters={config.rope_parameters}: for {class_name} rope_type {' or '.join(family.ropes)} "
            f"{'' if family.partial else 'over whole heads '}can be written. Use --format hf"
        )


def _unsaid(rope: dict[str, Any]) -> list[str]:
    """Fields of a scaling that a file cannot say, and that change what is computed."""
    said = _ALWAYS | _SAID[rope["rope_type"]]
    unusual = {name: value for name, value in rope.items() if value is not None and _USUAL.get(name) != value}
    return sorted(unusual.keys() - said)


def write_rope(writer: GGUFWriter, family: Family, config: Any) -> list[str]:
    """Say how queries and keys are turned; returns notes."""
    import gguf

    if not family.ropes:
        return []
    rope = rope_of(config)
    kind, length = rope["rope_type"], rope.get("original_max_position_embeddings", config.max_position_embeddings)
    writer.add_rope_dimension_count(_turned(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(int(length))
    if kind != "longrope":
        return []
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_attn_factors(float(_frequencies(config)[1]))
    return [
        f"this model has other rotary frequencies for texts of more than {length} tokens, llama.cpp for contexts that "
        f"are set to more: with a context of at most {length} (-c {length}) they agree"
    ]


def rope_factors(config: Any) -> dict[str, Tensor]:
    """What llama.cpp is to divide each rotary frequency by, float32 `[turned / 2]`, by the names in a file."""
    rope = rope_of(config)
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"]) for name in ("long", "short")}
    if rope["rope_type"] != "llama3":
        return {}
    dims = _turned(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    return {"rope_freqs.weight": (plain / _frequencies(config)[0].double()).float()}


def _turned(config: Any) -> int:
    """How many numbers of a head are turned."""
    return int(head_dim(config) * rope_of(config).get("partial_rotary_factor", 1.0))


def _frequencies(config: Any) -> tuple[Tensor, float]:
    """The frequencies that transformers computes, and its factor for queries times keys."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found: tuple[Tensor, float] = ROPE_INIT_FUNCTIONS[rope_of(config)["rope_type"]](config, torch.device("cpu"))
    return found
