"""The tokenizer that a GGUF file describes, made to do what llama.cpp does with it.

transformers makes one too, but of a sentencepiece-style file it makes another than llama.cpp's: what it does not know
(line ends, if there is no token for them) it drops, and spaces before special tokens it leaves out. So a tokenizer
whose kind is known here is built from what the file says; others are left to transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quadapt.importers.gguf_splits import cut_by

_SPACE = "\u2581"
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def tokenizer_of(path: Path) -> Any:
    """The (fast) tokenizer of a GGUF file; None if it is of a kind that is not known here."""
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    before = "tokenizer."
    fields = GGUFReader(path).fields
    said = {
        name.removeprefix(before).removeprefix("ggml."): field.contents()
        for name, field in fields.items()
        if name.startswith(before)
    }
    kinds = {"llama": _sentencepiece, "gpt2": _byte_level, "t5": _unigram}
    made = kinds[said["model"]](said) if said.get("model") in kinds else None
    if made is None:
        return None
    special, others = _added(said)
    made.add_special_tokens(special)
    made.add_tokens(others)
    made.post_processor = _around(said)
    named = {role: said["tokens"][number] for role, number in _roles(said).items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **named)
    tokenizer.chat_template = _template(said)
    return tokenizer


def _roles(said: dict[str, Any]) -> dict[str, int]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {role: said.get(f"{name}_token_id") for role, name in names.items()}
    return {role: number for role, number in found.items() if number is not None and number < len(said["tokens"])}


def _template(said: dict[str, Any]) -> str | None:
    text = said.get("chat_template")
    return text if isinstance(text, str) else None


def _added(said: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Tokens that are found before anything else is done to a text: marks, and words that users have added."""
    from gguf import TokenType
    from tokenizers import AddedToken

    kinds = said.get("token_type") or []
    found: dict[bool, list[Any]] = {True: [], False: []}
    for text, kind in zip(said["tokens"], kinds, strict=False):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            special = kind != TokenType.USER_DEFINED
            found[special].append(AddedToken(text, special=special, normalized=False))
    return found[True], found[False]


def _around(said: dict[str, Any]) -> Any:
    """What is put before and after a text."""
    from tokenizers import processors

    parts, marks = ["$A"], []
    for key, end, default in (("bos", False, said["model"] == "llama"), ("eos", True, False)):
        number = said.get(f"{key}_token_id")
        if said.get(f"add_{key}_token", default) and number is not None:
            text = said["tokens"][number]
            parts = [*parts, text] if end else [text, *parts]
            marks.append((text, number))
    return processors.TemplateProcessing(single=parts, pair=[*parts, "$B:1"], special_tokens=marks)


def _sentencepiece(said: dict[str, Any]) -> Any:
    """BPE in the manner of sentencepiece: what two pieces make is merged if it is a token, the best score first."""
    from tokenizers import Tokenizer, models

    ids = {text: number for number, text in enumerate(said["tokens"])}
    unknown = said.get("unknown_token_id", 0)
    bpe: Any = models.BPE(
        ids,
        _merges(said["tokens"], said["scores"], ids),
        unk_token=said["tokens"][unknown],
        fuse_unk=True,
        byte_fallback=ids.keys() >= _BYTES,
    )
    made = Tokenizer(bpe)
    _spaces(made, [], prefix=said.get("add_space_prefix", True))
    return made


def _spaces(made: Any, first: list[Any], *, prefix: bool) -> None:
    """Have a tokenizer write spaces by their sign, after some first steps of its normalizer."""
    from tokenizers import decoders, normalizers

    steps = [*first, *([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
    made.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)


def _unigram(said: dict[str, Any]) -> Any:
    """The likeliest pieces; what is not known is one unknown token."""
    from tokenizers import Regex, Tokenizer, models, normalizers

    vocabulary = list(zip(said["tokens"], said["scores"], strict=True))
    made = Tokenizer(models.Unigram(vocabulary, said.get("unknown_token_id", 2), byte_fallback=False))
    first: list[Any] = []
    if said.get("precompiled_charsmap"):
        first.append(normalizers.Precompiled(bytes(said["precompiled_charsmap"])))
    one = said.get("remove_extra_whitespaces", False)
    if one:
        first += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(left=True, right=True)]
    _spaces(made, first, prefix=one or said.get("add_space_prefix", False))
    return made


def _merges(tokens: list[str], scores: list[float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, those of the best score first."""
    found = []
    for number, text in enumerate(tokens):
        pairs = ((text[:at], text[at:]) for at in range(1, len(text)))
        found += [(-scores[number], number, pair) for pair in pairs if pair[0] in ids and pair[1] in ids]
    return [pair for _, _, pair in sorted(found)]


def _byte_level(said: dict[str, Any]) -> Any:
    """Byte-level BPE, with the text cut as the file says; None if that is by a name which is not known."""
    from tokenizers import Tokenizer, decoders, models

    cut = cut_by(said.get("pre", ""))
    if cut is None:
        return None
    ids = {text: number for number, text in enumerate(said["tokens"])}
    merges = [tuple(pair.split(" ", 1)) for pair in said["merges"]]
    content = json.loads(Tokenizer(models.BPE(ids, merges, ignore_merges=cut.whole)).to_str())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(cut.steps)}
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.ByteLevel()
    return made
