"""Pairs of answers, for objectives that compare them: a language model learns which of two people prefer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quadapt.data import Calibration, Collator, Encoded, pad_token_id
from quadapt.data.pairs import PairCollator, Pairs, encode_pairs, read_pairs
from quadapt.hf.vocabulary import embedding_rows
from quadapt.tasks.base import Collate, Reading
from quadapt.tasks.causal import CausalLM


class Preferring(CausalLM):
    """What a language model is trained for by an objective that is about pairs of answers.

    It is no task of its own in `TASKS`: what comes of it goes on with text as any language model does, and is measured
    so.
    """

    def read(self, sources: Sequence[str], reading: Reading, *, held_out: bool = False) -> Any:
        return read_pairs(sources, held_out=held_out, max_bad_rows=reading.max_bad_rows)

    def split(self, data: Any, share: float, seed: int) -> tuple[Any, Any]:
        found: tuple[Pairs, Pairs] = data.split(share, seed)
        return found

    def encode(self, data: Any, prepare: Any, config: Any, *, length: int, reading: Reading) -> Encoded:
        return encode_pairs(data, prepare, seq_len=length)

    def collator(self, prepare: Any, model: Any) -> Collate:
        return PairCollator(Collator(pad_token_id(prepare, embedding_rows(model))))

    def calibration(
        self,
        data: Any,
        prepare: Any,
        model: Any,
        *,
        length: int,
        sequences: int,
        at_least: int | None,
        reading: Reading,
    ) -> Calibration:
        """Batches of the chosen answers."""
        rows = data.chosen if isinstance(data, Pairs) else data
        return super().calibration(
            rows, prepare, model, length=length, sequences=sequences, at_least=at_least, reading=reading
        )
