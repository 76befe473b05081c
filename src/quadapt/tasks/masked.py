"""Guessing words that are hidden: what encoders are pretrained for, and may be trained on for texts of a field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset

from quadapt.data import Encoded, Rows, read, read_held_out
from quadapt.data.collate import NO_LOSS
from quadapt.errors import DataError
from quadapt.tasks.base import TASKS, Asking, Collate, Losses, Measured, Reading
from quadapt.tasks.examples import ByExamples, answered, encoded, padding, taken
from quadapt.tasks.labels import cross_entropy
from quadapt.tasks.written import mean_loss, perplexity_of


@TASKS.register("masked-lm")
class MaskedLM(ByExamples):
    """A model guesses tokens of a text that are hidden from it: 15 in 100, drawn once for each text, by the seed."""

    summary: ClassVar[str] = "to guess hidden words of a text"
    kinds: ClassVar[tuple[str, ...]] = ("masked-lm",)

    def read(self, sources: Sequence[str], reading: Reading, *, held_out: bool = False) -> Rows:
        how = read_held_out if held_out else read
        try:
            rows = how(sources, max_bad_rows=reading.max_bad_rows)
        except DataError as error:
            raise DataError(
                f"{error}. (To train the model for something else than hidden words, say it: --task)"
            ) from error
        if rows.kind != "text":
            raise DataError(
                f"{rows.source}: holds {rows.kind} rows, and words are hidden in texts. Give data with the column "
                "text, or say what else the model is to be trained for (--task)"
            )
        return rows

    def encode(self, data: Rows, prepare: Any, config: Any, *, length: int, reading: Reading) -> Encoded:
        from transformers import DataCollatorForLanguageModeling

        if prepare.mask_token_id is None:
            raise DataError(
                "the tokenizer has no token that hides another. Set tokenizer.mask_token to one of its tokens"
            )
        hide = DataCollatorForLanguageModeling(prepare, seed=reading.seed)
        windows = prepare(
            list(data.data["text"]), truncation=True, max_length=length, return_overflowing_tokens=True, verbose=False
        )["input_ids"]
        tally, rows = Counter[str](), list[dict[str, list[int]]]()
        for ids in windows:
            row = {name: tensor[0].tolist() for name, tensor in hide([{"input_ids": ids}]).items()}
            counted = sum(label != NO_LOSS for label in row["labels"])
            if counted:
                rows.append({**row, "attention_mask": [1] * len(ids)})
                tally.update(tokens=len(ids), loss=counted)
            else:
                tally["dropped"] += 1
        first = str(prepare.decode(rows[0]["input_ids"]))[:400] if rows else ""
        examples = Dataset.from_list(rows)
        return encoded(self.name, data, examples, length=length, tally=tally, unit="hidden tokens", example=first)

    def collator(self, prepare: Any, model: Any) -> Collate:
        from transformers import DataCollatorForTokenClassification

        return taken(model, DataCollatorForTokenClassification(padding(prepare, model)))

    def losses(self, config: Any) -> Losses:
        return cross_entropy

    def measure(self, model: Any, prepare: Any, data: Rows, asking: Asking) -> Measured:
        """Loss and perplexity of the hidden tokens, and how many of them are guessed."""
        found = self.encode(data, prepare, model.config, length=asking.length, reading=Reading())
        losses, right = list[torch.Tensor](), 0
        batches = answered(
            model, found, self.collator(prepare, model), asking.batch_size, asking.progress("hidden tokens")
        )
        for logits, labels in batches:
            losses.append(cross_entropy(logits, labels))
            right += int(((logits.argmax(-1) == labels) & (labels != NO_LOSS)).sum())
        loss, counted = mean_loss(losses, data.source)
        perplexity = perplexity_of(loss)
        asking.show(
            f"accuracy {right / counted:.4f}, perplexity {perplexity:.4f} (loss {loss:.4f} nats per hidden token, "
            f"{counted:,} counted)"
        )
        figures = {"accuracy": right / counted, "perplexity": perplexity}
        return {"loss": loss, "examples": len(found.data), "hidden": counted, "metrics": figures}
