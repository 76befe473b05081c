"""How byte-level tokenizers cut a text before they merge, by the names that llama.cpp has for it.

llama.cpp has each way of cutting built in, under a name that a file says; its regular expressions are translations of
those of `tokenizer.json`. Here are the originals, so that a tokenizer is known by its steps when a file is written, and
the steps by the name when it is read. What the translations do otherwise is said with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

TEKKEN = rf"{_WORDS[0]}|{_WORDS[1]}|\p{{N}}{_REST}"
"""The pieces of Mistral's Tekken: words end where a capital follows a small letter."""

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

GPT4O = rf"{_WORDS[0]}{_SHORT}|{_WORDS[1]}{_SHORT}|\p{{N}}{{1,3}}{_REST}"
"""The pieces of GPT-4o's tokenizer (o200k), which Phi-4-mini has."""

DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""The three cuts of DeepSeek V3 and R1, one after the other."""

_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN)
"""The cuts of DeepSeek-Coder, before digits are taken apart."""

_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113"
    "\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    "\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _HAN,
)
"""The cuts of DeepSeek-LLM, before digits are taken apart."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A way to cut a text that llama.cpp has under a name."""

    name: str
    """The name that a GGUF file says, as `tokenizer.ggml.pre`."""

    steps: tuple[dict[str, Any], ...]
    """The steps of the pre_tokenizer, as `tokenizer.json` has them."""

    whole: bool = False
    """Whether a piece that is a token is taken whole, whatever the merges are (`ignore_merges`)."""

    differs: str = ""
    """Which texts llama.cpp cuts otherwise, in words; empty if none are known."""


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(*, regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _digits(*, each: bool) -> dict[str, Any]:
    return {"type": "Digits", "individual_digits": each}


def _by(*patterns: str, digits: bool = False) -> tuple[dict[str, Any], ...]:
    return (*map(_split, patterns), *([_digits(each=True)] if digits else []), _bytes(regex=False))


_MARKS = "words with capitals other than A to Z, or with combining marks (Hindi, Thai), are cut elsewhere by llama.cpp"

CUTS = (
    Cut(name="gpt-2", steps=(_bytes(regex=True),)),
    Cut(name="smollm", steps=(_digits(each=True), _bytes(regex=True))),
    Cut(name="llama-bpe", steps=_by(LLAMA3), whole=True),
    Cut(name="dbrx", steps=_by(LLAMA3)),  # Llama 3's cuts, but words are merged step by step
    Cut(name="qwen2", steps=_by(QWEN2)),  # and StableLM 2
    Cut(name="bloom", steps=_by(BLOOM)),
    Cut(name="viking", steps=_by(BLOOM, digits=True)),
    Cut(
        name="falcon",
        steps=(
            {"type": "Punctuation", "behavior": "Contiguous"},
            _bytes(regex=True),
            _digits(each=False),
            _split("[0-9][0-9][0-9]"),
        ),
    ),
    Cut(name="tekken", steps=_by(TEKKEN), whole=True, differs=_MARKS),
    Cut(name="gpt-4o", steps=_by(GPT4O), differs=_MARKS),
    Cut(name="deepseek-llm", steps=_by(*DEEPSEEK_LLM, digits=True)),
    Cut(name="deepseek-coder", steps=_by(*DEEPSEEK_CODER, digits=True)),
    Cut(name="deepseek-v3", steps=_by(*DEEPSEEK_V3)),
)
"""All ways to cut a text that have been compared with llama.cpp's."""

ALSO = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "stablelm2": "qwen2", "deepseek-r1-qwen": "qwen2"}
"""Other names of the same cuts, which files of others have."""


def cut_by(name: str) -> Cut | None:
    """The way to cut a text that a file names; None if it is not one of those that are known here."""
    return next((cut for cut in CUTS if cut.name == ALSO.get(name, name)), None)


def cut_of(steps: Sequence[Mapping[str, Any]], *, whole: bool) -> Cut | None:
    """The way to cut a text by the steps of a pre_tokenizer; None if llama.cpp is not known to have it."""
    known = [_plain(step) for step in steps]
    return next((cut for cut in CUTS if [_plain(step) for step in cut.steps] == known and cut.whole == whole), None)


def _plain(step: Mapping[str, Any]) -> dict[str, Any]:
    """What a step does, without what has no effect; line ends in patterns are spelled one way."""
    plain = {name: value for name, value in step.items() if name != "trim_offsets"}
    pattern = plain.get("pattern")
    if isinstance(pattern, Mapping) and "Regex" in pattern:
        plain["pattern"] = pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n").replace(r"\"", '"')
    return plain
