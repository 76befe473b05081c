"""`transformers.Trainer`, changed in what training adapters over a quantized base needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from quadapt.data.collate import NO_LOSS
from quadapt.errors import ConfigError
from quadapt.hf.also import optimized
from quadapt.hf.peft_layer import declared_params
from quadapt.nn.adapters.base import Group
from quadapt.nn.objective import Bound
from quadapt.train.sign_sgd import TernaryAdamW


class AdapterTrainer(Trainer):
    """`Trainer` that saves adapters alone, as safetensors and JSON (only its own optimizer state is a torch file).

    Scales and offsets, where they train, have a learning rate of their own and no weight decay. Ternary factors step by
    t-SignSGD (`sign_sgd.py`), and their gradients are not clipped. Whole modules and biases that train beside adapters
    have a learning rate of their own, and norms and biases no weight decay.

    Held-out loss is a mean over tokens, as in :func:`quadapt.evaluate.perplexity`: `Trainer`'s own is a mean over
    batches of their means, so that it depends on the batch size wherever sequences differ in length.
    """

    losses: Callable[[Tensor, Tensor], Tensor] | None = None
    """The loss of each example, from logits and labels, where it is not that of a causal language model: float64
    `[batch, 2]`, summed and how much it counts. Training lowers their mean over all that counts in a step."""

    grid_learning_rate: float | None = None
    also_learning_rate: float | None = None
    objective: Bound | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.objective is not None and model.training:
            share = 1.0 if num_items_in_batch is None else 1 / self.current_gradient_accumulation_steps
            items = num_items_in_batch
            if items is not None and self.args.average_tokens_across_devices:  # by which `super` has multiplied
                items = items / self.accelerator.num_processes
            loss = self.objective(loss, inputs, share=share, items=items)
        return (loss, outputs) if return_outputs else loss

    def train_by(self, losses: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        """Take the loss of each example from a function, in training and on held-out data; None: from the model."""
        self.losses = losses
        if losses is None:
            return

        def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            summed, counted = losses(outputs.logits, labels).sum(0)
            return (summed / (counted.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)).float()

        self.compute_loss_func = mean
        self._loss_shifts_labels = self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: Any = None) -> Any:
        whole: Any = model or self.model
        trained = [p for p in whole.parameters() if p.requires_grad]
        grid, ternary = self._declared("grid", whole), self._declared("ternary", whole)
        also = optimized(whole)
        if not (grid or ternary or also) or self.optimizer is not None:
            return super().create_optimizer(model)
        make, settings = self.get_optimizer_cls_and_kwargs(self.args)
        rate = self.grid_learning_rate or self.args.learning_rate
        also_rate = self.also_learning_rate or self.args.learning_rate
        decay = self.args.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if id(p) in grid], "lr": rate, "weight_decay": 0.0},
            {"params": [p for p in trained if id(p) not in grid | ternary | also.keys()], "weight_decay": decay},
            {"params": [p for p in trained if also.get(id(p)) is False], "lr": also_rate, "weight_decay": 0.0},
            {"params": [p for p in trained if also.get(id(p))], "lr": also_rate, "weight_decay": decay},
        ]
        if ternary:
            if make is not torch.optim.AdamW or self.args.max_steps < 1:
                raise ConfigError(
                    f"optim={self.args.optim}, max_steps={self.args.max_steps}: ternary adapters train by t-SignSGD, "
                    "beside AdamW, and by how many steps there will be. Use optim='adamw_torch' and give max_steps"
                )
            groups += [{"params": [p for p in trained if id(p) in ternary], "weight_decay": 0.0, "ternary": True}]
            make = partial(TernaryAdamW, steps=self.args.max_steps)
        self.optimizer = make([group for group in groups if group["params"]], **settings)
        return self.optimizer

    def _declared(self, group: Group, model: Any = None) -> set[int]:
        """Ids of the parameters that adapters of a model declare to be of a group of the optimizer's."""
        whole: Any = model or self.model
        return {id(p) for p, declared in declared_params(whole) if declared.group == group}

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients of all but ternary parameters, whose steps go by sizes; the norm of all, from before."""
        ternary = self._declared("ternary")
        if not ternary:
            return super()._clip_grad_norm(model)
        norm = self._get_grad_norm(model)
        others = [p for p in model.parameters() if id(p) not in ternary]
        self.accelerator.clip_grad_norm_(others, self.args.max_grad_norm)
        return norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        model: Any = self.model
        if self.args.should_save:
            model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def _load_best_model(self) -> None:
        raise ConfigError("load_best_model_at_end is Trainer's own way. Use Run(keep='best')")

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Loss and loss-bearing tokens of each sequence `[batch, 2]`, where `Trainer` gathers predictions.

        So they come together from several processes as predictions do: each sequence once, padding of the last batch
        left out.
        """
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = dict(self._prepare_inputs(inputs))
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
        return None, (self.losses or losses_by_sequence)(logits, labels), None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if not prediction_loss_only:
            return output
        found = {f"{metric_key_prefix}_{name}": value for name, value in self.figures(output.predictions).items()}
        return output._replace(metrics={**(output.metrics or {}), **found})

    def figures(self, predictions: Any) -> dict[str, float]:
        """What held-out data show, by name, of all that `prediction_step` gave."""
        losses, tokens = np.asarray(predictions).T
        return {"loss": math.fsum(losses) / float(tokens.sum())}


def losses_by_sequence(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss and number of loss-bearing tokens of each sequence, float64 `[batch, 2]`.

    Args:
        logits: `[batch, length, vocabulary]`, any float dtype; log-probabilities are computed in float32.
        labels: `[batch, length]`, unshifted; `NO_LOSS` where a token bears none.
    """
    found = []
    for row, targets in zip(logits[:, :-1], labels[:, 1:], strict=True):  # a float32 copy of all logits may not fit
        counted = targets != NO_LOSS
        losses = F.cross_entropy(row[counted].float(), targets[counted], reduction="none")
        found.append(torch.stack([losses.double().sum(), counted.sum().double()]))
    return torch.stack(found)
