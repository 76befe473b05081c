"""How training goes: the recipe of a paper, and one run by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from quadapt.errors import ConfigError
from quadapt.setting import Count, NotNegative, Positive, Ratio, Seed, Share, Whole, setting


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a paper trains. Every field can be overridden; what is used is printed before training starts."""

    learning_rate: Positive = setting("--lr", panel="Training")
    """The peak learning rate of AdamW."""

    rank: Count = setting("--r", "--lora-r", panel="Adapter", default=64)
    """The rank of the adapters' two factors."""

    alpha: Positive = setting("--lora-alpha", panel="Adapter", default=16)
    """The adapter is multiplied by alpha / rank."""

    dropout: Share = setting("--lora-dropout", panel="Adapter", default=0.0)
    """The share of the adapter's inputs that is dropped in training."""

    schedule: Literal["constant", "cosine", "linear"] = setting(
        "--lr-scheduler-type", panel="Training", default="constant"
    )
    """How the learning rate goes on after the warm-up."""

    warmup_ratio: Ratio = setting(panel="Training", default=0.0)
    """Share of the steps over which the learning rate rises."""

    weight_decay: NotNegative = setting(panel="Training", default=0.0)
    """The weight decay that AdamW applies to adapters."""

    max_grad_norm: NotNegative = setting(panel="Training", default=0.3)
    """Gradients are scaled down to this norm."""

    adam_beta2: Share = 0.999
    """The second decay rate of AdamW's averages."""

    grid_learning_rate: Positive | None = setting("--scale-lr", panel="Training", default=None)
    """Peak learning rate of scales and offsets, where these train; relative to the scale, without weight decay."""

    also_learning_rate: Positive | None = setting(panel="Training", default=None)
    """Peak learning rate of what --train-also names. Default: the adapters'."""

    dense_steps: Whole = setting(panel="Adapter", default=0)
    """First steps that train a low-rank change of the dense matrix, before anything is quantized (L4Q's first version).
    """

    source: str = ""
    """Where the numbers of this recipe come from."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: the recipe (learning rate, schedule, clipping) and how long, how much, how often."""

    recipe: Recipe
    """The recipe: learning rate, schedule and clipping."""

    max_steps: Whole = setting(panel="Training", default=0)
    """Optimizer steps; 0 to go by epochs."""

    epochs: Positive = setting("--num-train-epochs", panel="Training", default=1.0)
    """Passes over the data, unless max_steps is given."""

    batch_size: Count = setting("--per-device-train-batch-size", panel="Training", default=8)
    """How many sequences go through the model at once."""

    gradient_accumulation: Count = setting("--gradient-accumulation-steps", panel="Training", default=2)
    """Forward passes per optimizer step. The default makes the papers' batch of 16."""

    seed: Seed = setting(panel="Training", default=0)
    """The seed of initialization, data order, dropout and calibration."""

    save_steps: Whole = setting(panel="Training", default=0, idle=True)
    """Steps between checkpoints to resume from; 0: a tenth of the run, at most 500."""

    eval_steps: Whole = setting(panel="Training", default=0, idle=True)
    """Steps between evaluations on held-out data; 0: a tenth of the run where they decide what is kept or when to stop,
    else only at the end."""

    keep: Literal["best", "last"] | None = setting(panel="Training", default=None)
    """Which state is the result: best, that of the lowest held-out loss, or the last. Default: best if there is
    held-out data."""

    early_stopping: Whole = setting("--early-stopping-patience", panel="Training", default=0)
    """Stop after so many evaluations in a row without a lower held-out loss; 0: never."""

    logging_steps: Whole = 0
    """Steps between logged losses; 0: a fiftieth of the run."""

    gradient_checkpointing: bool = setting(panel="Training", default=False, idle=True)
    """Recompute activations in backward: less memory, about a third more time."""

    report_to: str = setting(panel="Training", default="none", idle=True)
    """Where training also reports its figures: none, tensorboard, wandb, .."""

    device: str = "cpu"
    """The device to train on, by its name in torch."""

    def steps(self, sequences: int) -> int:
        """Optimizer steps over a training set of so many sequences.

        Raises:
            ConfigError: There would be none.
        """
        per_epoch = max(1, math.ceil(math.ceil(sequences / self.batch_size) / self.gradient_accumulation))
        steps = self.max_steps or math.ceil(self.epochs * per_epoch)
        if steps < 1:
            raise ConfigError(
                f"max_steps={self.max_steps} and epochs={self.epochs} give no step. Use --max-steps 1 or more"
            )
        return steps

    def reads(self, sequences: int) -> int:
        """How many of so many sequences it reads: all, unless it ends before it has gone over them once."""
        return min(sequences, self.steps(sequences) * self.batch_size * self.gradient_accumulation)

    def evaluations(self, steps: int) -> int:
        """Steps between evaluations in a run of `steps` steps; 0: only at the end."""
        needed = self.keep == "best" or self.early_stopping
        return self.eval_steps or (max(1, math.ceil(steps / 10)) if needed else 0)
