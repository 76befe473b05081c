"""The tokenizer, in llama.cpp's terms.

llama.cpp does not read `tokenizer.json`: it has tokenizers of its own, and a file names the one to use. So each form of tokenizer
that is known here has been compared with llama.cpp, and any other is refused: a wrong guess tokenizes almost right, and the model
answers almost well.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from quadapt.errors import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SPACE = "\u2581"
"""Sentencepiece's sign for a space."""

_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_KNOWN_ENDS = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "</s>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>"}
"""Tokens that llama.cpp takes for an end of generation by their text."""


@dataclass(frozen=True)
class _Vocabulary:
    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    space_prefix: bool
    notes: list[str]


def write_tokenizer(writer: GGUFWriter, tokenizer: Any, model: nn.Module) -> list[str]:
    """Describe a (fast) tokenizer; returns notes.

    Raises:
        ExportError: llama.cpp has no tokenizer that is known to do the same.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ExportError(f"{type(tokenizer).__name__}: is not a fast tokenizer, which keeps its rules in a tokenizer.json. Load it "
                          "with AutoTokenizer")
    config: Any = model.config
    vocabulary = _read(json.loads(tokenizer.backend_tokenizer.to_str()), config.vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    notes = vocabulary.notes + _write_special(writer, tokenizer, model)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else
                                 [{"name": name, "template": text} for name, text in tokenizer.chat_template.items()])
    return notes


def _write_special(writer: GGUFWriter, tokenizer: Any, model: nn.Module) -> list[str]:
    generation = getattr(model, "generation_config", None)
    ends = generation.eos_token_id if generation is not None and generation.eos_token_id is not None else model.config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends = list(dict.fromkeys([*([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *ends]))
    if not ends:
        raise ExportError("neither tokenizer nor model names a token that ends a text, and llama.cpp would then take one by its "
                          "number. Set tokenizer.eos_token")
    writer.add_eos_token_id(ends[0])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    before, after = _added(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    more = [end for end in ends[1:] if tokenizer.convert_ids_to_tokens(end) not in _KNOWN_ENDS]
    for end, write in zip(more, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        write(end)
    return [f"llama.cpp does not stop at token {end}, which ends a text for this model" for end in more[2:]]


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text and eos after it."""
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise ExportError(f"the tokenizer puts tokens {before} before a text and {after} after it; llama.cpp can add bos and eos. "
                          "Simplify its post_processor")
    return bool(before), bool(after)


def _read(data: dict[str, Any], size: int) -> _Vocabulary:
    """Sort out a tokenizer.json for a model with `size` rows in its embedding."""
    import gguf

    if data["model"].get("type") != "BPE":
        raise ExportError(f"tokenizer.json: a model of type {data['model'].get('type')} cannot be written, only BPE (byte-level, or "
                          "in the manner of sentencepiece)")
    names = {index: token for token, index in data["model"]["vocab"].items()}
    added = {token["id"]: token for token in data["added_tokens"]}
    names |= {index: token["content"] for index, token in added.items()}
    if max(names) >= size:
        raise ExportError(f"the tokenizer has token {max(names)}, the model {size} rows of embeddings. They do not belong together")
    unknown, kind = data["model"].get("unk_token"), gguf.TokenType
    types = [kind.UNUSED] * size
    for index, token in names.items():
        types[index] = kind.NORMAL
        if index in added:
            types[index] = kind.CONTROL if added[index]["special"] else kind.USER_DEFINED
        if data["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[index] = kind.BYTE
    tokens = [names.get(index, f"[PAD{index}]") for index in range(size)]
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in data["model"]["merges"]]
    notes = [f"{token['content']!r}: llama.cpp does not strip the spaces around it, or find it in words only, as the tokenizer does"
             for token in added.values() if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if _uses_bytes(data):
        pre, more = _pre(data)
        return _Vocabulary("gpt2", pre, tokens, types, [], [" ".join(merge) for merge in merges], False, notes + more)
    if unknown in data["model"]["vocab"]:
        types[data["model"]["vocab"][unknown]] = kind.UNKNOWN
    prefix, more = _prefix(data)
    return _Vocabulary("llama", "default", tokens, types, _scores(tokens, merges), [], prefix, notes + more)


def _uses_bytes(data: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(data["pre_tokenizer"], "pretokenizers"))


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json that may be absent, single or a sequence."""
    return [] if part is None else part[key] if part["type"] == "Sequence" else [part]


def _pre(data: dict[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's name for how a byte-level tokenizer cuts text before it merges, and notes."""
    steps = _steps(data["pre_tokenizer"], "pretokenizers")
    *before, last = [_signature(step) for step in steps]
    whole = bool(data["model"].get("ignore_merges"))
    known = {
        ((), ("ByteLevel", True), False): "gpt-2",
        ((("Digits", True),), ("ByteLevel", True), False): "smollm",
        ((("Split", _LLAMA3),), ("ByteLevel", False), True): "llama-bpe",
        ((("Split", _LLAMA3),), ("ByteLevel", False), False): "dbrx",  # Llama 3's cuts, but words are merged step by step
        ((("Split", _QWEN2),), ("ByteLevel", False), False): "qwen2",
    }
    pre = known.get((tuple(before), last, whole))
    if pre is None:
        raise ExportError(f"tokenizer.json: pre_tokenizer {json.dumps(data['pre_tokenizer'])} with ignore_merges={whole} is not one "
                          f"that is known to be llama.cpp's {', '.join(sorted(known.values()))}. Use --format hf")
    normalizers = [step["type"] for step in _steps(data["normalizer"], "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise ExportError(f"tokenizer.json: llama.cpp does not do the normalizer {' + '.join(normalizers)}. Use --format hf")
    return pre, ["the tokenizer normalizes text (NFC), llama.cpp does not: give it composed characters"] if normalizers else []


def _signature(step: dict[str, Any]) -> tuple[str, Any]:
    """What matters of a step of a pre_tokenizer."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step["use_regex"]
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex")
    return kind, json.dumps(step)


def _prefix(data: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a sentencepiece-style tokenizer puts a space before a text, and notes."""
    normalizers = [(step["type"], step.get("prepend") or step.get("content")) for step in _steps(data["normalizer"], "normalizers")]
    pre = _steps(data["pre_tokenizer"], "pretokenizers")
    notes = [] if data["model"].get("byte_fallback") else [
        "the tokenizer has no bytes: for a character that it does not know it gives its unknown token, llama.cpp an error"]
    replace = ("Replace", _SPACE)
    if not pre and normalizers in ([replace], [("Prepend", _SPACE), replace]):
        return len(normalizers) == 2, notes
    if not normalizers and len(pre) == 1 and pre[0]["type"] == "Metaspace" and pre[0]["replacement"] == _SPACE and not pre[0]["split"]:
        prefix = pre[0]["prepend_scheme"] != "never"
        more = ["for a text that begins with a space llama.cpp puts one more before it, the tokenizer does not"]
        return prefix, notes + more if prefix else notes
    raise ExportError(f"tokenizer.json: normalizer {json.dumps(data['normalizer'])} with pre_tokenizer "
                      f"{json.dumps(data['pre_tokenizer'])} is neither byte-level BPE nor in the manner of sentencepiece. "
                      "Use --format hf")


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores that make llama.cpp, which merges the pair of best score first, follow the order of the merges."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]
