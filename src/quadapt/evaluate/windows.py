"""How well a model predicts text, over windows of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from quadapt.data.collate import pad_token_id
from quadapt.data.examples import examples
from quadapt.data.read import Rows
from quadapt.errors import ConfigError, DataError
from quadapt.evaluate.mode import Progress, context_limit, device_of, evaluating, grouped
from quadapt.hf.vocabulary import embedding_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        total = math.fsum(_loss(model, group, pad) for group in progress(grouped(windows, batch)))
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


def joined_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    context: int,
    batch: int = 8,
    progress: Progress = iter,
) -> Perplexity:
    """Loss per token over the windows of GPTQ: all texts joined by two newlines, cut into pieces of `context` tokens.

    A piece knows nothing of the one before, its first token is not predicted, and what is left at the end of the text
    is not counted. Special tokens stand where the tokenizer puts them: at the very beginning alone.

    Source: Frantar et al. 2022 (2210.17323), Section 4, and the function `llama_eval` of the authors' code.
    Differs: there, the texts of C4 are joined by spaces, and the first 256 windows alone are counted.

    Args:
        model: A causal language model, on any device.
        tokenizer: The tokenizer of the model.
        rows: Texts; blank ones count as the lines that they are.
        context: How many tokens a window has; 2048 in the papers.
        batch: How many windows go through the model at once.
        progress: Wraps the list of batches.

    Raises:
        ConfigError: `context` is less than 2, or more than the model takes.
        DataError: The rows are no texts or fill no window, or the loss is not finite.
    """
    _check_context(model, context)
    if context < 2:
        raise ConfigError("context=1: the first token of a window is not predicted. Use 2 or more")
    if rows.kind != "text":
        raise DataError(
            f"{rows.source}: holds {rows.kind} rows, and protocol gptq is for texts. Give texts, or leave it out"
        )
    ids = torch.tensor(tokenizer("\n\n".join(rows.data["text"]), verbose=False).input_ids)
    count = len(ids) // context
    if not count:
        raise DataError(
            f"{rows.source}: has {len(ids)} tokens, less than one window of {context}. Use a smaller --context"
        )
    counted = torch.ones(context - 1, dtype=torch.bool)
    windows = [_Window(piece, counted, rows.source) for piece in ids[: count * context].split(context)]
    with evaluating(model):
        total = math.fsum(_loss(model, group, 0) for group in progress(grouped(windows, batch)))
    tokens = count * (context - 1)
    loss = total / tokens
    return Perplexity(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        tokens=tokens,
        documents=len(rows),
        left_out=0,
        context=context,
        stride=context,
    )


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
    device = device_of(model)
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
