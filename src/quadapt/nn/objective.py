"""What training lowers. An objective is a piece with settings; it is bound to the models when training starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from quadapt.registry import Registry

NO_LOSS = -100
"""Label of a token that bears no loss."""

Batch = Mapping[str, Any]
"""A batch as a collator makes it: `input_ids`, `labels`, .. `[batch, tokens]`."""

Answer = Mapping[str, Tensor]
"""What a teacher says of a batch: tensors by name, each with a row for every token that was asked about, in order."""

Teaching = Callable[[Batch], Answer]
"""Whatever gives a teacher's answers: the model that runs, or a folder in which they are kept."""


Items = Tensor | float | None
"""A number of tokens by which a sum is divided, or None."""


class Targets(Protocol):
    """What an objective asks of its teacher, about which tokens, and how the answer is kept on disk."""

    def asked(self, batch: Batch) -> Tensor:
        """The tokens that it asks about, bool `[batch, tokens]`."""

    def answer(self, teacher: nn.Module, batch: Batch) -> Answer:
        """Run the teacher on a batch that lies on its device, without gradients; a row for each token asked about."""

    def kept(self, answer: Answer) -> Answer:
        """An answer as it is kept on disk. What objectives compute from is either of the two."""

    def identity(self, batch: Batch, row: int) -> str:
        """All that the answer about one sequence of a batch depends on, as text; never its padding."""

    def check(self, student: nn.Module, teacher: nn.Module) -> None:
        """Raise ConfigError if what a teacher says cannot be compared with what a student does."""

    def token_bytes(self, model: nn.Module) -> int:
        """The bytes that the kept answer about one token of a model takes on disk."""

    def step_bytes(self, model: nn.Module, tokens: int, *, kept: bool) -> int:
        """The bytes in memory of an answer about so many tokens of a batch, and of what is computed from it.

        Args:
            model: The teacher, or another of its sizes.
            tokens: How many, all of the batch.
            kept: Whether the answer is one that was kept.
        """


class Bound(Protocol):
    """An objective at work, called after the student has run on a batch."""

    def __call__(self, loss: Tensor, batch: Batch, *, share: float = 1.0, items: Items = None) -> Tensor:
        """What is lowered instead of the cross-entropy.

        Args:
            loss: The student's cross-entropy on the batch.
            batch: What the student has just run on.
            share: The share of this batch in an optimizer step, by the number of batches, if `loss` is scaled so.
            items: By how many tokens the summed cross-entropy was divided to give `loss`: all loss-bearing ones of an
                optimizer step; None if `loss` is the mean of this batch.
        """

    def close(self) -> None:
        """Let go of the models, once training is over."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What training lowers: by itself, the cross-entropy on the data."""

    name: ClassVar[str]
    """The name of the objective on the command line."""

    summary: ClassVar[str] = ""
    """A few words that say what it lowers, for `--help`."""

    pairs: ClassVar[bool] = False
    """Whether it is about pairs of answers, of which one is preferred; see :class:`PairObjective`."""

    keep_targets: ClassVar[bool] = False
    """Whether what the teacher says is computed once and kept on disk."""

    @property
    def targets(self) -> Targets | None:
        """What it asks of a teacher; None if it needs none."""
        return None

    def bind(self, student: nn.Module, teacher: Teaching | None) -> Bound | None:
        """The objective at work on a model; None if the loss on the data is all there is.

        Args:
            student: The model that trains.
            teacher: Gives what :attr:`targets` asks for, for a batch: `quadapt.objectives.teacher.Teacher` by running
                a model, whichever is to be learnt from; None where nothing needs it.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class PairObjective(Objective, ABC):
    """What training on pairs of answers lowers: a function of how much more the chosen one has gained."""

    pairs: ClassVar[bool] = True

    @abstractmethod
    def losses(self, margins: Tensor) -> Tensor:
        """The loss of each pair, `[pairs]` in nats.

        Args:
            margins: `[pairs]`, float: by how much the log-likelihood of the chosen answer has grown since before
                training, less what that of the rejected one has.
        """


OBJECTIVES: Registry[type[Objective]] = Registry("objective", "quadapt.nn", "quadapt.objectives")
"""Every objective that is known, by name."""


@OBJECTIVES.register("cross-entropy")
@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    """The loss on the data alone."""

    summary: ClassVar[str] = "the loss on the data alone"
