"""How well a model predicts text, and how often its answers are exactly right.

A model is left as it was found: each of its modules in the mode, training or evaluation, that it was in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from quadapt.data.collate import pad_token_id
from quadapt.data.examples import examples, opening, tokenize
from quadapt.data.read import Rows
from quadapt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps the list of batches to work on, like `tqdm`."""


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts some text."""

    loss: float
    """Mean over all counted tokens, in nats per token."""

    perplexity: float
    """exp(loss)."""

    tokens: int
    """Tokens counted, each once."""

    documents: int
    """Documents, or examples, that they are from."""

    left_out: int
    """Documents without a token to count: blank, or a single token."""

    context: int
    """Most tokens that the model saw at once."""

    stride: int
    """Tokens from one window to the next."""


@dataclass(frozen=True)
class Sample:
    """One prompt and what the model made of it."""

    prompt: str
    """What the model was given."""

    expected: str
    """The right answer."""

    answer: str
    """The model's."""


@dataclass(frozen=True)
class ExactMatch:
    """How often a model's answers are exactly right."""

    accuracy: float
    """`correct / count`."""

    count: int
    """Prompts."""

    correct: int
    """Prompts answered with the completion, up to white space around it."""

    too_long: int
    """Completions of more tokens than the model may generate; they cannot be matched."""

    samples: list[Sample]
    """The first prompts."""


def perplexity(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Rows, *, context: int,
               stride: int | None = None, batch: int = 8, progress: Progress = iter) -> Perplexity:
    """Loss per token over sliding windows: each token but a document's first is predicted exactly once.

    A window has `context` tokens and predicts what follows each of them; the next one begins `stride` tokens later. Past
    the first window, a token is so predicted from at least `context - stride` tokens. Of examples with a prompt, the
    completion and its end of sequence count (of messages, what the assistant says), of texts all but the end of
    sequence. Log-probabilities are computed in float32.

    Args:
        model: A causal language model, on any device.
        tokenizer: Its tokenizer.
        rows: Of any kind.
        context: Tokens that the model sees at once.
        stride: Tokens from one window to the next; by default `context`: windows do not overlap.
        batch: Windows in one forward pass.
        progress: Wraps the list of batches.

    Raises:
        ConfigError: `context` is more than the model takes, or `stride` is not between 1 and `context`.
        DataError: There is no token to count, or the loss is not finite.
    """
    stride = context if stride is None else stride
    _check_context(model, context)
    if not 1 <= stride <= context:
        raise ConfigError(f"stride={stride} is not between 1 and context={context}, so tokens would be left out")
    windows: list[_Window] = []
    documents = 0
    for example in examples(rows, tokenizer, add_eos=rows.kind != "text"):
        found = list(_windows(torch.from_numpy(example.ids).long(), torch.from_numpy(example.loss), context, stride,
                              example.where))
        windows += found
        documents += bool(found)
    tokens = sum(int(window.counted.sum()) for window in windows)
    if not tokens:
        raise DataError(f"{rows.source}: has no token to count: all rows are blank, or have a single token")
    windows.sort(key=lambda window: -len(window.ids))  # little padding; and memory is short at once or not at all
    with evaluating(model):
        total = math.fsum(_loss(model, group, pad_token_id(tokenizer)) for group in progress(_grouped(windows, batch)))
    loss = total / tokens
    return Perplexity(loss, math.exp(min(loss, 700.0)), tokens, documents, len(rows) - documents, context, stride)


def exact_match(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Rows, *, max_new_tokens: int = 32,
                batch: int = 32, samples: int = 3, progress: Progress = iter) -> ExactMatch:
    """How often the model, given the prompt, generates the completion and then stops.

    It generates greedily up to an end of sequence. White space around the answer and the completion does not count.

    Args:
        model: A causal language model of `transformers`.
        tokenizer: Its tokenizer.
        rows: Prompts and completions.
        max_new_tokens: Longest answer, in tokens.
        batch: Prompts to answer together.
        samples: Prompts to hand back with their answers.
        progress: Wraps the list of batches.

    Raises:
        DataError: The rows have no prompts, or a prompt leaves no room for the answer in the model's context.
    """
    if rows.kind != "prompt-completion":
        raise DataError(f"{rows.source}: holds {rows.kind} rows, but only answers to prompts can be right or wrong. Give "
                        "data with the columns prompt and completion")
    prompts, completions = list(rows.data["prompt"]), list(rows.data["completion"])
    with _named(rows.data["where"]) as names:
        answers = _generate(model, tokenizer, prompts, max_new_tokens, batch, progress, names)
    correct = sum(answer.strip() == completion.strip() for answer, completion in zip(answers, completions, strict=True))
    too_long = sum(len(ids) > max_new_tokens for ids in tokenize(tokenizer, completions))
    shown = [Sample(*each) for each in zip(prompts[:samples], completions, answers, strict=False)]
    return ExactMatch(correct / len(prompts), len(prompts), correct, too_long, shown)
