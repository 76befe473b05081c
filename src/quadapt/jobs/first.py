"""Tune the dense model before it is quantized (`--tune-first`): a checkpoint that is quantized, and that teaches."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from quadapt.config import TuneConfig
from quadapt.hf.also import also
from quadapt.hf.folder import Folder
from quadapt.hf.kinds import peft_task
from quadapt.hf.loading import load_model
from quadapt.hf.reading import read_json
from quadapt.hf.workspace import Workspace, remove, write_json
from quadapt.jobs.embeddings import write_dense
from quadapt.jobs.source import device_of
from quadapt.jobs.tasking import Lesson
from quadapt.methods import Run
from quadapt.methods.first import Tuning
from quadapt.model.select import matching, select
from quadapt.report.ui import UI

TUNED = "tuned"
"""The folder, within the output in the making, of the dense model that was tuned."""

CHECKPOINTS = "checkpoints-first"
"""The folder of checkpoints of that tuning."""

_NOTE = "tuned.json"


@dataclass(frozen=True)
class Stages:
    """A run whose first steps tune the dense model."""

    first: Run
    """The run over the dense model."""

    then: Run
    """The run of the adapter over what is quantized."""

    @classmethod
    def of(cls, config: TuneConfig, sequences: int) -> Stages | None:
        """Divide the run of a command over a training set of so many sequences; None if nothing is tuned first.

        Raises:
            ConfigError: There would be no step.
        """
        chosen, run = config.spec.method.tune_first, config.run
        if not isinstance(chosen, Tuning):
            return None
        total = run.steps(sequences)
        steps = chosen.steps(total)
        recipe = replace(run.recipe, learning_rate=chosen.learning_rate, dense_steps=0)
        first = replace(run, recipe=recipe, max_steps=steps, keep=config.keeps)
        return cls(first, replace(run, max_steps=max(1, total - steps)))


def tuned_first(
    config: TuneConfig,
    space: Workspace,
    folder: Folder,
    lesson: Lesson,
    run: Run,
    ui: UI,
    *,
    name: str = TUNED,
) -> tuple[Path, dict[str, Any]]:
    """The dense model after its first steps, as a checkpoint within the output in the making; made once.

    Args:
        config: The settings.
        space: The output in the making.
        folder: The dense model.
        lesson: What it is trained on.
        run: The steps that tune the dense model.
        ui: Where progress is shown.
        name: The name of the folder that is made.

    Returns:
        The folder, and what training measured.
    """
    path = space.path / name
    if not path.exists():
        making = path.with_name(f"{name}.partial")
        remove(making)
        making.mkdir()
        model, about = _trained(config, space, folder, lesson, run, ui)
        write_dense(model, lesson.prepare, making)
        write_json(making / _NOTE, about)
        os.rename(making, path)
        remove(space.path / CHECKPOINTS)
    return path, read_json(path / _NOTE)


def _trained(
    config: TuneConfig,
    space: Workspace,
    folder: Folder,
    lesson: Lesson,
    run: Run,
    ui: UI,
) -> tuple[Any, dict[str, Any]]:
    from transformers.trainer_utils import set_seed

    from quadapt.train import train

    device, chosen = device_of(config), config.spec.method.tune_first
    code = config.trust_remote_code
    dense = load_model(folder.name, dtype=config.dtype, device=device, trust_remote_code=code, head=config.head)
    set_seed(run.seed)
    model = trainable(dense, config)
    with ui.working(f"tuning the dense model ({chosen.name})") as tick:
        found = train(
            model,
            lesson.data.data,
            replace(run, device=device),
            space.path / CHECKPOINTS,
            collate=lesson.task.collator(lesson.prepare, dense),
            losses=lesson.task.losses(dense.config),
            eval_data=None if lesson.held_out is None else lesson.held_out.data,
            tick=tick,
        )
    held_out = "" if found.eval_loss is None else f", held-out loss {found.eval_loss:.4f}"
    ui.show(f"the dense model, {found.steps} steps in {found.seconds:.0f} s: loss {found.final_loss:.4f}{held_out}")
    about = {
        "kind": chosen.name,
        **asdict(chosen),
        "steps": found.steps,
        "final_loss": found.final_loss,
        "seconds": found.seconds,
        "losses": found.losses,
    }
    merged: Any = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # type: ignore[operator]
    return merged, {**about, "eval_loss": found.eval_loss, "kept_step": found.kept_step}


def trainable(dense: nn.Module, config: TuneConfig, *, on_meta: bool = False) -> nn.Module:
    """The dense model with what trains in the first steps: LoRA over the layers, or their own weights; and its head.

    Raises:
        ConfigError: A name of target_modules or skip matches no layer.
    """
    from peft import LoraConfig, get_peft_model

    spec = config.spec
    recipe, layers = spec.method.recipe, select(dense, skip=spec.skip, part=spec.part).chosen
    names = matching(layers, spec.target_modules)
    dense.requires_grad_(False)
    own = also(dense, ())
    if spec.method.tune_first.whole:
        for name in names:
            layers[name].weight.requires_grad_(True)
        for name in own.modules:
            dense.get_submodule(name).requires_grad_(True)
        return dense
    about = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # PEFT divides it, whole or not
        lora_dropout=recipe.dropout,
        target_modules=names,
        task_type=peft_task(dense),
    )
    own.configure(about)
    return get_peft_model(dense, about, low_cpu_mem_usage=on_meta)
