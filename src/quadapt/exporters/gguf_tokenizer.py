"""The tokenizer, in llama.cpp's terms.

llama.cpp does not read `tokenizer.json`: it has tokenizers of its own, and a file names the one to use. So each form
of tokenizer that is known here has been compared with llama.cpp's, and any other is refused: a wrong guess tokenizes
almost right, and the model answers almost well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quadapt.errors import ExportError
from quadapt.hf.ending import turn_end
from quadapt.importers.gguf_splits import BLOOM, LLAMA3, QWEN2

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType

_SPACE = "\u2581"
"""The sign that sentencepiece writes for a space."""

_BYTES, _BYTES_AFTER = ("ByteLevel", True), ("ByteLevel", False)

_FALCON = (("Punctuation", "Contiguous"), _BYTES, ("Digits", False), ("Split", "[0-9][0-9][0-9]"))

_PRE_TOKENIZERS = {
    ((_BYTES,), False): "gpt-2",
    ((("Digits", True), _BYTES), False): "smollm",
    ((("Split", LLAMA3), _BYTES_AFTER), True): "llama-bpe",
    ((("Split", LLAMA3), _BYTES_AFTER), False): "dbrx",  # Llama 3's cuts, but words are merged step by step
    ((("Split", QWEN2), _BYTES_AFTER), False): "qwen2",  # and StableLM 2
    ((("Split", BLOOM), _BYTES_AFTER), False): "bloom",
    (_FALCON, False): "falcon",
}
"""llama.cpp's names for how byte-level tokenizers cut a text, by the steps of the pre_tokenizer and `ignore_merges`."""

_ON_SPACES = (
    "Split",
    json.dumps({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}),
)
"""A step of Gemma's, which does nothing: by then its normalizer has replaced all spaces."""

_KNOWN_ENDS = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
}
"""Tokens that llama.cpp takes for the end of a text by their name."""


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float]
    merges: list[str]
    space_prefix: bool
    notes: list[str]


def write_tokenizer(writer: GGUFWriter, tokenizer: Any, model: Any) -> list[str]:
    """Describe the (fast) tokenizer of a model; returns notes.

    Raises:
        ExportError: llama.cpp has no tokenizer that is known to do the same.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ExportError(
            f"{type(tokenizer).__name__}: is not a fast tokenizer, with its rules in a tokenizer.json. "
            "Load it with AutoTokenizer"
        )
    vocabulary = _read(json.loads(tokenizer.backend_tokenizer.to_str()), model.config.get_text_config().vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        writer.add_chat_template(
            template
            if isinstance(template, str)
            else [{"name": name, "template": text} for name, text in template.items()]
        )
    return vocabulary.notes + _write_special(writer, tokenizer, model)


def _write_special(writer: GGUFWriter, tokenizer: Any, model: Any) -> list[str]:
    """Tokens that begin and end a text, and whether the tokenizer adds them."""
    ends = _ends(tokenizer, model)
    writer.add_eos_token_id(ends[0])
    for token, write in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None:
            write(token)
    before, after = _added(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    turn = turn_end(tokenizer)
    more = [end for end in ends[1:] if end != turn and tokenizer.convert_ids_to_tokens(end) not in _KNOWN_ENDS]
    slots = [*([] if turn is not None else [writer.add_eot_token_id]), writer.add_eom_token_id]
    if turn is not None:
        writer.add_eot_token_id(turn)
    for end, write in zip(more, slots, strict=False):
        write(end)
    return [f"token {end} ends a text for this model, and llama.cpp does not stop at it" for end in more[len(slots) :]]


def _ends(tokenizer: Any, model: Any) -> list[int]:
    """Tokens that end a text: the tokenizer's first, then those of the model's configs."""
    named = [tokenizer.eos_token_id]
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        end = getattr(config, "eos_token_id", None)
        named += end if isinstance(end, list) else [end]
    ends = [end for end in dict.fromkeys(named) if end is not None]
    if not ends:
        raise ExportError(
            "neither the tokenizer nor the model names a token that ends a text; llama.cpp would take "
            "one by its number. Set tokenizer.eos_token"
        )
    return ends


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text and eos after it."""
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise ExportError(
            f"the tokenizer puts tokens {before} before a text and {after} after it; llama.cpp can add "
            "bos and eos alone. Simplify the post_processor of tokenizer.json"
        )
    return bool(before), bool(after)


