"""What models are compared on after a merge: some inputs, and what they answer to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quadapt.calibrate import Batch, call_of, parted
from quadapt.errors import MergeError
from quadapt.hf.context import positions_of
from quadapt.hf.kinds import kind_of_model
from quadapt.model.trial import answer_of, inputs_for


def random_probe(vocabulary: int, *, sequences: int = 2, length: int = 128) -> Tensor:
    """Draw token ids `[sequences, length]` from a fixed seed, which is enough to tell equal models from unequal."""
    return torch.randint(0, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(0))


def random_for(model: Any) -> tuple[Batch, str]:
    """Random inputs for a model, and what they are, in words; where some tokens stand for pictures, none of these."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inside.config
    text = config.get_text_config()
    if getattr(text, "vocab_size", None) is None:
        return inputs_for(inside, 2), "random inputs"
    length = min(128, positions_of(inside))
    plain = text is config and not getattr(config, "is_encoder_decoder", False)
    found = random_probe(text.vocab_size, length=length) if plain else inputs_for(inside, 2, length)
    return found, f"{found.numel()} random tokens" if isinstance(found, Tensor) else "random inputs"


def with_tokens(probe: Batch, tokens: Sequence[int]) -> Batch:
    """A probe `[sequences, length]` with further sequences that hold all of `tokens`, over and over to their end.

    Inputs by name stay as they are: what else there is belongs to their tokens.
    """
    if not tokens or isinstance(probe, Mapping):
        return probe
    sequences, length = -(-len(tokens) // probe.shape[1]), probe.shape[1]
    more = torch.tensor(tokens, dtype=probe.dtype, device=probe.device)
    return torch.cat([probe, more.repeat(-(-sequences * length // len(more)))[: sequences * length].view(-1, length)])


@torch.no_grad()
def answers(model: nn.Module, probe: Batch) -> Tensor:
    """What a model answers to a probe, sequence by sequence: logits, or whatever it gives first."""
    device = next(model.parameters()).device
    rows = [answer_of(model(**call_of(model, part, device))) for part in parted(probe, 1)]
    if len({row.shape[1:] for row in rows}) > 1:
        raise MergeError(
            f"{type(model).__name__} gives outputs whose length hangs on their numbers (as speech does), so that "
            "models cannot be compared number by number. Give a probe of one sequence"
        )
    return torch.cat([row.cpu() for row in rows])


def perplexity(model: Any, log_probabilities: Tensor, probe: Batch) -> float | None:
    """The perplexity of a model on the tokens of a probe; None if it is none that says what comes next."""
    kind = kind_of_model(model)
    if not isinstance(probe, Tensor) or (kind is not None and kind.peft != "CAUSAL_LM"):
        return None
    picked = log_probabilities[: len(probe), :-1].gather(-1, probe[:, 1:, None])
    return float((-picked.mean()).exp())
