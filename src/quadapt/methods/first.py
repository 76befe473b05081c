"""What becomes of the dense model before it is quantized: nothing, or a tuning of its own.

A model that is tuned first, and then quantized towards what it has become, keeps more of its tuning than one whose
quantization is tuned from the beginning: rounding is undone while the task is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quadapt.registry import Registry
from quadapt.setting import Inner, Positive, setting


@dataclass(frozen=True, kw_only=True)
class First:
    """What is done before quantizing: by itself, nothing."""

    name: ClassVar[str]
    """The name on the command line."""

    summary: ClassVar[str] = ""
    """A few words that say what is done, for `--help`."""

    tunes: ClassVar[bool] = False
    """Whether the dense model is tuned."""

    whole: ClassVar[bool] = False
    """Whether all weights of its layers train then, or a low-rank change of them."""


FIRSTS: Registry[type[First]] = Registry("tune_first", "quadapt.methods", group="quadapt.firsts")
"""Everything that may become of the dense model before it is quantized, by name."""


@FIRSTS.register("none")
@dataclass(frozen=True, kw_only=True)
class Untuned(First):
    """The model is quantized as it is."""

    summary: ClassVar[str] = "it is quantized as it is"


@dataclass(frozen=True, kw_only=True)
class Tuning(First):
    """A part of the run's steps tunes the dense model; the rest trains the adapter over the quantized one.

    The data, the batch, the schedule and the seed are those of the run, so that steps and tokens are counted whole.
    """

    tunes: ClassVar[bool] = True

    share: Inner = setting("--first-share", panel="Training", name="first_share", default=0.5)
    """The share of the run's steps that tune the dense model, before it is quantized."""

    learning_rate: Positive = setting("--first-lr", panel="Training", name="first_learning_rate", default=2e-4)
    """The peak learning rate of these first steps."""

    def steps(self, total: int) -> int:
        """How many of the run's steps they are: at least one, and at least one fewer than all."""
        return max(1, min(total - 1, round(self.share * total)))


@FIRSTS.register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRAFirst(Tuning):
    """LoRA of the run's rank over the layers that are going to be quantized, merged into the dense model."""

    summary: ClassVar[str] = "LoRA over it, merged"


@FIRSTS.register("full")
@dataclass(frozen=True, kw_only=True)
class FullFirst(Tuning):
    """All weights of the layers that are going to be quantized; AdamW then needs 12 bytes more for each of them."""

    summary: ClassVar[str] = "all weights of the layers that are quantized"

    whole: ClassVar[bool] = True
