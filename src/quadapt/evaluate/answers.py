"""How often a model's answers are exactly right, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from quadapt.data.collate import pad_token_id
from quadapt.data.examples import tokenize
from quadapt.data.prompt import PromptForm
from quadapt.data.read import Rows
from quadapt.errors import DataError
from quadapt.evaluate.mode import Progress, context_limit, device_of, evaluating, grouped
from quadapt.hf.ending import turn_end
from quadapt.hf.reading import generating
from quadapt.hf.vocabulary import embedding_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARE = PromptForm("prompt")
"""The form that leaves prompts as they are."""


@dataclass(frozen=True)
class Sample:
    """One prompt and what the model made of it."""

    prompt: str
    """The text that the model was given."""

    expected: str
    """The answer that the data calls right."""

    answer: str
    """The answer that the model gave."""


@dataclass(frozen=True)
class ExactMatch:
    """How often a model's answers are exactly right."""

    accuracy: float
    """The share of prompts that were answered exactly right: `correct / count`."""

    count: int
    """How many prompts the model was given."""

    correct: int
    """How many prompts were answered with the completion, up to white space around it."""

    too_long: int
    """How many completions have more tokens than the model may generate, so that they cannot be matched."""

    samples: list[Sample]
    """The first few prompts with their answers."""


def exact_match(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    max_new_tokens: int = 32,
    batch: int = 32,
    samples: int = 3,
    form: PromptForm = BARE,
    progress: Progress = iter,
) -> ExactMatch:
    """How often the model, given the prompt, generates the completion and then stops.

    It generates greedily up to an end of sequence. White space around the answer and the completion does not count.

    Args:
        model: A causal language model of `transformers`.
        tokenizer: The tokenizer of the model.
        rows: Prompts and completions.
        max_new_tokens: The most tokens that an answer may have.
        batch: How many prompts are answered at once.
        samples: How many prompts to hand back with their answers.
        form: The form of the prompts, which decides how they are tokenized.
        progress: Wraps the list of batches.

    Raises:
        DataError: The rows have no prompts, or a prompt leaves no room for the answer in the model's context.
    """
    if rows.kind != "prompt-completion":
        raise DataError(
            f"{rows.source}: holds {rows.kind} rows, but only answers to prompts are right or wrong. Give "
            "data with the columns prompt and completion"
        )
    prompts, completions = list(rows.data["prompt"]), list(rows.data["completion"])
    ids = [form.ids(prompt, tokenizer) for prompt in prompts]
    answers = _continuations(model, tokenizer, ids, list(rows.data["where"]), max_new_tokens, batch, progress)
    correct = sum(answer.strip() == completion.strip() for answer, completion in zip(answers, completions, strict=True))
    too_long = sum(len(ids) > max_new_tokens for ids in tokenize(tokenizer, completions))
    shown = [Sample(*each) for each in zip(prompts[:samples], completions, answers, strict=False)]
    return ExactMatch(correct / len(prompts), len(prompts), correct, too_long, shown)


def generate_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    batch: int = 32,
    form: PromptForm = BARE,
) -> list[str]:
    """What the model says after each prompt, greedily, without the prompt; `form` says how the prompts are tokenized.

    Raises:
        DataError: A prompt leaves no room for `max_new_tokens` in the model's context.
    """
    names = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    ids = [form.ids(prompt, tokenizer) for prompt in prompts]
    return _continuations(model, tokenizer, ids, names, max_new_tokens, batch, iter)


def _continuations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[list[int]],
    names: Sequence[str],
    max_new_tokens: int,
    batch: int,
    progress: Progress,
) -> list[str]:
    """What the model says after each prompt, in the order of the prompts."""
    _check_room(model, ids, names, max_new_tokens)
    answers = [""] * len(ids)
    longest_first = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    with evaluating(model):
        for group in progress(grouped(longest_first, batch)):
            tokens = _greedy(model, tokenizer, [ids[index] for index in group], max_new_tokens)
            for index, answer in zip(group, tokens, strict=True):
                # Decoded by itself, an answer would lose the space before it.
                before, whole = (
                    tokenizer.decode(each, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                    for each in (ids[index], ids[index] + answer)
                )
                answers[index] = str(whole)[len(str(before)) :]
    return answers


def _greedy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """Tokens after each prompt, up to the first end of sequence."""
    device, ends = device_of(model), _ends(model, tokenizer)
    pad = pad_token_id(tokenizer, embedding_rows(model))
    inputs = pad_sequence(
        [torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_value=pad, padding_side="left"
    )
    width = inputs.shape[1]
    mask = torch.arange(width) >= torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
    output = generating(
        model,  # all that a model's own settings may change is set here
        input_ids=inputs.to(device),
        attention_mask=mask.long().to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
    )
    return [_until(row, ends) for row in output[:, width:].tolist()]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]


def _ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the tokenizer's, that of a turn, and those of the model's own settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return {int(token) for token in (tokenizer.eos_token_id, turn_end(tokenizer), *listed) if token is not None}


def _check_room(model: nn.Module, prompts: Sequence[list[int]], names: Sequence[str], max_new_tokens: int) -> None:
    limit = context_limit(model)
    for name, prompt in zip(names, prompts, strict=True):
        if not prompt:
            raise DataError(f"{name}: the prompt is empty, and the tokenizer puts no token before it to start from")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise DataError(
                f"{name}: the prompt has {len(prompt)} tokens. With {max_new_tokens} for the answer "
                f"(--max-new-tokens) they exceed the model's context, {limit}. Shorten or delete the row"
            )
