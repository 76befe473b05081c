"""Distillation: the student's predictions are brought near to a teacher's, token by token.

With `P` the teacher's distribution of the next token and `Q` the student's, both at temperature `T`, the objective is

    weight * T**2 * D(P, Q) + (1 - weight) * cross-entropy

where `D` is a mean over the tokens that bear loss, the very ones over which the cross-entropy is one. The factor
`T**2` keeps gradients of one size whatever the temperature (Hinton et al. 2015, arXiv:1503.02531, section 2).

Targets that are kept on disk are the `k` likeliest tokens of `P` and the mass of all others as one more. The divergence
is then that of two distributions over `k + 1` outcomes: never more than the whole one, as joining outcomes lowers every
divergence of this kind, and equal to it if `k` is the vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadapt.errors import ConfigError
from quadapt.nn.objective import NO_LOSS, OBJECTIVES, Answer, Batch, Items, Objective, Teaching
from quadapt.objectives.teacher import run, sequence_identity
from quadapt.setting import Count, Inner, Positive, Ratio, setting

CHUNK = 2**24
"""How many logits are held in float32 at once, in each of a few temporaries: 64 MB."""

_TEMPORARIES = 5
"""Temporaries of such a size that are alive together in the longer formula."""

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A function of log-probabilities `[tokens, outcomes]`, the teacher's and the student's: it gives the divergence
`[tokens]` in nats, and its derivatives by the student's `[tokens, outcomes]`."""


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(P || Q)`, the sum of `p * log(p / q)` over outcomes, `[tokens]`."""
    p = log_p.exp()
    return (p * (log_p.masked_fill(p == 0, 0) - log_q)).sum(-1)


def mixed(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The logarithm of `beta * P + (1 - beta) * Q`, `[tokens, outcomes]`."""
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))


@dataclass(frozen=True)
class Predictions:
    """What a model predicts where a token bears loss: `logits [asked, vocabulary]`, or the part of it that is kept.

    Kept are `ids [asked, k]` of the likeliest tokens, and `log_probabilities [asked, k + 1]` in float16, the last of
    which is that of all other tokens together (minus infinity if there are none). Float16 moves a probability `p` by at
    most a share of `|log p| / 2048`; what is read is scaled to sum up to one again.
    """

    temperature: float
    """Logits are divided by it."""

    top: int
    """How many tokens are kept, at most."""

    def asked(self, batch: Batch) -> Tensor:
        """The tokens from which one that bears loss is predicted, bool `[batch, tokens]`."""
        bears: Tensor = batch["labels"] != NO_LOSS
        return torch.cat([bears[:, 1:], torch.zeros_like(bears[:, :1])], dim=1)

    def answer(self, teacher: nn.Module, batch: Batch) -> Answer:
        """The logits at these tokens; the head computes no others but those at the same places of a batch."""
        asked = self.asked(batch)
        places = asked.any(0).nonzero()[:, 0]
        logits = run(teacher, batch, logits_to_keep=places).logits
        if logits.shape[1] != len(places):  # a model that takes no such wish
            logits = logits[:, places]
        return {"logits": logits[asked[:, places]]}

    def kept(self, answer: Answer) -> Answer:
        """The likeliest tokens and the rest as one, see above."""
        rows = [self._kept(part) for part in answer["logits"].split(rows_of(answer["logits"]))]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _kept(self, logits: Tensor) -> dict[str, Tensor]:
        vocabulary = logits.shape[-1]
        every = _log_softmax(logits, self.temperature)
        top, ids = every.topk(min(self.top, vocabulary), sorted=True)
        rest = every.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)  # not 1 - sum, which cancels
        return {
            "ids": ids.to(torch.uint16 if vocabulary <= 2**16 else torch.int32),
            "log_probabilities": torch.cat([top, rest], dim=-1).half(),
        }

    def identity(self, batch: Batch, row: int) -> str:
        """The sequence, which of its tokens are asked about, and the settings."""
        places = self.asked(batch)[row].nonzero()[:, 0].tolist()
        return repr((sequence_identity(batch, row), places, self.temperature, self.top))

    def check(self, student: nn.Module, teacher: nn.Module) -> None:
        """Raise ConfigError if the two models do not predict the same tokens."""
        ours, theirs = (_vocabulary(model) for model in (student, teacher))
        if ours != theirs:
            raise ConfigError(
                f"the teacher predicts {theirs:,} tokens, and the model that trains {ours:,}: their predictions cannot "
                "be compared. Give a teacher with the same vocabulary (--teacher)"
            )

    def token_bytes(self, model: nn.Module) -> int:
        """The bytes of the kept part of one prediction."""
        vocabulary = _vocabulary(model)
        top = min(self.top, vocabulary)
        return top * (2 if vocabulary <= 2**16 else 4) + 2 * (top + 1)

    def step_bytes(self, model: nn.Module, tokens: int, *, kept: bool) -> int:
        """The answer about a batch, the gradient of logits before and after it is scaled, and a chunk in float32."""
        vocabulary = _vocabulary(model)
        width = next(each.itemsize for each in model.parameters() if each.is_floating_point())
        answer = self.token_bytes(model) if kept else vocabulary * width
        chunk = _TEMPORARIES * 4 * min(tokens * vocabulary, max(vocabulary, CHUNK))
        return tokens * (answer + 2 * vocabulary * width) + chunk


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def rows_of(logits: Tensor) -> int:
    """How many rows `[rows, vocabulary]` are computed at once."""
    return max(1, CHUNK // logits.shape[-1])


def joined(log_q: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities `[tokens, k + 1]` of the tokens `ids [tokens, k]` and of all others as one, if there are some.

    Without others there are `k`.
    """
    top = log_q.gather(-1, ids)
    if ids.shape[-1] == log_q.shape[-1]:
        return top
    rest = log_q.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest], dim=-1)


def summed(
    logits: Tensor, asked: Tensor, answer: Answer, divergence: Divergence, temperature: float, rows: int | None = None
) -> Tensor:
    """The divergences of all tokens that are asked about, added up, with a gradient for `logits`.

    A few rows at a time are computed in float32, and their gradient at once: nothing of the size of all logits is held
    but the logits and their gradient, in their own dtype.

    Args:
        logits: The student's, `[batch, tokens, vocabulary]`.
        asked: bool `[batch, tokens]`.
        answer: The teacher's answer about these, as :class:`Predictions` gives or keeps it.
        divergence: What is summed.
        temperature: All logits are divided by it; kept answers have been.
        rows: How many rows at once; by default what :data:`CHUNK` allows.

    Returns:
        A number in nats, in float32, or in float64 for such logits; zero if nothing is asked.
    """
    found: Tensor = _Summed.apply(logits, asked, answer, divergence, temperature, rows or rows_of(logits))
    return found


class _Summed(torch.autograd.Function):
    """What :func:`summed` does; kept for backward is the gradient itself, up to what the sum is multiplied by."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        asked: Tensor,
        answer: Answer,
        divergence: Divergence,
        temperature: float,
        size: int,
    ) -> Tensor:
        flat = logits.flatten(0, 1)
        masks = asked.flatten().to(logits.device).split(size)
        counts = torch.stack([mask.sum() for mask in masks]).tolist()  # waits for the device once
        total, gradient = wide(flat.new_zeros(())), torch.zeros_like(flat)
        parts = zip(
            flat.split(size), gradient.split(size), masks, counts, _rows(answer, counts, logits.device), strict=True
        )
        for chunk, slopes, mask, count, theirs in parts:
            if count:
                whole = count == len(mask)
                value, slope = _part(chunk if whole else chunk[mask], theirs, divergence, temperature)
                total += value
                slopes[... if whole else mask] = slope.to(slopes.dtype)
        ctx.save_for_backward(gradient)
        ctx.shape = logits.shape
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outputs[0].to(gradient.dtype)).view(ctx.shape), None, None, None, None, None


def _part(ours: Tensor, theirs: Answer, divergence: Divergence, temperature: float) -> tuple[Tensor, Tensor]:
    """The sum for some rows of logits, and its gradient `[rows, vocabulary]` by them.

    With outcomes `j` of the log-probabilities `l_j` that are functions of the logits `z`, and slopes `g_j = dD / dl_j`,
    the gradient is `sum_j g_j dl_j / dz`: `dl_j / dz_v = [v = j] - q_v` for a token, and `q_v / q_rest - q_v` or `-q_v`
    for all others as one, if `v` is among these or not.
    """
    log_q = _log_softmax(ours, temperature)
    if "ids" not in theirs:
        values, slopes = divergence(_log_softmax(theirs["logits"], temperature).to(log_q.dtype), log_q)
        gradient = slopes - log_q.exp() * slopes.sum(-1, keepdim=True)
        return values.sum(), gradient / temperature
    ids = theirs["ids"].long()
    outcomes = joined(log_q, ids)
    log_p = theirs["log_probabilities"][:, : outcomes.shape[-1]].to(log_q.dtype)
    values, slopes = divergence(log_p - log_p.logsumexp(-1, keepdim=True), outcomes)
    gradient = log_q.exp() * -slopes.sum(-1, keepdim=True)
    if outcomes.shape[-1] > ids.shape[-1]:
        others = (log_q - outcomes[:, -1:]).exp().mul_(slopes[:, -1:])
        gradient += others.scatter_(-1, ids, 0)
    gradient.scatter_add_(-1, ids, slopes[:, : ids.shape[-1]])
    return values.sum(), gradient / temperature


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in float32, or in float64 for such logits."""
    wider = wide(logits)
    return (wider if temperature == 1 else wider / temperature).log_softmax(-1)


def _rows(answer: Answer, counts: list[int], device: torch.device) -> Iterator[Answer]:
    """Parts of an answer of so many rows each, on a device."""
    split = {name: tensor.to(device).split(counts) for name, tensor in answer.items()}
    for at in range(len(counts)):
        yield {name: parts[at] for name, parts in split.items()}


class Distance:
    """An objective of this module at work on a model.

    Args:
        student: The model that trains; its logits are caught as it gives them.
        teacher: Gives answers to `objective.targets`.
        objective: The objective, with its settings.
    """

    def __init__(self, student: nn.Module, teacher: Teaching, objective: Distillation) -> None:
        self._teacher, self._objective = teacher, objective
        self._logits: Tensor | None = None
        self._handle = student.register_forward_hook(self._catch)

    def _catch(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training or torch.is_grad_enabled():  # not while held-out loss is measured: nobody would take them
            self._logits = output.logits

    def __call__(self, loss: Tensor, batch: Batch, *, share: float = 1.0, items: Items = None) -> Tensor:
        """The objective, after the student has run on `batch`: see :class:`~quadapt.nn.objective.Bound`."""
        assert self._logits is not None
        logits, self._logits = self._logits, None
        objective, asked = self._objective, self._objective.targets.asked(batch)
        answer = self._teacher(batch)
        total = summed(logits, asked, answer, objective.divergence, objective.temperature)
        distance = objective.temperature**2 * total / (asked.sum().clamp(min=1) if items is None else items)
        if objective.weight == 1:
            return distance
        return objective.weight * distance + (1 - objective.weight) * loss

    def close(self) -> None:
        """Stop catching the student's logits."""
        self._handle.remove()


@dataclass(frozen=True, kw_only=True)
class Distillation(Objective, ABC):
    """What the two distances of predictions have in common: their settings, and what they ask of a teacher."""

    weight: Ratio = setting(panel="Training", default=0.5)
    """Share of the distance to the teacher in the objective, from 0 to 1; the rest is the cross-entropy on the data.
    At 1 a model learns nothing that its teacher does not know: right if that has been tuned."""

    temperature: Positive = setting(panel="Training", default=1.0)
    """Both models' logits are divided by it before they are compared; above 1, unlikely tokens count for more."""

    top_tokens: Count = setting(panel="Training", default=64)
    """How many of the likeliest tokens are kept on disk of each prediction of the teacher; the others count as one."""

    keep_targets: bool = setting(panel="Training", default=True)  # type: ignore[misc] # a field here, said there
    """Compute the teacher's targets once and keep them on disk, rather than the teacher in memory."""

    @property
    def targets(self) -> Predictions:
        return Predictions(float(self.temperature), self.top_tokens)

    @abstractmethod
    def divergence(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """The distance of two distributions, and its derivatives by the second: see :data:`Divergence`."""

    def bind(self, student: nn.Module, teacher: Teaching | None) -> Distance:
        assert teacher is not None
        return Distance(student, teacher, self)


@OBJECTIVES.register("kl")
@dataclass(frozen=True, kw_only=True)
class KL(Distillation):
    r"""Distillation by the forward Kullback-Leibler divergence, `KL(teacher || student)`, of every prediction.

    $$
    D(P, Q) = \sum_v P(v) \log \frac{P(v)}{Q(v)}
    $$

    The student is to cover all that the teacher thinks likely. Half of the objective is the cross-entropy on the data
    by default, since the teacher is by default the dense model from before tuning.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """

    summary: ClassVar[str] = "the Kullback-Leibler divergence of predictions from a teacher's"

    def divergence(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return kl(log_p, log_q), -log_p.exp()


@OBJECTIVES.register("js")
@dataclass(frozen=True, kw_only=True)
class JS(Distillation):
    r"""Distillation by the generalized Jensen-Shannon divergence of every prediction, between forward and reverse KL.

    $$
    D(P, Q) = \beta\, \mathrm{KL}(P \,\|\, M) + (1 - \beta)\, \mathrm{KL}(Q \,\|\, M),
    \qquad M = \beta P + (1 - \beta) Q
    $$

    with the teacher's distribution `P` and the student's `Q`. For small beta it is beta times the forward divergence
    `KL(P || Q)`, for large ones `1 - beta` times the reverse one; at a half it is symmetric, and at most `log 2`.

    Source: the definition is that of Agarwal et al. 2023, arXiv:2306.13649, section 2; UPQ (Lee et al. 2025,
    arXiv:2506.09104) lowers it, alone, to bring a model at two bits near to its full-precision original.
    Differs: sequences are those of the data, none is sampled from the student (its share "lambda" is 0); half of the
    objective is the cross-entropy on the data unless `weight` says otherwise.
    """

    summary: ClassVar[str] = "the generalized Jensen-Shannon divergence of predictions from a teacher's"

    beta: Inner = setting(panel="Training", default=0.5)
    """The teacher's share in the mixture that both models are compared with, between 0 and 1."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = mixed(log_p, log_q, self.beta)
        slopes = (1 - self.beta) * log_q.exp() * (log_q - log_m)  # what M does to both divergences cancels
        return self.beta * kl(log_p, log_m) + slopes.sum(-1), slopes
