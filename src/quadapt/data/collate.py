"""Batches from sequences of unequal length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quadapt.errors import DataError
from quadapt.nn.objective import NO_LOSS as NO_LOSS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pad_token_id(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> int:
    """The id to pad with: the pad token's, or the end of sequence's (no loss is masked by ids, so none is lost).

    Args:
        tokenizer: The tokenizer, which names these tokens.
        rows: How many rows the model's embedding has: a pad token without one does not pad.

    Raises:
        DataError: The tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (rows is None or token < rows):
            return int(token)
    raise DataError(
        "the tokenizer has neither a pad token nor an end-of-sequence token. Set tokenizer.pad_token to "
        "one of its tokens"
    )


@dataclass(frozen=True)
class Collator:
    """Pads sequences on the right to the longest of a batch.

    Packed sequences get no attention mask: where there is none, and no cache either, transformers keeps apart what
    begins at a restart of `position_ids`. Hence `use_cache`. Each padding token has position 0, so it stands alone.
    """

    pad_token_id: int
    """The token that fills `input_ids` behind the end of a short sequence."""

    def __call__(self, sequences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `labels` `[batch, length]` and `attention_mask`, or `position_ids` if sequences have them."""
        batch: dict[str, Any] = {
            "input_ids": _padded(sequences, "input_ids", self.pad_token_id),
            "labels": _padded(sequences, "labels", NO_LOSS),
        }
        if "position_ids" in sequences[0]:
            return batch | {"position_ids": _padded(sequences, "position_ids", 0), "use_cache": False}
        lengths = torch.tensor([len(sequence["input_ids"]) for sequence in sequences])
        return batch | {"attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}


def _padded(sequences: Sequence[Mapping[str, Any]], column: str, padding: int) -> Tensor:
    columns = [torch.as_tensor(sequence[column], dtype=torch.long) for sequence in sequences]
    return pad_sequence(columns, batch_first=True, padding_value=padding)
