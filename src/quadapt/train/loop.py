"""Training by `transformers.Trainer` of whatever parameters are trainable; it can be stopped and gone on with."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import set_seed

from quadapt.data.packing import check_packing
from quadapt.errors import ConfigError
from quadapt.hf.peft_layer import QuantLoraLinear, adapted_layers
from quadapt.hf.workspace import remove, write_json
from quadapt.methods import Run
from quadapt.nn.objective import Bound, PairObjective
from quadapt.train.best import Best
from quadapt.train.preference import PairTrainer
from quadapt.train.trainer import AdapterTrainer

log = logging.getLogger("quadapt")

_DONE = "complete.json"
"""The name of the file that is written into a checkpoint when all else is in it: a checkpoint without it was
interrupted, and is not resumed from."""


@dataclass(frozen=True)
class Trained:
    """What a training run measured, and which state is its result."""

    steps: int
    """How many optimizer steps were taken, earlier runs included."""

    losses: list[dict[str, float]]
    """The log of `Trainer`: training loss, gradient norm, learning rate, and evaluation losses, by step."""

    final_loss: float
    """The mean training loss of the last logged stretch, in nats per token."""

    eval_loss: float | None
    """The loss of the result on held-out data, in nats per token; None without such data."""

    kept_step: int
    """The optimizer step whose state is the result."""

    last_eval_loss: float | None
    """The loss on held-out data after the last step, in nats per token; None without such data."""

    seconds: float
    """The wall time of this run in seconds."""


Tick = Callable[[int, int, dict[str, float]], None]
"""A function that is called after each step with the steps done, the steps in all, and the latest figures."""


class _Watcher(TrainerCallback):
    """Reports progress, and marks checkpoints as complete."""

    def __init__(self, tick: Tick) -> None:
        self._tick = tick
        self._latest: dict[str, float] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._latest.update(
            {name: value for name, value in (logs or {}).items() if name in ("loss", "eval_loss", "learning_rate")}
        )
        if not math.isfinite(self._latest.get("loss", 0.0)):
            raise ConfigError(
                f"step {state.global_step}: the loss is {self._latest['loss']}. Lower the learning rate, or use "
                "--dtype float32"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._tick(state.global_step, state.max_steps, self._latest)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / _DONE, {item.name: item.stat().st_size for item in folder.iterdir() if item.is_file()})


class _DenseSteps(TrainerCallback):
    """Lets layers that quantize in their forward train without quantization for some steps (L4Q's first version)."""

    def __init__(self, layers: list[QuantLoraLinear], steps: int) -> None:
        self._layers, self._steps = layers, steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for layer in self._layers:
            layer.dense_steps = state.global_step < self._steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self._steps:
            for layer in self._layers:
                layer.begin_quantizing()


def train(  # noqa: PLR0913 - what it is given stands apart by name
    model: nn.Module,
    data: Any,
    run: Run,
    folder: Path,
    *,
    collate: Callable[[Sequence[Any]], Any],
    losses: Callable[[Tensor, Tensor], Tensor] | None = None,
    eval_data: Any = None,
    objective: Bound | PairObjective | None = None,
    tick: Tick = lambda *_: None,
) -> Trained:
    """Train the trainable parameters of `model`, in place.

    Args:
        model: A PEFT model, which trains in place.
        data: The sequences to train on, as `quadapt.data.encode` makes them.
        run: The recipe, and how long, how much and how often.
        folder: The folder of checkpoints. If it holds complete ones of the same run, training goes on from the last.
        collate: A function that makes a batch of some sequences.
        losses: The loss of each example, where the task is another than to go on with text, see
            :class:`AdapterTrainer`.
        eval_data: Held-out sequences, or None.
        objective: What to lower besides the loss on the data, or, of data that are pairs of answers, instead of it.
        tick: A function that is called after each step.

    Raises:
        ConfigError: Nothing is trainable, there would be no step, the loss is not finite, or the model does not keep
            packed examples apart.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("nothing is trainable. Add an adapter first (quadapt.prepare)")
    run = replace(run, keep=run.keep or ("last" if eval_data is None else "best"))
    if eval_data is None and (run.keep == "best" or run.early_stopping):
        wanted = f"keep={run.keep!r}" if run.keep == "best" else f"early_stopping={run.early_stopping}"
        raise ConfigError(f"{wanted} goes by the loss on held-out data, and there is none. Give some, or leave it out")
    steps = run.steps(len(data))
    if "position_ids" in getattr(data, "column_names", ()):
        check_packing(model)
    best = Best(model, first=run.recipe.dense_steps, keep=run.keep == "best", patience=run.early_stopping)
    trainer = (PairTrainer if isinstance(objective, PairObjective) else AdapterTrainer)(
        model=model,
        args=_arguments(run, steps, folder, has_eval=eval_data is not None),
        train_dataset=data,
        eval_dataset=eval_data,
        data_collator=collate,
        callbacks=[best, _Watcher(tick)],  # in this order: the watcher declares a checkpoint complete
    )
    if run.recipe.dense_steps:
        if run.recipe.dense_steps >= steps:
            raise ConfigError(
                f"dense_steps={run.recipe.dense_steps} leaves none of {steps} steps to train the quantizer. Use fewer"
            )
        layers = [
            layer
            for layer in adapted_layers(model).values()
            if any(layer.adapters[name].base == "float" for name in layer.active())
        ]
        trainer.add_callback(_DenseSteps(layers, run.recipe.dense_steps))
    trainer.train_by(losses)
    if isinstance(trainer, PairTrainer):
        assert isinstance(objective, PairObjective)
        trainer.prefer_by(objective)
    else:
        assert not isinstance(objective, PairObjective)
        trainer.objective = objective
    trainer.grid_learning_rate = run.recipe.grid_learning_rate
    trainer.also_learning_rate = run.recipe.also_learning_rate
    trainer.remove_callback(PrinterCallback)  # results alone go to stdout
    set_seed(run.seed)
    seconds = _optimize(trainer, best, last_checkpoint(folder), steps)
    last_eval_loss = None if eval_data is None else _last_evaluation(trainer)
    kept = best.restore()
    history = trainer.state.log_history
    return Trained(
        steps=trainer.state.global_step,
        losses=history,
        final_loss=next((float(entry["loss"]) for entry in reversed(history) if "loss" in entry), math.nan),
        eval_loss=last_eval_loss if kept is None else kept.loss,
        kept_step=trainer.state.global_step if kept is None else kept.step,
        last_eval_loss=last_eval_loss,
        seconds=seconds,
    )


def _optimize(trainer: AdapterTrainer, best: Best, last: Path | None, steps: int) -> float:
    """Take the steps that are left after the checkpoint `last`; the seconds that they took."""
    if last is not None:
        best.resume(last)
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        if state.global_step >= steps or best.exhausted:
            log.info("all steps were taken before")
            trainer._load_from_checkpoint(str(last))
            trainer.state = state
            return 0.0
        log.info("going on from step %d of %d", state.global_step, steps)
    result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    return float(result.metrics.get("train_runtime", 0.0))


def _last_evaluation(trainer: AdapterTrainer) -> float:
    """Held-out loss after the last step, measured now unless training has just done so."""
    step = trainer.state.global_step
    known = [
        entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == step
    ]
    return float(known[-1] if known else trainer.evaluate()["eval_loss"])


def _arguments(run: Run, steps: int, folder: Path, *, has_eval: bool) -> TrainingArguments:
    recipe, eval_steps = run.recipe, run.evaluations(steps) if has_eval else 0
    names = {"constant": "constant_with_warmup" if recipe.warmup_ratio else "constant"}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=names.get(recipe.schedule, recipe.schedule),
        warmup_steps=math.ceil(recipe.warmup_ratio * steps),
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        seed=run.seed,
        data_seed=run.seed,
        logging_steps=run.logging_steps or max(1, steps // 50),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=run.save_steps or max(1, min(500, math.ceil(steps / 10))),
        save_total_limit=2,
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps or None,
        activation_checkpointing=run.gradient_checkpointing,
        report_to=[] if run.report_to == "none" else [run.report_to],
        use_cpu=run.device == "cpu",
        dataloader_pin_memory=run.device != "cpu",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; interrupted ones are removed."""
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            sizes = json.loads((checkpoint / _DONE).read_text(encoding="utf-8"))
            whole = bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError, AttributeError, RecursionError):  # not there, or not what was written
            whole = False
        if whole:
            found.append(checkpoint)
        else:
            log.warning("%s was interrupted while it was written, and is removed", checkpoint)
            remove(checkpoint)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers of a model train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
