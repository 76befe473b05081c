"""What training lowers besides the loss on the data: RILQ's distance to the full-precision model.

RILQ (Lee et al. 2024, arXiv:2412.01129): at two bits a layer's error has high rank, so that no low-rank adapter can
undo it layer by layer; asking for the output of the last block alone lets the layers make up for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from quadapt.errors import ConfigError
from quadapt.model.select import find_blocks
from quadapt.nn.objective import OBJECTIVES, Answer, Batch, Items, Objective, Teaching
from quadapt.objectives.teacher import real_tokens, run, sequence_identity
from quadapt.setting import Ratio, setting


class LastHidden:
    """Catches what the last block of a model gives, `[batch, tokens, hidden]`, whenever the model runs."""

    def __init__(self, model: nn.Module) -> None:
        blocks = list(find_blocks(model).values())
        if not blocks:
            raise ConfigError(
                f"{type(model).__name__} has no list of blocks, whose last one rilq reads. Use another objective"
            )
        self.value: Tensor | None = None
        self._handle = blocks[-1].register_forward_hook(self._catch)

    def _catch(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.value = output[0] if isinstance(output, tuple) else output

    def take(self) -> Tensor:
        """Give the value that was caught last, and forget it."""
        assert self.value is not None
        value, self.value = self.value, None
        return value

    def close(self) -> None:
        """Stop catching what the last block gives."""
        self._handle.remove()


@dataclass(frozen=True)
class Hidden:
    """The last hidden state of every token that is not padding: `hidden [asked, hidden]`, in the model's dtype."""

    def asked(self, batch: Batch) -> Tensor:
        """Every token that is not padding, bool `[batch, tokens]`."""
        return real_tokens(batch)

    def answer(self, teacher: nn.Module, batch: Batch) -> Answer:
        """What the teacher's last block gives; its head computes as little as may be."""
        hidden = LastHidden(teacher)
        try:
            run(teacher, batch, logits_to_keep=1)
        finally:
            hidden.close()
        return {"hidden": hidden.take()[self.asked(batch)]}

    def kept(self, answer: Answer) -> Answer:
        """The answer as it is."""
        return answer

    def identity(self, batch: Batch, row: int) -> str:
        """The tokens of a sequence and their positions."""
        return sequence_identity(batch, row)

    def check(self, student: nn.Module, teacher: nn.Module) -> None:
        """Raise ConfigError if hidden states are of another width."""
        ours, theirs = (_width(model) for model in (student, teacher))
        if ours != theirs:
            raise ConfigError(
                f"the teacher's hidden states have {theirs} numbers, and those of the model that trains {ours}: they "
                "cannot be compared. Give the full-precision model that it was made of (--teacher)"
            )

    def token_bytes(self, model: nn.Module) -> int:
        """The bytes of one hidden state."""
        weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
        return weight.shape[1] * weight.itemsize

    def step_bytes(self, model: nn.Module, tokens: int, *, kept: bool) -> int:
        """The hidden states of a batch, the student's in float32, their error and its square."""
        weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
        return tokens * (self.token_bytes(model) + 4 * 4 * weight.shape[1])


def _width(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


class HiddenDistance:
    """`weight * mean squared error of the last hidden state + (1 - weight) * cross-entropy`.

    Args:
        student: The model that trains.
        teacher: Gives the full-precision model's hidden states for a batch, as :class:`Hidden` asks for them.
        weight: The weight of the model-level error, between 0 and 1.
    """

    def __init__(self, student: nn.Module, teacher: Teaching, weight: float) -> None:
        self._hidden, self._teacher, self._weight = LastHidden(student), teacher, weight

    def __call__(self, loss: Tensor, batch: Batch, *, share: float = 1.0, items: Items = None) -> Tensor:
        """The objective, after the student has run on `batch`: see :class:`~quadapt.nn.objective.Bound`.

        The error is a mean over all tokens that are not padding, with or without loss, so `items` do not count them.
        """
        ours, theirs = self._hidden.take()[real_tokens(batch)], self._teacher(batch)["hidden"]
        error = (ours.float() - theirs.to(ours.device).float()).square().mean()
        return self._weight * share * error + (1 - self._weight) * loss

    def close(self) -> None:
        """Stop catching what the student's last block gives."""
        self._hidden.close()


@OBJECTIVES.register("rilq")
@dataclass(frozen=True, kw_only=True)
class RILQ(Objective):
    """RILQ (Lee et al. 2024, arXiv:2412.01129): also the distance of the last hidden state to the dense model's."""

    summary: ClassVar[str] = "half of it is the distance of the last hidden state to the full-precision model's"

    weight: Ratio = setting(panel="Training", default=0.5)
    """Share of the distance to the teacher in the objective, from 0 to 1; the rest is the cross-entropy on the data."""

    keep_targets: bool = setting(panel="Training", default=True)  # type: ignore[misc] # a field here, said there
    """Compute the teacher's targets once and keep them on disk, rather than the teacher in memory."""

    @property
    def targets(self) -> Hidden:
        return Hidden()

    def bind(self, student: nn.Module, teacher: Teaching | None) -> HiddenDistance:
        assert teacher is not None
        return HiddenDistance(student, teacher, self.weight)
