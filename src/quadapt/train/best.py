"""Keep the state of the lowest held-out loss, and stop when it falls no more.

The best state so far is held in memory (an adapter is small) and written into every checkpoint. So a run that goes on
from a checkpoint knows exactly what it knew there, and ends as it would have without the interruption.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from quadapt.hf.peft_layer import declared_params
from quadapt.hf.reading import read_json
from quadapt.hf.workspace import write_json

_NOTE, _STATE = "best.json", "best.safetensors"


@dataclass(frozen=True)
class Record:
    """The best evaluation of a run so far."""

    step: int
    """The optimizer step after which it was made."""

    loss: float
    """The held-out loss that it measured, in nats per token."""

    waited: int
    """How many evaluations have been made since then, none of them better."""


class Best(TrainerCallback):
    """Watches the evaluations of a run.

    Args:
        model: A PEFT model that trains.
        first: Evaluations before this step do not count.
        keep: Whether to hold the best state, not only its loss.
        patience: Stop after so many evaluations in a row that are not better; 0: never.
    """

    def __init__(self, model: nn.Module, *, first: int, keep: bool, patience: int) -> None:
        self._model, self._first, self._keep, self._patience = model, first, keep, patience
        self.record: Record | None = None
        self._state: dict[str, Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether the run is to stop."""
        return bool(self._patience and self.record is not None and self.record.waited >= self._patience)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare with the best so far."""
        if state.global_step < self._first or not (self._keep or self._patience):
            return
        loss = (metrics or {})["eval_loss"]
        if math.isfinite(loss) and (self.record is None or loss < self.record.loss):
            self.record = Record(state.global_step, loss, 0)
            self._state = {name: tensor.detach().cpu().clone() for name, tensor in self._adapters().items()}
        elif self.record is not None:
            self.record = Record(self.record.step, self.record.loss, self.record.waited + 1)
        control.should_training_stop |= self.exhausted

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put what is known into the checkpoint."""
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.record is not None and args.should_save:
            write_json(folder / _NOTE, asdict(self.record))
            if self._keep:
                save_file(self._state, folder / _STATE)

    def resume(self, checkpoint: Path) -> None:
        """Know what was known when the checkpoint was written.

        Raises:
            CheckpointError: The note is damaged.
        """
        if (checkpoint / _NOTE).exists():
            self.record = Record(**read_json(checkpoint / _NOTE))
            self._state = load_file(checkpoint / _STATE) if self._keep else {}

    @torch.no_grad()
    def restore(self) -> Record | None:
        """Give the model its best state; None if the last is to be kept."""
        if not self._keep or self.record is None:
            return None
        for name, tensor in self._adapters().items():
            tensor.copy_(self._state[name])
        return self.record

    def _adapters(self) -> dict[str, Tensor]:
        """All that training may change: what has a gradient, and what adapters hold besides."""
        declared = {id(parameter) for parameter, _ in declared_params(self._model)}
        return {
            name: parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad or id(parameter) in declared
        }
