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
from quadapt.data.examples import examples, tokenize
from quadapt.data.prompt import PromptForm
from quadapt.data.read import Rows
from quadapt.errors import ConfigError, DataError
from quadapt.hf.ending import turn_end
from quadapt.hf.reading import generating
from quadapt.hf.vocabulary import embedding_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""A function that wraps the list of batches to work on, like `tqdm`."""

BARE = PromptForm("prompt")
"""The form that leaves prompts as they are."""


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts some text."""

    loss: float
    """The mean cross-entropy over all counted tokens, in nats per token."""

    perplexity: float
    """The perplexity per token, which is `exp(loss)`."""

    tokens: int
    """How many tokens were counted, each of them once."""

    documents: int
    """How many documents, or examples, the counted tokens are from."""

    left_out: int
    """How many documents had no token to count: they are blank, or a single token."""

    context: int
    """The most tokens that the model saw at once."""

    stride: int
    """How many tokens there are from the start of one window to that of the next."""


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


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    context: int,
    stride: int | None = None,
    batch: int = 8,
    progress: Progress = iter,
) -> Perplexity:
    """Loss per token over sliding windows: each token but a document's first is predicted exactly once.

    A window has `context` tokens and predicts what follows each of them; the next one begins `stride` tokens later.
    Past the first window, a token is so predicted from more than `context - stride` tokens. Of examples with a prompt,
    the completion and its end of sequence count; of messages, what the assistant says; of a text, all of it.
    Log-probabilities are computed in float32.

    Differs from the recipe in the documentation of `transformers`: there, a window predicts one token less, so that
    without overlap the first token of each window is not counted.

    Args:
        model: A causal language model, on any device.
        tokenizer: The tokenizer of the model.
        rows: Rows of any kind.
        context: How many tokens the model sees at once.
        stride: How many tokens one window begins after another; by default `context`, so that they do not overlap.
        batch: How many windows go through the model at once.
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
        ids, counts = torch.from_numpy(example.ids).long(), torch.from_numpy(example.loss)
        found = list(_windows(ids, counts, context, stride, example.where))
        windows += found
        documents += bool(found)
    tokens = sum(int(window.counted.sum()) for window in windows)
    if not tokens:
        raise DataError(f"{rows.source}: has no token to count: all rows are blank, or have a single token")
    windows.sort(key=lambda window: -len(window.ids))  # little padding; and memory is short at once or not at all
    pad = pad_token_id(tokenizer, embedding_rows(model))
    with evaluating(model):
        total = math.fsum(_loss(model, group, pad) for group in progress(_grouped(windows, batch)))
    loss = total / tokens
    return Perplexity(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        tokens=tokens,
        documents=documents,
        left_out=len(rows) - documents,
        context=context,
        stride=stride,
    )


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; then each module gets back the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def context_limit(model: nn.Module) -> int | None:
    """Positions that a model was made for; None if its configuration does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)


# --- windows ----------------------------------------------------------------------------------------------------------


class _Window(NamedTuple):
    ids: Tensor
    """What the model sees, and one token more."""

    counted: Tensor
    """Which of `ids[1:]` are counted here."""

    where: str
    """The name of the document that the window is from."""


def _windows(ids: Tensor, counts: Tensor, context: int, stride: int, where: str) -> Iterator[_Window]:
    """Windows over a document that have something to count."""
    done = 1  # the first token has nothing before it
    for start in range(0, len(ids), stride):
        end = min(start + context + 1, len(ids))
        counted = counts[start + 1 : end].clone()
        counted[: done - start - 1] = False
        if counted.any():
            yield _Window(ids[start:end], counted, where)
        done = end
        if end == len(ids):
            return


def _loss(model: nn.Module, windows: Sequence[_Window], pad: int) -> float:
    """Summed loss of the counted tokens of some windows."""
    device = _device(model)
    inputs = pad_sequence([window.ids[:-1] for window in windows], batch_first=True, padding_value=pad)
    mask = torch.arange(inputs.shape[1]) < torch.tensor([len(window.counted) for window in windows])[:, None]
    logits = model(input_ids=inputs.to(device), attention_mask=mask.long().to(device), use_cache=False).logits
    total = 0.0
    for row, window in zip(logits, windows, strict=True):  # row by row: a float32 copy of all logits may not fit
        counted = window.counted.to(row.device)
        targets = window.ids[1:].to(row.device)[counted]
        loss = float(F.cross_entropy(row[: len(counted)][counted].float(), targets, reduction="none").double().sum())
        if not math.isfinite(loss):
            raise DataError(
                f"{window.where}: the model's loss is {loss}. Its weights are damaged, or too large for "
                f"{row.dtype}; try --dtype float32"
            )
        total += loss
    return total


def _check_context(model: nn.Module, context: int) -> None:
    limit = context_limit(model)
    if context < 1 or (limit is not None and context > limit):
        raise ConfigError(f"context={context} is not between 1 and the model's context, {limit}")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _grouped(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


# --- generation -------------------------------------------------------------------------------------------------------


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
        for group in progress(_grouped(longest_first, batch)):
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
    device, ends = _device(model), _ends(model, tokenizer)
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
