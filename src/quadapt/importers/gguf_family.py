"""Families of models as llama.cpp knows them: the names of their tensors, and the order of their rows.

Read and written files have these in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """How llama.cpp knows a family of models."""

    arch: str
    """The name of the architecture in GGUF files, `general.architecture`."""

    interleaved: bool
    """Whether its rotary embedding turns neighbouring rows (0 and 1, 2 and 3, ..), where transformers turns row `i`
    with row `i + half`: then the rows of q_proj and k_proj lie in another order in a file."""

    rope_factors: bool
    """Whether it reads a tensor of factors for the rotary frequencies (Llama 3's scaling)."""


_LLAMA = Family(arch="llama", interleaved=True, rope_factors=True)

FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Family(arch="qwen2", interleaved=False, rope_factors=False),
    "Qwen3ForCausalLM": Family(arch="qwen3", interleaved=False, rope_factors=False),
}
"""The families that can be read as codes, and written, by the model's class."""


def names_of(family: Family, blocks: int) -> Callable[[str], str | None]:
    """A function from a tensor's name in transformers to its name in GGUF, by the `gguf` package's own table.

    The function gives None for a tensor that the family does not have.
    """
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    table = gguf.get_tensor_name_map(arch, blocks)

    def name_of(name: str) -> str | None:
        found: str | None = table.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    return name_of


def heads_of(name: str, family: Family, config: Any) -> int:
    """Heads whose rows must be reordered in the tensor `name` of transformers; 0 if its rows stay in order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.split(".")[-2], 0) if family.interleaved else 0
