"""Going on with a text: language models, and models with a vision tower on text alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from quadapt.data import (
    Calibration,
    Collator,
    Encoded,
    PromptForm,
    Rows,
    as_trained,
    asked,
    calibration_batches,
    encode,
    own_form,
    pad_token_id,
    read,
    read_held_out,
    split_rows,
)
from quadapt.errors import ConfigError
from quadapt.hf.vocabulary import embedding_rows
from quadapt.tasks.base import TASKS, Asking, Collate, Measured, Reading, Task


@TASKS.register("causal-lm")
class CausalLM(Task):
    """A model says what comes next: texts, prompts with completions, chats."""

    summary: ClassVar[str] = "to go on with text: prompts, chats"
    kinds: ClassVar[tuple[str, ...]] = ("causal-lm", "image-text-to-text")

    def read(self, sources: Sequence[str], reading: Reading, *, held_out: bool = False) -> Rows:
        how = read_held_out if held_out else read
        return how(sources, max_bad_rows=reading.max_bad_rows)

    def split(self, data: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
        return split_rows(data, share, seed)

    def encode(self, data: Rows, prepare: Any, config: Any, *, length: int, reading: Reading) -> Encoded:
        return encode(data, prepare, seq_len=length, packing=reading.packing, completion_only=reading.completion_only)

    def collator(self, prepare: Any, model: Any) -> Collate:
        return Collator(pad_token_id(prepare, embedding_rows(model)))

    def calibration(
        self,
        data: Rows,
        prepare: Any,
        model: Any,
        *,
        length: int,
        sequences: int,
        at_least: int | None,
        reading: Reading,
    ) -> Calibration:
        return calibration_batches(
            data, prepare, length=length, sequences=sequences, seed=reading.seed, at_least=at_least
        )

    def measure(self, model: Any, prepare: Any, data: Rows, asking: Asking) -> Measured:
        """Perplexity of what bears loss, and of prompts how many are answered exactly right; some samples."""
        from quadapt.evaluate import exact_match, generate_samples, joined_perplexity, perplexity

        form, word = _form(asking, data)
        if word:
            asking.show(word)
        rows, questions = asked(data, form, prepare, asking.system)
        _check_protocol(asking)
        how: dict[str, Any] = {
            "context": asking.length,
            "batch": asking.batch_size,
            "progress": asking.progress("perplexity"),
        }
        if asking.protocol == "gptq":
            found = joined_perplexity(model, prepare, rows, **how)
        else:
            found = perplexity(model, prepare, rows, stride=asking.stride, **how)
        result: Measured = {"perplexity": asdict(found)}
        asking.show(
            f"perplexity {found.perplexity:.4f} (loss {found.loss:.4f} nats per token, {found.tokens:,} tokens "
            f"counted, context {found.context}, stride {found.stride})"
        )
        if questions is not None:
            match = exact_match(
                model,
                prepare,
                questions,
                form=form,
                max_new_tokens=asking.max_new_tokens,
                batch=4 * asking.batch_size,
                samples=asking.samples,
                progress=asking.progress("answers"),
            )
            result["exact_match"] = asdict(match)
            asking.show(f"exact match {match.accuracy:.1%} ({match.correct} of {match.count})")
            show_samples(asking, [(sample.prompt, sample.answer, sample.expected) for sample in match.samples])
        elif asking.samples:
            prompts = _openings(rows, asking.samples)
            if form.kind == "chat":
                prompts = [form.ask(prompt, prepare, system=asking.system) for prompt in prompts]
            most = min(asking.max_new_tokens, asking.length // 2)
            answers = generate_samples(model, prepare, prompts, max_new_tokens=most, form=form)
            result["samples"] = [
                {"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)
            ]
            show_samples(asking, [(prompt, answer, None) for prompt, answer in zip(prompts, answers, strict=True)])
        return result


def _check_protocol(asking: Asking) -> None:
    if asking.protocol == "gptq" and asking.stride is not None:
        raise ConfigError(f"stride={asking.stride}: the windows of protocol gptq do not overlap. Leave it out")


def show_samples(asking: Asking, samples: Sequence[tuple[str, str, str | None]]) -> None:
    """Show some prompts with what the model made of them, and with the right answer if there is one."""
    for prompt, answer, expected in samples:
        asking.show(
            f"\n> {prompt.strip()[-300:]}\n{answer.strip()}"
            + (f"   (right: {expected.strip()})" if expected is not None else "")
        )


def _form(asking: Asking, rows: Rows) -> tuple[PromptForm, str]:
    """The form to ask in: what is given, else that of training, else that of the data; and what is to be said of it."""
    trained = PromptForm.from_dict(asking.note.get("prompt") or {})
    if asking.prompt_form != "auto":
        return PromptForm(asking.prompt_form), ""  # type: ignore[arg-type] # one of the kinds, as settings check
    if trained.kind == "text":
        return PromptForm(own_form(rows)), ""
    return as_trained(rows, trained)


def _openings(rows: Rows, count: int) -> list[str]:
    """The first words of some rows."""
    if rows.kind == "messages":
        chats = [rows.chat(index) for index in range(min(count, len(rows)))]
        return [next((str(turn["content"]) for turn in chat if turn["role"] == "user"), "") for chat in chats]
    texts = [str(text) for text in rows.data["text"][:count]]
    if len(texts) < count:  # one long document: begin at paragraphs of it
        texts = [part for part in texts[0].split("\n\n") if part.strip()][:count]
    return [" ".join(text.split(" ")[:12])[:80] for text in texts]
