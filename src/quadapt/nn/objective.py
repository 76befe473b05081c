"""What training lowers. An objective is a piece with settings; it is bound to the models when training starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from quadapt.registry import Registry

Batch = Mapping[str, Any]
"""A batch as a collator makes it: `input_ids`, `labels`, .. `[batch, tokens]`."""


class Bound(Protocol):
    """An objective at work, called after the student has run on a batch."""

    def __call__(self, loss: Tensor, batch: Batch, *, share: float = 1.0) -> Tensor:
        """What is lowered instead of `loss`, the cross-entropy; `share`: of this batch in an optimizer step."""

    def close(self) -> None:
        """Let go of the models, once training is over."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What training lowers: by itself, the cross-entropy on the data."""

    name: ClassVar[str]
    """The name of the objective on the command line."""

    summary: ClassVar[str] = ""
    """A few words that say what it lowers, for `--help`."""

    needs_teacher: ClassVar[bool] = False
    """Whether it is told what the full-precision model's last block gives."""

    keep_targets: ClassVar[bool] = False
    """Whether what the teacher says is computed once and kept on disk."""

    def bind(self, student: nn.Module, teacher: Callable[[Batch], Tensor] | None) -> Bound | None:
        """The objective at work on a model; None if the loss on the data is all there is.

        Args:
            student: The model that trains.
            teacher: Gives the full-precision model's last hidden state for a batch, `[batch, tokens, hidden]`; None
                where nothing needs it.
        """
        return None


OBJECTIVES: Registry[type[Objective]] = Registry("objective", "quadapt.nn", "quadapt.objectives")
"""Every objective that is known, by name."""


@OBJECTIVES.register("cross-entropy")
@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    """The loss on the data alone."""

    summary: ClassVar[str] = "the loss on the data alone"
