"""How byte-level tokenizers cut a text before they merge: what files say by a name of llama.cpp's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""The pieces that Llama 3 cuts a text into."""

QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
"""The pieces of Qwen2 and StableLM 2: those of Llama 3, but with each digit alone."""

BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
"""Runs without spaces and some signs, as BLOOM has them."""

_UNKNOWN = {"bloom": BLOOM, "stablelm2": QWEN2}
"""Those that transformers does not know, so that it would cut as GPT-2 does."""


def cut_as_said(path: Path, tokenizer: Any) -> Any:
    """The tokenizer that transformers has made of a GGUF file, changed to cut a text as the file says."""
    import gguf
    from tokenizers import Regex, pre_tokenizers

    said = gguf.GGUFReader(path).fields.get("tokenizer.ggml.pre")
    pattern = _UNKNOWN.get(said.contents()) if said is not None else None
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    return tokenizer
