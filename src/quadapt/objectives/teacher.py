"""A teacher at work: the model that answers while the student trains, or a folder of answers that it gave before.

What is asked of it is said by the objective's :class:`~quadapt.nn.objective.Targets`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quadapt.files import writing
from quadapt.nn.objective import Answer, Batch, Targets
from quadapt.nn.resident import moved


def real_tokens(batch: Batch) -> Tensor:
    """Which tokens of a batch are not padding, bool `[batch, tokens]`."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    # Packed sequences have no mask; each padding token has position 0, and so has what comes after it (collate.py).
    position = batch["position_ids"]
    after = torch.cat([position[:, 1:], torch.zeros_like(position[:, :1])], dim=1)
    return (position != 0) | (after != 0)


def sequence_identity(batch: Batch, row: int) -> str:
    """The tokens of one sequence of a batch, and their positions if it has any, as text."""
    ids = batch["input_ids"][row][real_tokens(batch)[row]].tolist()
    positions = batch["position_ids"][row].tolist()[: len(ids)] if "position_ids" in batch else []
    return repr((ids, positions))


def run(model: nn.Module, batch: Batch, **settings: object) -> Any:
    """Run a model on a batch, without its labels."""
    return model(**{name: value for name, value in batch.items() if name != "labels"}, **settings)


class Teacher:
    """Gives the answers of a model by running it.

    Args:
        model: The model to learn from, in evaluation mode; nothing of it is trained.
        targets: What is asked of it.
    """

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        self._model, self._targets = model, targets

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Answer:
        """What was asked about a batch, on the teacher's device, wherever the batch is."""
        device = next(self._model.parameters()).device
        return self._targets.answer(self._model, moved(dict(batch), device))


class KeptTeacher:
    """Gives what a teacher gave once, from a folder: the teacher need not stay in memory while training.

    Args:
        folder: One file for each sequence, by a digest of all that the answer depends on.
        targets: What was asked of the teacher.
    """

    def __init__(self, folder: Path, targets: Targets) -> None:
        self._folder, self._targets = folder, targets

    def fill(
        self,
        teacher: Teacher,
        batches: Iterable[Batch],
        progress: Callable[[Sequence[Batch]], Iterable[Batch]] = iter,
    ) -> None:
        """Run the teacher over batches whose sequences are not there yet; may be interrupted, and goes on."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for batch in progress(list(batches)):
            names = [self._name(batch, row) for row in range(len(batch["input_ids"]))]
            if all(name.exists() for name in names):
                continue
            counts = self._targets.asked(batch).sum(1).tolist()
            kept = self._targets.kept(teacher(batch))
            rows = {name: tensor.cpu().split(counts) for name, tensor in kept.items()}
            for row, path in enumerate(names):
                with writing(path) as making:
                    # a copy of its own: a part of a tensor would be written with the whole of it
                    save_file({name: parts[row].clone() for name, parts in rows.items()}, making)

    def __call__(self, batch: Batch) -> Answer:
        """What was kept about the sequences of a batch, on the device of the batch."""
        rows = [load_file(self._name(batch, row)) for row in range(len(batch["input_ids"]))]
        joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return dict(moved(joined, batch["input_ids"].device))

    def _name(self, batch: Batch, row: int) -> Path:
        digest = hashlib.sha256(self._targets.identity(batch, row).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.safetensors"