def _read(data: dict[str, Any], size: int) -> _Vocabulary:
    """Sort out a tokenizer.json, for a model with `size` rows of embeddings."""
    bpe = data["model"]
    if bpe["type"] != "BPE":
        raise ExportError(
            f"tokenizer.json: its model is {bpe['type']}; only BPE can be written (byte-level, or in the "
            "manner of sentencepiece). Use --format hf"
        )
    tokens, types = _tokens(data, size)
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in bpe["merges"]]
    notes = [
        f"llama.cpp finds {token['content']!r} anywhere and strips no spaces around it; the tokenizer may differ"
        for token in data["added_tokens"]
        if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    if any(type_ == "ByteLevel" for type_, _ in _steps(data["pre_tokenizer"], "pretokenizers")):
        pre, more = _pre(data)
        return _Vocabulary(
            model="gpt2",
            pre=pre,
            tokens=tokens,
            types=types,
            scores=[],
            space_prefix=False,
            merges=[" ".join(merge) for merge in merges],
            notes=notes + more,
        )
    prefix, more = _prefix(data)
    return _Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges),
        merges=[],
        space_prefix=prefix,
        notes=notes + more,
    )


def _tokens(data: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Text and type of each token; rows of embeddings without a token get an unused one."""
    from gguf import TokenType

    added = {token["id"]: token for token in data["added_tokens"]}
    names = {index: name for name, index in data["model"]["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    if max(names) >= size:
        raise ExportError(
            f"the tokenizer has a token {max(names)}, the model only {size} rows of embeddings: they do "
            "not belong together"
        )

    def token_type(index: int) -> TokenType:
        if index not in names:
            return TokenType.UNUSED
        if data["model"]["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", names[index]):
            return TokenType.BYTE
        if names[index] == data["model"]["unk_token"]:
            return TokenType.UNKNOWN
        if index in added:
            return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        return TokenType.NORMAL

    return [names.get(index, f"[PAD{index}]") for index in range(size)], [token_type(index) for index in range(size)]


def _steps(part: dict[str, Any] | None, key: str) -> list[tuple[str, Any]]:
    """The steps of a normalizer or pre_tokenizer (absent, one, or a sequence): type, and what matters of each."""
    steps = [] if part is None else part[key] if part["type"] == "Sequence" else [part]
    return [(step["type"], _setting(step)) for step in steps]


def _setting(step: dict[str, Any]) -> Any:
    """What matters of a step, if the rest is as usual; else all of it, which no rule here will match."""
    rest = {name: value for name, value in step.items() if name not in ("type", "trim_offsets")}
    usual: dict[str, tuple[str, dict[str, Any]]] = {
        "ByteLevel": ("use_regex", {"add_prefix_space": False}),
        "Digits": ("individual_digits", {}),
        "Punctuation": ("behavior", {}),
        "Split": ("pattern", {"behavior": "Isolated", "invert": False}),
        "Prepend": ("prepend", {}),
        "Replace": ("content", {"pattern": {"String": " "}}),
        "Metaspace": ("prepend_scheme", {"replacement": _SPACE, "split": False}),
    }
    name, others = usual.get(step["type"], ("", {}))
    value = rest.pop(name, None)
    if rest != others:
        return json.dumps(step)
    return value["Regex"] if isinstance(value, dict) and "Regex" in value else value


def _pre(data: dict[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's name for how a byte-level tokenizer cuts a text, and notes."""
    whole = bool(data["model"]["ignore_merges"])
    pre = _PRE_TOKENIZERS.get((tuple(_steps(data["pre_tokenizer"], "pretokenizers")), whole))
    if pre is None:
        raise ExportError(
            f"tokenizer.json: pre_tokenizer {json.dumps(data['pre_tokenizer'])} with ignore_merges="
            f"{whole} is not one that is known to be llama.cpp's {' or '.join(_PRE_TOKENIZERS.values())}"
            ". Use --format hf"
        )
    normalizers = [type_ for type_, _ in _steps(data["normalizer"], "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise ExportError(f"tokenizer.json: llama.cpp has no normalizer {' + '.join(normalizers)}. Use --format hf")
    return pre, ["the tokenizer composes characters (NFC), llama.cpp takes them as they come"] if normalizers else []


def _prefix(data: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a sentencepiece-style tokenizer puts a space before a text, and notes."""
    normalizers, pre = _steps(data["normalizer"], "normalizers"), _steps(data["pre_tokenizer"], "pretokenizers")
    notes = (
        []
        if data["model"]["byte_fallback"]
        else ["the tokenizer has no bytes: what it does not know becomes its unknown token, and in llama.cpp an error"]
    )
    if pre in ([], [_ON_SPACES]) and normalizers in ([("Replace", _SPACE)], [("Prepend", _SPACE), ("Replace", _SPACE)]):
        return len(normalizers) == 2, notes
    if not normalizers and pre == [("Metaspace", "never")]:
        return False, notes
    if not normalizers and pre in ([("Metaspace", "first")], [("Metaspace", "always")]):
        return True, [*notes, "to a text that begins with a space llama.cpp adds one more, the tokenizer does not"]
    raise ExportError(
        f"tokenizer.json: normalizer {json.dumps(data['normalizer'])} with pre_tokenizer "
        f"{json.dumps(data['pre_tokenizer'])} is neither byte-level nor in the manner of sentencepiece. "
        "Use --format hf"
    )


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Scores that make llama.cpp, which takes the pair of the best score first, follow the order of the merges."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]
