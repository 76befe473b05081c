"""What a tokenizer.json says, in llama.cpp's terms: the kind of tokenizer, the pieces, and their scores or merges.

llama.cpp does not read `tokenizer.json`: it has tokenizers of its own, and a file names the one to use. So each form
of tokenizer that is known here has been compared with llama.cpp's, and any other is refused: a wrong guess tokenizes
almost right, and the model answers almost well.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quadapt.errors import ExportError
from quadapt.exporters.gguf_spaces import read_spaces, steps_of
from quadapt.importers.gguf_splits import CUTS, cut_of

if TYPE_CHECKING:
    from gguf import TokenType

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
"""The names of the tokens that stand for bytes."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer as a GGUF file describes it."""

    model: str
    """llama.cpp's name for its kind: gpt2 (byte-level BPE), llama (BPE as sentencepiece has it) or t5 (unigram)."""

    tokens: list[str]
    """The text of each token, by its number."""

    types: list[TokenType]
    """What kind of token each is."""

    pre: str = "default"
    """llama.cpp's name for how a text is cut before it is merged, where it is."""

    scores: list[float] = field(default_factory=list)
    """The score of each token; empty where merges decide."""

    merges: list[str] = field(default_factory=list)
    """Pairs of tokens that are merged, in order; empty where scores decide."""

    space_prefix: bool = False
    """Whether a space is put before a text."""

    one_space: bool = False
    """Whether runs of spaces become one, and those at the ends are taken off."""

    charsmap: bytes = b""
    """The table by which sentencepiece normalizes characters; empty if there is none."""

    unknown: int | None = None
    """The token for what the tokenizer does not know, if the kind of tokenizer has one of its own."""

    notes: list[str] = field(default_factory=list)
    """What llama.cpp does otherwise, in words."""


def read_vocabulary(data: dict[str, Any], size: int) -> Vocabulary:
    """Sort out a tokenizer.json, for a model with `size` rows of embeddings.

    Raises:
        ExportError: llama.cpp has no tokenizer that is known to do the same.
    """
    model = data["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise ExportError(
            f"tokenizer.json: its model is {model['type']}; BPE (byte-level, or in the manner of sentencepiece) and "
            "Unigram can be written. Use --format hf"
        )
    found = _unigram(data, size) if model["type"] == "Unigram" else _bpe(data, size)
    notes = [
        f"llama.cpp finds {token['content']!r} anywhere and strips no spaces around it; the tokenizer may differ"
        for token in data["added_tokens"]
        if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    return replace(found, notes=notes + found.notes)


def _bpe(data: dict[str, Any], size: int) -> Vocabulary:
    names = {index: name for name, index in data["model"]["vocab"].items()}
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in data["model"]["merges"]]
    if any(type_ == "ByteLevel" for type_, _ in steps_of(data["pre_tokenizer"], "pretokenizers")):
        tokens, types = _tokens(data, names, size)
        pre, notes = _pre(data)
        pairs = [" ".join(merge) for merge in merges]
        return Vocabulary(model="gpt2", pre=pre, tokens=tokens, types=types, merges=pairs, notes=notes)
    prefix, notes = _prefix(data)
    whole = data["model"]["byte_fallback"] and set(names.values()) >= _BYTES
    tokens, types = _tokens(data, names, size, data["model"]["unk_token"], by_bytes=whole)
    if not whole:
        notes.append(_without_bytes(data, names))
    others = _merged_otherwise(set(names.values()), merges)
    if others:
        notes.append(
            f"llama.cpp merges whatever makes a token, this tokenizer the pairs of its list alone, which lacks some: "
            f"words with {len(others)} of its tokens ({', '.join(map(repr, others[:3]))}, ..) may be cut otherwise"
        )
    scores = _scores(tokens, merges)
    return Vocabulary(model="llama", tokens=tokens, types=types, scores=scores, space_prefix=prefix, notes=notes)


def lacking_bytes(data: dict[str, Any]) -> tuple[list[str], int] | None:
    """The tokens for bytes that a sentencepiece-style BPE tokenizer lacks, and its unknown token.

    None if it lacks none, if it is of another kind, or if it has no unknown token.
    """
    model = data["model"]
    by_bytes = any(kind == "ByteLevel" for kind, _ in steps_of(data["pre_tokenizer"], "pretokenizers"))
    lacks = sorted(_BYTES - set(model["vocab"])) if model["type"] == "BPE" and not by_bytes else []
    return (lacks, model["vocab"][model["unk_token"]]) if lacks and model["unk_token"] in model["vocab"] else None


def with_bytes(found: Vocabulary, lacks: Sequence[str]) -> Vocabulary:
    """A vocabulary with tokens for bytes after all others, which stand for the unknown one."""
    from gguf import TokenType

    notes = [note for note in found.notes if "has no bytes" not in note]
    notes.append(
        f"{len(lacks)} tokens for bytes were added, whose rows are those of the unknown token: what the tokenizer does "
        "not know is several of them in llama.cpp, where it is one unknown token in transformers"
    )
    return replace(
        found,
        tokens=[*found.tokens, *lacks],
        types=[*found.types, *[TokenType.BYTE] * len(lacks)],
        scores=[*found.scores, *[min(found.scores) - 1] * len(lacks)],
        notes=notes,
    )


