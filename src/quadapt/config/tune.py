"""The settings of `quadapt tune`. The words under a field are what `--help` prints."""

from __future__ import annotations

import contextlib
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from quadapt.config.fields import Grid, RowsOfData, StartName, Target, Walk, with_planned_method
from quadapt.config.values import Location, Sources
from quadapt.setting import Count, Flag, NotNegative, Positive, Ratio, Seed, Share, Whole

if TYPE_CHECKING:
    from quadapt.config.spec import Spec


class Adapting(Grid):
    """What is trained over the quantized weights, and how. What is not given is the method's own choice."""

    target_modules: Annotated[tuple[str, ...], Flag((), "Adapter")] = ()
    """Layers that get adapters, by name or a part of it. Default: all quantized layers."""

    rank: Annotated[Count | None, Flag(("--r", "--lora-r"), "Adapter")] = None
    """Rank of the adapters. Default: the paper's, 64."""

    train_tokens: Annotated[tuple[str, ...], Flag((), "Adapter")] = ()
    """Tokens whose rows of embedding and head train too, by name or id: marks of turns that are new, or that no
    training has told apart (repeat the flag for several)."""

    alpha: Annotated[Positive | None, Flag(("--lora-alpha",), "Adapter")] = None
    """The adapter is multiplied by alpha / rank. Default: the paper's, 16."""

    dropout: Annotated[Share | None, Flag(("--lora-dropout",), "Adapter")] = None
    """Dropout on the adapter's input. Default: the paper's."""

    pooling: Annotated[Literal["sum", "mean"] | None, Flag((), "Adapter")] = None
    """qa-lora, ir-qa-lora: sum inputs over a group, as in the paper, or average them, as in its authors' code. Default:
    sum."""

    init: Annotated[Literal["l4q", "lsq+", "symmetric", "asymmetric"] | None, Flag((), "Adapter")] = None
    """l4q, qat-lora: first scales. l4q clips nothing, the others are its paper's ablation. Default: l4q."""

    dense_steps: Annotated[Whole | None, Flag((), "Adapter")] = None
    """l4q: first steps that train A and B without quantization (the paper's first version). Default: 0."""

    form: Annotated[Literal["merged", "side"] | None, Flag((), "Adapter")] = None
    """qa-lora, ir-qa-lora: train what the merge will give (exact), or a side branch as published (equivalent). Default:
    merged."""

    start: Annotated[StartName | None, Flag((), "Adapter")] = None
    """Where the adapter starts: zero, or fitted to what quantization changed about a matrix (loftq), or about a layer's
    outputs on the calibration text (quailora, cloq, qera). For qa-lora it is folded into the offsets. Default: the
    method's."""

    fisher: Annotated[bool, Flag((), "Adapter")] = False
    """lq: weight errors by the diagonal Fisher information of the full-precision model on the calibration text."""

    objective: Annotated[Literal["cross-entropy", "rilq"], Flag((), "Training")] = "cross-entropy"
    """rilq: half of the objective is the distance of the last hidden state to the full-precision model's."""

    keep_targets: Annotated[bool, Flag((), "Training")] = True
    """rilq: compute the teacher's targets once and keep them on disk, rather than the teacher in memory."""

    learning_rate: Annotated[Positive | None, Flag(("--lr",), "Training")] = None
    """Peak learning rate of AdamW. Default: the paper's."""

    grid_learning_rate: Annotated[Positive | None, Flag(("--scale-lr",), "Training")] = None
    """Peak learning rate of scales and offsets, relative to the scale, where these train. Default: the method's."""

    schedule: Annotated[Literal["constant", "cosine", "linear"] | None, Flag(("--lr-scheduler-type",), "Training")] = (
        None
    )
    """Learning rate after the warm-up. Default: the paper's."""

    warmup_ratio: Annotated[Ratio | None, Flag((), "Training")] = None
    """Share of the steps over which the learning rate rises. Default: the paper's."""

    weight_decay: Annotated[NotNegative | None, Flag((), "Training")] = None
    """AdamW's weight decay. Default: the paper's."""

    max_grad_norm: Annotated[NotNegative | None, Flag((), "Training")] = None
    """Gradients are scaled down to this norm. Default: the paper's."""

    seed: Annotated[Seed, Flag((), "Training")] = 0
    """Of initialization, data order, dropout and calibration."""

    @cached_property
    def spec(self) -> Spec:
        from quadapt.config.spec import Spec
        from quadapt.methods import Recipe

        names = {
            "pooling",
            "init",
            "form",
            "start",
            "objective",
            *Recipe.__dataclass_fields__,
        } & type(self).model_fields.keys()
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.fisher:
            given["fisher"] = True
        if not self.keep_targets:
            given["keep_targets"] = False
        chosen = self._method(**given)
        return Spec.of(chosen, planned=self.budget_plan(chosen), skip=self.skip, target_modules=self.target_modules)


