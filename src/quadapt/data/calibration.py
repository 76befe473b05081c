"""Blocks of tokens to calibrate a quantization on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from quadapt.calibrate import Batch
from quadapt.data.examples import examples
from quadapt.data.read import Rows
from quadapt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Calibration:
    """Token blocks, and how many there are."""

    batches: list[Batch]
    """Token ids `[batch, length]`, without padding, or inputs by name; the last batch may be smaller."""

    sequences: int
    """How many blocks there are; fewer than were asked for if there is not enough data."""

    length: int
    """How many tokens each block has."""

    source: str
    """Where the text comes from, in words."""

    @property
    def tokens(self) -> int:
        """How many tokens all blocks have together."""
        return self.sequences * self.length


def calibration_batches(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    sequences: int = 128,
    batch: int = 8,
    seed: int = 0,
    at_least: int | None = None,
) -> Calibration:
    """Draw blocks of equal length from rows that are shuffled, tokenized as for training, and joined end to end.

    No token is drawn twice. A large dataset is tokenized only as far as is needed.

    Args:
        rows: Rows of any kind; of examples with a prompt, prompt and completion are taken.
        tokenizer: The tokenizer of the model.
        length: How many tokens a block has.
        sequences: How many blocks to draw. Where there are fewer, all are taken.
        batch: How many blocks a batch has.
        seed: The seed of the shuffling: equal seeds draw equal blocks.
        at_least: If there are fewer tokens than `length`, or than so many blocks of it need, blocks are shorter, so
            that all of the text makes so many. None: `length` holds.

    Raises:
        ConfigError: `length`, `sequences` or `batch` is not positive.
        DataError: There is not a single block.
    """
    if min(length, sequences, batch) < 1:
        raise ConfigError(f"calibration needs positive length={length}, sequences={sequences} and batch={batch}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = rows.select(torch.randperm(len(rows), generator=generator).tolist())
    parts, tokens = [], 0
    has_eos = tokenizer.eos_token_id is not None
    for example in examples(shuffled, tokenizer, completion_only=False, add_eos=has_eos):
        parts.append(example.ids)
        tokens += len(example.ids)
        if tokens >= sequences * length:
            break
    if at_least is not None and tokens < at_least * length:
        length = max(2, tokens // at_least)
    if tokens < length:
        raise DataError(
            f"{rows.source}: has {tokens} tokens, too few for one block of {length} to calibrate on. Use "
            "more text, or shorter blocks (--calibration-length)"
        )
    stream = torch.from_numpy(np.concatenate(parts)[: tokens // length * length]).long()
    blocks = stream.view(-1, length)
    drawn = blocks[torch.randperm(len(blocks), generator=generator)[:sequences]]
    return Calibration(list(drawn.split(batch)), len(drawn), length, rows.source)
