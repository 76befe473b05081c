"""Tokens against the rows that a model has for them: which it lacks, and which it cannot tell apart."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quadapt.errors import CheckpointError, ConfigError
from quadapt.model.select import ends_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOISE = 0.01
"""Rows that differ by less, relative to their norm, are those of tokens that were never trained."""


def embedding_rows(model: nn.Module) -> int:
    """Tokens that a model takes and gives: rows of its embedding, or of its head if that has fewer."""
    weights = [getattr(part, "weight", None) for part in ends_of(model)]
    return min((len(weight) for weight in weights if weight is not None), default=sys.maxsize)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> str:
    """What is to be said about a tokenizer's tokens that a model has no row for; empty if there are none.

    A pad token alone may lie beyond: no padding is ever looked at, so another token pads as well.

    Raises:
        CheckpointError: Other tokens lie beyond: the tokenizer is another model's, or the model was not resized.
    """
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return ""
    if set(beyond) == {tokenizer.pad_token_id} and tokenizer.eos_token_id not in (None, tokenizer.pad_token_id):
        return (
            f"the tokenizer's pad token {tokenizer.pad_token} ({tokenizer.pad_token_id}) has no row among the model's "
            f"{rows:,}; {tokenizer.eos_token} pads"
        )
    first = min(beyond)
    more = f" and {len(beyond) - 1:,} more" if len(beyond) > 1 else ""
    raise CheckpointError(
        f"the tokenizer has a token {first} ({beyond[first]!r}){more}, the model {rows:,} rows of embeddings: they do "
        "not belong together. Give the model its own tokenizer, or add rows (model.resize_token_embeddings)"
    )


def without_additions(tokenizer: Any) -> Any:
    """A tokenizer with the tokens of its own vocabulary alone, changed in place.

    transformers adds its class's usual marks (`<|endoftext|>`) to the tokenizer of a GGUF file, which has all of its
    tokens in its vocabulary; a model has no rows for more.
    """
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    count = len(content["model"]["vocab"])
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < count]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    for role, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str) and (tokenizer.convert_tokens_to_ids(token) or 0) >= count:
            setattr(tokenizer, role, None)
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that stand for no text: marks of turns, ends, padding."""
    return set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))


@torch.no_grad()
def alike(model: nn.Module, token: int) -> int:
    """How many other tokens have the output row of `token`, up to noise, so that a frozen head gives all the same."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or not head.weight.is_floating_point():
        return 0
    weight: Tensor = head.weight
    row, count = weight[token].float(), 0
    bias = getattr(head, "bias", None)
    for start in range(0, len(weight), 8192):  # a float32 copy of all rows may not fit
        part = weight[start : start + 8192].float()
        same = (part - row).norm(dim=1) <= NOISE * row.norm()
        if bias is not None:
            same &= (bias[start : start + 8192] - bias[token]).abs().float() <= NOISE * row.norm()
        count += int(same.sum())
    return count - 1


def token_ids(names: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Ids of tokens given by name, or by number.

    Raises:
        ConfigError: There is no such token.
    """
    found = []
    for name in names:
        known = tokenizer.get_vocab() if tokenizer is not None else {}
        if name in known:
            found.append(known[name])
        elif name.isdecimal() and (tokenizer is None or int(name) in known.values()):
            found.append(int(name))
        else:
            raise ConfigError(f"train_tokens: the tokenizer has no token {name!r}. Name one of its tokens, or its id")
    return sorted(set(found))


def token_layers(model: nn.Module, ids: Sequence[int]) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices` for rows of embedding and head; of the embedding alone where the two are tied.

    Raises:
        ConfigError: The head cannot train single rows, or has no such row.
    """
    if not ids:
        return None
    takes: Any = model.get_input_embeddings()  # type: ignore[operator]
    gives: Any = model.get_output_embeddings()  # type: ignore[operator]
    if max(ids) >= embedding_rows(model):
        raise ConfigError(
            f"train_tokens: the model has {embedding_rows(model):,} rows of embeddings, none for {max(ids)}"
        )
    names = {module: name for name, module in model.named_modules()}
    layers = {names[takes]: list(ids)}
    if gives.weight is not takes.weight:
        if getattr(gives, "bias", None) is not None or type(gives) is not nn.Linear:
            raise ConfigError(
                f"train_tokens: {names[gives]} {'has a bias' if type(gives) is nn.Linear else 'is quantized'}, so its "
                "rows cannot be trained one by one. Leave train_tokens out"
            )
        layers[names[gives]] = list(ids)
    return layers
