"""`quadapt eval`: perplexity, exact answers, samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quadapt.config import EvalConfig
from quadapt.data import PromptForm, Rows, as_trained, asked, own_form, read_held_out
from quadapt.evaluate import exact_match, generate_samples, perplexity
from quadapt.files import sweep
from quadapt.hf.context import MOST_CONTEXT, context_of
from quadapt.hf.folder import open_folder
from quadapt.hf.kinds import kind_of_model
from quadapt.hf.loading import load
from quadapt.hf.workspace import check_disk, check_output, write_json
from quadapt.jobs.identity import inputs_of
from quadapt.jobs.source import check_writes, device_of
from quadapt.report.ui import UI


def evaluate(config: EvalConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt eval` and return its figures.

    Raises:
        QuadaptError: Input cannot be used, see the message.
    """
    if config.output:
        check_output(Path(config.output), overwrite=config.overwrite, inputs=inputs_of(config), folder=False)
        check_disk(Path(config.output).parent, 0)
    rows = read_held_out(config.data, max_bad_rows=config.most_bad_rows)
    for note in (*rows.notes, *rows.bad.notes()):
        ui.say(note)
    if config.limit is not None:
        rows = rows.select(range(min(config.limit, len(rows))))
    model, tokenizer = load(
        config.model,
        dtype=config.dtype,
        device=device_of(config),
        base=config.base,
        any_base=config.any_base,
        trust_remote_code=config.trust_remote_code,
    )
    check_writes(kind_of_model(model), config.model, "eval")
    form, word = _form(config, rows)
    if word:
        ui.say(word)
    rows, questions = asked(rows, form, tokenizer, config.system)
    context = config.context or min(context_of(model.config), MOST_CONTEXT)

    def bar(label: str) -> Any:
        return lambda batches: ui.over(label, batches)

    found = perplexity(
        model,
        tokenizer,
        rows,
        context=context,
        stride=config.stride,
        batch=config.batch_size,
        progress=bar("perplexity"),
    )
    about = {"kind": "quadapt eval", "model": config.model, "data": rows.source}
    result: dict[str, Any] = {**about, "perplexity": asdict(found)}
    ui.show(
        f"perplexity {found.perplexity:.4f} (loss {found.loss:.4f} nats per token, {found.tokens:,} tokens counted, "
        f"context {found.context}, stride {found.stride})"
    )
    if questions is not None:
        match = exact_match(
            model,
            tokenizer,
            questions,
            form=form,
            max_new_tokens=config.max_new_tokens,
            batch=4 * config.batch_size,
            samples=config.samples,
            progress=bar("answers"),
        )
        result["exact_match"] = asdict(match)
        ui.show(f"exact match {match.accuracy:.1%} ({match.correct} of {match.count})")
        _show_samples(ui, [(sample.prompt, sample.answer, sample.expected) for sample in match.samples])
    elif config.samples:
        prompts = _openings(rows, config.samples)
        if form.kind == "chat":
            prompts = [form.ask(prompt, tokenizer, system=config.system) for prompt in prompts]
        most = min(config.max_new_tokens, context // 2)
        answers = generate_samples(model, tokenizer, prompts, max_new_tokens=most, form=form)
        result["samples"] = [
            {"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)
        ]
        _show_samples(ui, [(prompt, answer, None) for prompt, answer in zip(prompts, answers, strict=True)])
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        sweep(Path(config.output).parent)
        write_json(Path(config.output), result, overwrite=config.overwrite)
    return result


def _form(config: EvalConfig, rows: Rows) -> tuple[PromptForm, str]:
    """The form to ask in: what is given, else that of training, else that of the data; and what is to be said of it."""
    note = {} if config.model.endswith(".gguf") else open_folder(config.model).note
    trained = PromptForm.from_dict(note.get("prompt") or {})
    if config.prompt_form != "auto":
        return PromptForm(config.prompt_form), ""
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


def _show_samples(ui: UI, samples: Sequence[tuple[str, str, str | None]]) -> None:
    for prompt, answer, expected in samples:
        ui.show(
            f"\n> {prompt.strip()[-300:]}\n{answer.strip()}"
            + (f"   (right: {expected.strip()})" if expected is not None else "")
        )
