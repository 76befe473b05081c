"""What training lowers besides the loss on the data: RILQ's distance to the full-precision model.

RILQ (Lee et al. 2024, arXiv:2412.01129): at two bits a layer's error has high rank, so that no low-rank adapter can
undo it layer by layer; asking for the output of the last block alone lets the layers make up for each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quadapt.files import writing
from quadapt.model.select import find_blocks
from quadapt.nn.objective import OBJECTIVES, Batch, Objective
from quadapt.nn.resident import moved
from quadapt.setting import setting


class LastHidden:
    """Catches what the last block of a model gives, `[batch, tokens, hidden]`, whenever the model runs."""

    def __init__(self, model: nn.Module) -> None:
        last = list(find_blocks(model).values())[-1]
        self.value: Tensor | None = None
        self._handle = last.register_forward_hook(self._catch)

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


def real_tokens(batch: Batch) -> Tensor:
    """Which tokens of a batch are not padding, bool `[batch, tokens]`."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    # Packed sequences have no mask; each padding token has position 0, and so has what comes after it (collate.py).
    position = batch["position_ids"]
    after = torch.cat([position[:, 1:], torch.zeros_like(position[:, :1])], dim=1)
    return (position != 0) | (after != 0)


class Teacher:
    """Gives the full-precision model's last hidden state for a batch, by running the model.

    Args:
        model: In evaluation mode; nothing of it is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._hidden = model, LastHidden(model)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """`[batch, tokens, hidden]`, on the teacher's device, wherever the batch is."""
        device = next(self._model.parameters()).device
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        self._model(**moved(inputs, device), logits_to_keep=1)
        return self._hidden.take()


class KeptTeacher:
    """Gives what a teacher gave once, from a folder: the teacher need not stay in memory while training.

    Args:
        folder: One file for each sequence, by a digest of its tokens.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

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
            for name, hidden, real in zip(names, teacher(batch).cpu(), real_tokens(batch).cpu(), strict=True):
                with writing(name) as making:
                    save_file({"hidden": hidden[real].contiguous()}, making)

    def __call__(self, batch: Batch) -> Tensor:
        """`[batch, tokens, hidden]`; zeros at padding."""
        rows = [load_file(self._name(batch, row))["hidden"] for row in range(len(batch["input_ids"]))]
        real = real_tokens(batch).cpu()
        hidden = rows[0].new_zeros(*real.shape, rows[0].shape[-1])
        for row, kept in enumerate(rows):
            hidden[row, real[row]] = kept
        return hidden.to(batch["input_ids"].device)

    def _name(self, batch: Batch, row: int) -> Path:
        ids = batch["input_ids"][row][real_tokens(batch)[row]].tolist()
        positions = batch["position_ids"][row].tolist()[: len(ids)] if "position_ids" in batch else []
        digest = hashlib.sha256(repr((ids, positions)).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.safetensors"


class HiddenDistance:
    """`weight * mean squared error of the last hidden state + (1 - weight) * cross-entropy`.

    Args:
        student: The model that trains.
        teacher: Gives the full-precision model's hidden state for a batch.
        weight: The weight of the model-level error, between 0 and 1.
    """

    def __init__(self, student: nn.Module, teacher: Callable[[Batch], Tensor], weight: float) -> None:
        self._hidden, self._teacher, self._weight = LastHidden(student), teacher, weight

    def __call__(self, loss: Tensor, batch: Batch, *, share: float = 1.0) -> Tensor:
        """The objective, after the student has run on `batch`.

        Args:
            loss: The student's cross-entropy on the batch.
            batch: What the student ran on.
            share: The share of this batch in an optimizer step, if `loss` is scaled by it.
        """
        real = real_tokens(batch)
        ours, theirs = self._hidden.take(), self._teacher(batch)
        error = (ours[real].float() - theirs[real].float()).square().mean()
        return self._weight * share * error + (1 - self._weight) * loss

    def close(self) -> None:
        """Stop catching what the student's last block gives."""
        self._hidden.close()


@OBJECTIVES.register("rilq")
@dataclass(frozen=True, kw_only=True)
class RILQ(Objective):
    """RILQ (Lee et al. 2024, arXiv:2412.01129): also the distance of the last hidden state to the dense model's."""

    summary: ClassVar[str] = "half of it is the distance of the last hidden state to the full-precision model's"
    needs_teacher: ClassVar[bool] = True

    weight: float = 0.5
    """Share of the distance in the objective, from 0 to 1; the authors use a half."""

    keep_targets: bool = setting(panel="Training", default=True)  # type: ignore[misc] # a field here, said there
    """Compute the teacher's targets once and keep them on disk, rather than the teacher in memory."""

    def bind(self, student: nn.Module, teacher: Callable[[Batch], Tensor] | None) -> HiddenDistance:
        assert teacher is not None
        return HiddenDistance(student, teacher, self.weight)