def _without_bytes(data: dict[str, Any], names: Mapping[int, str]) -> str:
    """What is said of a tokenizer that does not write in bytes what it does not know."""
    if set(names.values()) >= _BYTES:
        return "what it does not know the tokenizer takes for its unknown token, llama.cpp for bytes"
    said = " (though it says byte_fallback)" if data["model"]["byte_fallback"] else ""
    return (
        f"the tokenizer has no bytes{said}: what it does not know becomes its unknown token, and in llama.cpp an "
        "error, with which the request fails (--unknown bytes adds tokens for bytes)"
    )


def _merged_otherwise(tokens: set[str], merges: Sequence[Sequence[str]]) -> list[str]:
    """Tokens that two others make together which are no pair of the list: llama.cpp merges them nevertheless."""
    pairs = {(left, right) for left, right in merges}

    def lacks(token: str) -> bool:
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        return any(left in tokens and right in tokens and (left, right) not in pairs for left, right in splits)

    return sorted(token for token in tokens if token not in _BYTES and lacks(token))


def _unigram(data: dict[str, Any], size: int) -> Vocabulary:
    """A tokenizer that takes the likeliest pieces."""
    model = data["model"]
    names = {index: name for index, (name, _) in enumerate(model["vocab"])}
    unknown = model["unk_id"]
    tokens, types = _tokens(data, names, size, None if unknown is None else names[unknown])
    scores = [float(score) for _, score in model["vocab"]] + [0.0] * (size - len(names))
    form = read_spaces(data, tokens)
    notes = list(form.notes)
    if unknown is None:
        raise ExportError("tokenizer.json: its Unigram model has no unk_id, and llama.cpp needs one. Use --format hf")
    if model.get("byte_fallback"):
        notes.append("what it does not know the tokenizer writes in bytes, llama.cpp takes it for the unknown token")
    return Vocabulary(
        model="t5",
        tokens=tokens,
        types=types,
        scores=scores,
        space_prefix=form.prefix,
        one_space=form.one,
        charsmap=form.charsmap,
        unknown=unknown,
        notes=notes,
    )


def _tokens(
    data: dict[str, Any], names: Mapping[int, str], size: int, unknown: str | None = None, *, by_bytes: bool = False
) -> tuple[list[str], list[TokenType]]:
    """Text and type of each token; rows of embeddings without a token get an unused one."""
    from gguf import TokenType

    added = {token["id"]: token for token in data["added_tokens"]}
    names = {**names, **{index: token["content"] for index, token in added.items()}}
    if max(names) >= size:
        raise ExportError(
            f"the tokenizer has a token {max(names)}, the model only {size} rows of embeddings: they do "
            "not belong together"
        )
    twice = next((name for name, count in Counter(names.values()).items() if count > 1), None)
    if twice is not None:
        raise ExportError(f"the tokenizer has more than one token {twice!r}, which llama.cpp does not take")

    def token_type(index: int) -> TokenType:
        if index not in names:
            return TokenType.UNUSED
        if by_bytes and names[index] in _BYTES:
            return TokenType.BYTE
        if names[index] == unknown:
            return TokenType.UNKNOWN
        if index in added:
            return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        return TokenType.NORMAL

    return [names.get(index, f"[PAD{index}]") for index in range(size)], [token_type(index) for index in range(size)]


def _pre(data: dict[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's name for how a byte-level tokenizer cuts a text, and notes."""
    whole = bool(data["model"]["ignore_merges"])
    part = data["pre_tokenizer"]
    cut = cut_of(part["pretokenizers"] if part["type"] == "Sequence" else [part], whole=whole)
    if cut is None:
        raise ExportError(
            f"tokenizer.json: pre_tokenizer {json.dumps(part)} with ignore_merges={whole} is not one that is known to "
            f"be llama.cpp's {' or '.join(cut.name for cut in CUTS)}. Use --format hf"
        )
    normalizers = [type_ for type_, _ in steps_of(data["normalizer"], "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise ExportError(f"tokenizer.json: llama.cpp has no normalizer {' + '.join(normalizers)}. Use --format hf")
    notes = [cut.differs] if cut.differs else []
    if normalizers:
        notes.append("the tokenizer composes characters (NFC), llama.cpp takes them as they come")
    return cut.name, notes


def _prefix(data: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a sentencepiece-style tokenizer puts a space before a text, and notes."""
    form = read_spaces(data, list(data["model"]["vocab"]))
    if form.one or form.charsmap:
        raise ExportError(
            f"tokenizer.json: normalizer {json.dumps(data['normalizer'])[:300]} changes more than spaces, which "
            "llama.cpp does for Unigram models alone. Use --format hf"
        )
    return form.prefix, list(form.notes)


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Scores that make llama.cpp, which takes the pair of the best score first, follow the order of the merges."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]
