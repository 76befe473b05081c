"""Writing a text from another one, such as a translation or a summary: an encoder reads, and a decoder writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset

from quadapt.data import Encoded, Rows, form_of, read, read_held_out
from quadapt.errors import DataError
from quadapt.tasks.base import TASKS, Asking, Collate, Losses, Measured, Reading
from quadapt.tasks.examples import ByExamples, answered, encoded, padding, taken
from quadapt.tasks.labels import cross_entropy
from quadapt.tasks.written import exact_match, perplexity


@TASKS.register("seq2seq")
class Seq2Seq(ByExamples):
    """A model reads a text and writes another: prompts with completions, sources with targets."""

    summary: ClassVar[str] = "to write a text from another one"
    kinds: ClassVar[tuple[str, ...]] = ("seq2seq",)

    def read(self, sources: Sequence[str], reading: Reading, *, held_out: bool = False) -> Rows:
        how = read_held_out if held_out else read
        rows = how(sources, max_bad_rows=reading.max_bad_rows)
        if rows.kind != "prompt-completion":
            raise DataError(
                f"{rows.source}: holds {rows.kind} rows, and a model that writes one text from another needs both. "
                "Give data with the columns prompt and completion, or source and target"
            )
        return rows

    def length(self, positions: int, most: int) -> int:
        return min(positions, 512)  # what T5 and BART were pretrained on; T5 has no positions of its own

    def encode(self, data: Rows, prepare: Any, config: Any, *, length: int, reading: Reading) -> Encoded:
        tally, end = Counter[str](), prepare.eos_token_id
        prompts, answers = (_ended(prepare, list(data.data[name]), end) for name in ("prompt", "completion"))
        rows = []
        for ids, labels, text in zip(prompts, answers, data.data["completion"], strict=True):
            lost = max(0, len(ids) - length) + max(0, len(labels) - length)
            tally.update(truncated=lost > 0, lost=lost)
            if not text.strip():
                tally["dropped"] += 1
                continue
            rows.append({"input_ids": _cut(ids, length, end), "labels": _cut(labels, length, end)})
            tally.update(tokens=len(rows[-1]["input_ids"]) + len(rows[-1]["labels"]), loss=len(rows[-1]["labels"]))
        first = f"{data.data['prompt'][0][:300]} -> {data.data['completion'][0][:300]}"
        unit, form = "tokens to write", form_of(data, prepare)
        examples = Dataset.from_list(rows)
        return encoded(self.name, data, examples, length=length, tally=tally, unit=unit, example=first, form=form)

    def collator(self, prepare: Any, model: Any) -> Collate:
        from transformers import DataCollatorForSeq2Seq

        inside = model.get_base_model() if hasattr(model, "get_base_model") else model
        return taken(model, DataCollatorForSeq2Seq(padding(prepare, model), model=inside))

    def losses(self, config: Any) -> Losses:
        return cross_entropy

    def measure(self, model: Any, prepare: Any, data: Rows, asking: Asking) -> Measured:
        """Perplexity of what is to be written, how many answers are exactly right, and some of them."""
        found = self.encode(data, prepare, model.config, length=asking.length, reading=Reading())
        collate = self.collator(prepare, model)
        batches = answered(model, found, collate, asking.batch_size, asking.progress("perplexity"))
        losses = [cross_entropy(logits, labels) for logits, labels in batches]
        counted = perplexity(losses, len(found.data), data.source, asking)
        prompts, wanted = list(data.data["prompt"]), list(data.data["completion"])
        said = _written(model, prepare, prompts, asking)
        answers = list(zip(prompts, said, wanted, strict=True))
        return {"perplexity": counted, "exact_match": exact_match(answers, asking)}


def _ended(prepare: Any, texts: Sequence[str], end: int | None) -> list[list[int]]:
    """Token ids of texts, each with the end of a sequence behind it."""
    found: list[list[int]] = prepare(list(texts), verbose=False)["input_ids"]
    return [ids if end is None or (ids and ids[-1] == end) else [*ids, end] for ids in found]


def _cut(ids: list[int], length: int, end: int | None) -> list[int]:
    """At most `length` tokens, of which the last is still the end."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1] if end is None else end]


@torch.no_grad()
def _written(model: Any, prepare: Any, prompts: Sequence[str], asking: Asking) -> list[str]:
    """What a model writes for each prompt, greedily, in their order."""
    from quadapt.evaluate import evaluating
    from quadapt.hf.reading import generating

    tokenizer, device = padding(prepare, model), next(model.parameters()).device
    ids = [_cut(each, asking.length, prepare.eos_token_id) for each in _ended(prepare, prompts, prepare.eos_token_id)]
    answers, size = list[str](), 4 * asking.batch_size
    with evaluating(model):
        for start in asking.progress("answers")(list(range(0, len(ids), size))):
            batch = tokenizer.pad({"input_ids": ids[start : start + size]}, return_tensors="pt")
            given = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            output = generating(
                model,
                **given,
                max_new_tokens=asking.max_new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
            )
            answers += tokenizer.batch_decode(output, skip_special_tokens=True)
    return answers
