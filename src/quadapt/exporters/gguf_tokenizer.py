"""The tokenizer in a GGUF file: its vocabulary (`gguf_vocabulary.py`), its marks, and its chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quadapt.errors import ExportError
from quadapt.exporters.gguf_vocabulary import lacking_bytes, read_vocabulary, with_bytes
from quadapt.hf.ending import turn_end

if TYPE_CHECKING:
    from gguf import GGUFWriter

_KNOWN_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>"),
}
"""Tokens that llama.cpp takes for the end of a text by their name."""


def write_tokenizer(writer: GGUFWriter, tokenizer: Any, model: Any, added: Sequence[str] = ()) -> list[str]:
    """Describe the (fast) tokenizer of a model, with tokens for bytes `added` to it; returns notes.

    Raises:
        ExportError: llama.cpp has no tokenizer that is known to do the same.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ExportError(
            f"{type(tokenizer).__name__}: is not a fast tokenizer, with its rules in a tokenizer.json. "
            "Load it with AutoTokenizer"
        )
    rows = model.config.get_text_config().vocab_size
    vocabulary = read_vocabulary(json.loads(tokenizer.backend_tokenizer.to_str()), rows)
    if added:
        vocabulary = with_bytes(vocabulary, added)
        writer.add_array("tokenizer.ggml.suppress_tokens", list(range(rows, rows + len(added))))  # never answers
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.model == "t5":
        writer.add_remove_extra_whitespaces(vocabulary.one_space)
        if vocabulary.charsmap:
            writer.add_precompiled_charsmap(vocabulary.charsmap)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        writer.add_chat_template(
            template
            if isinstance(template, str)
            else [{"name": name, "template": text} for name, text in template.items()]
        )
    return vocabulary.notes + _write_special(writer, tokenizer, model, vocabulary.unknown)


def _write_special(writer: GGUFWriter, tokenizer: Any, model: Any, unknown: int | None) -> list[str]:
    """Tokens that begin and end a text, and whether the tokenizer adds them."""
    ends = _ends(tokenizer, model)
    writer.add_eos_token_id(ends[0])
    for token, write in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.unk_token_id if unknown is None else unknown, writer.add_unk_token_id),
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


def bytes_to_add(tokenizer: Any) -> tuple[list[str], int] | None:
    """The tokens for bytes that a (fast) tokenizer lacks, and the unknown token that they stand for; None if none."""
    return lacking_bytes(json.loads(tokenizer.backend_tokenizer.to_str())) if tokenizer.is_fast else None
