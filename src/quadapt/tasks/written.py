"""Figures of models that write: the loss of what is to be written, and how many answers are exactly right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from quadapt.errors import DataError
from quadapt.tasks.base import Asking, Measured
from quadapt.tasks.causal import show_samples


def mean_loss(losses: Iterable[Tensor], source: str) -> tuple[float, int]:
    """The mean loss, and how much counted.

    Args:
        losses: Of each batch the summed loss of every example and how much it counts, float64 `[batch, 2]`.
        source: The data, for the error.

    Raises:
        DataError: The loss is not finite.
    """
    total, counted = torch.cat(list(losses)).sum(0).tolist()
    loss = total / counted
    if not math.isfinite(loss):
        raise DataError(
            f"{source}: the model's loss is {loss}. Its weights are damaged, or too large for its dtype; try --dtype "
            "float32"
        )
    return loss, int(counted)


def perplexity_of(loss: float) -> float:
    """The perplexity of a loss in nats; infinity where it is larger than a float."""
    return math.exp(loss) if loss < 700 else math.inf


def perplexity(losses: Iterable[Tensor], documents: int, source: str, asking: Asking) -> Measured:
    """The perplexity of what is to be written, shown and as it is stored."""
    loss, tokens = mean_loss(losses, source)
    found = perplexity_of(loss)
    asking.show(f"perplexity {found:.4f} (loss {loss:.4f} nats per token, {tokens:,} tokens counted)")
    return {"loss": loss, "perplexity": found, "tokens": tokens, "documents": documents}


def exact_match(answers: Sequence[tuple[str, str, str]], asking: Asking) -> Measured:
    """How many answers are exactly right, shown and as it is stored.

    Args:
        answers: Of each example what was asked, what the model says, and what is right.
        asking: How many of them are shown.
    """
    correct = sum(said.strip() == right.strip() for _, said, right in answers)
    share = correct / len(answers) if answers else math.nan
    asking.show(f"exact match {share:.1%} ({correct} of {len(answers)})")
    shown = answers[: asking.samples]
    show_samples(asking, shown)
    samples = [{"prompt": prompt, "answer": said, "expected": right} for prompt, said, right in shown]
    return {"accuracy": share, "count": len(answers), "correct": correct, "samples": samples}