class PrepareConfig(Adapting, Walk):
    """Settings of :func:`quadapt.prepare`: all that a method is made of, and the machine."""


class TuneConfig(Target, Adapting, RowsOfData, Walk):
    """Fine-tune a model: quantize it if it is not yet, train an adapter over it."""

    model: Annotated[Location, Flag(positional=True, reads=True)]
    """Folder or hub name: a dense model (it is quantized first), one that quadapt has quantized, or an adapter that
    tune has written (it is trained on, over the same base)."""

    data: Annotated[Sources, Field(min_length=1), Flag((), "Data", reads=True)]
    """Training data: text, JSON lines, CSV, Parquet (also .gz), a folder, or a hub name; repeat it to mix several.
    Columns: text; prompt and completion; instruction, input and output; question and answer; messages or conversations;
    prompt, chosen and rejected; .."""

    output: Annotated[Location, Flag(("-o", "--output-dir"), "Output", idle=True)] = ""
    """Folder to write. It appears when the work is complete; an interrupted command, given again, goes on. Default:
    here, named after model, method and bits."""

    eval_data: Annotated[Sources, Flag((), "Data", idle=True, reads=True)] = ()
    """Held-out data, of the same kinds."""

    eval_split: Annotated[Share, Flag((), "Data")] = 0.0
    """Share of the training data to hold out, if there is no --eval-data."""

    seq_len: Annotated[Count | None, Flag(("--max-length", "--max-seq-length"), "Data")] = None
    """Tokens in a sequence; longer examples are truncated, and counted. Default: the model's context, at most 1024."""

    packing: Annotated[bool, Flag((), "Data")] = False
    """Pack several examples into a sequence; attention does not cross them. (Plain text always fills its sequences.)"""

    completion_only: Annotated[bool, Flag((), "Data")] = True
    """Loss on completions (or the assistant's turns) alone."""

    teacher: Annotated[Location | None, Flag((), "Training", reads=True)] = None
    """rilq: folder or hub name of the full-precision model. Default: the dense model, or what the base was made of."""

    max_steps: Annotated[Whole, Flag((), "Training")] = 0
    """Optimizer steps; 0 to go by --epochs."""

    epochs: Annotated[Positive, Flag(("--num-train-epochs",), "Training")] = 1.0
    """Passes over the data."""

    batch_size: Annotated[Count, Flag(("--per-device-train-batch-size",), "Training")] = 8
    """Sequences in one forward pass."""

    gradient_accumulation: Annotated[Count, Flag(("--gradient-accumulation-steps",), "Training")] = 2
    """Forward passes per optimizer step. The default makes the papers' batch of 16."""

    gradient_checkpointing: Annotated[bool, Flag((), "Training", idle=True)] = False
    """Recompute activations in backward: less memory, about a third more time."""

    save_steps: Annotated[Whole, Flag((), "Training", idle=True)] = 0
    """Steps between checkpoints to resume from. Default: a tenth of the run, at most 500."""

    eval_steps: Annotated[Whole, Flag((), "Training", idle=True)] = 0
    """Steps between evaluations on held-out data. Default: a tenth of the run; with --keep last only at the end."""

    keep: Annotated[Literal["best", "last"] | None, Flag((), "Training")] = None
    """Which state is written: best, that of the lowest held-out loss, or the last. Default: best if there is held-out
    data."""

    early_stopping: Annotated[Whole, Flag(("--early-stopping-patience",), "Training")] = 0
    """Stop after so many evaluations in a row without a lower held-out loss. Default: never."""

    report_to: Annotated[str, Flag((), "Training", idle=True)] = "none"
    """Where Trainer also reports: none, tensorboard, wandb, .."""

    dry_run: Annotated[bool, Flag((), "Output", idle=True)] = False
    """Print what would be done, the true bits per weight and the peak memory, and stop."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """Name the output, if the user has not."""
        values = with_planned_method(values)
        if isinstance(values, dict) and isinstance(values.get("model"), str) and values.get("output") is None:
            bits = f"-{values['bits']}bit" if values.get("bits") else ""
            with contextlib.suppress(OSError, ValueError):  # such a path is refused by the checks of the fields
                name = Path(os.path.expanduser(values["model"])).resolve().name
                return {**values, "output": f"{name}-{values.get('method', 'qa-lora')}{bits}"}
        return values

    def idle(self) -> set[str]:
        """As the flags say; but held-out data that decides what is kept, or when to stop, changes the result."""
        deciding = self.keeps == "best" or self.early_stopping
        return super().idle() - ({"eval_data", "eval_steps"} if deciding else set())

    def effective(self) -> dict[str, Any]:
        return {**super().effective(), "keep": self.keeps}

    @property
    def keeps(self) -> Literal["best", "last"]:
        """Which state is written."""
        return self.keep or ("best" if self.eval_data or self.eval_split else "last")
