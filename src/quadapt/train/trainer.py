"""`transformers.Trainer`, changed in what training adapters over a quantized base needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from quadapt.data.collate import NO_LOSS
from quadapt.errors import ConfigError
from quadapt.hf.peft_layer import declared_params
from quadapt.nn.objective import Bound


class AdapterTrainer(Trainer):
    """`Trainer` that saves adapters alone, as safetensors and JSON (only its own optimizer state is a torch file).

    Scales and offsets, where they train, have a learning rate of their own and no weight decay.

    Held-out loss is a mean over tokens, as in :func:`quadapt.evaluate.perplexity`: `Trainer`'s own is a mean over
    batches of their means, so that it depends on the batch size wherever sequences differ in length.
    """

    grid_learning_rate: float | None = None
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

    def create_optimizer(self, model: Any = None) -> Any:
        whole: Any = model or self.model
        own = {id(p) for p, declared in declared_params(whole) if declared.group == "grid"}
        trained = [p for p in whole.parameters() if p.requires_grad]
        grid, rest = [p for p in trained if id(p) in own], [p for p in trained if id(p) not in own]
        if not grid or self.optimizer is not None:
            return super().create_optimizer(model)
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
        rate = self.grid_learning_rate or self.args.learning_rate
        groups = [{"params": grid, "lr": rate, "weight_decay": 0.0}]
        groups += [{"params": rest, "weight_decay": self.args.weight_decay}] if rest else []
        self.optimizer = kind(groups, **settings)
        return self.optimizer

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
        return None, losses_by_sequence(logits, labels), None

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
        losses, tokens = np.asarray(output.predictions).T
        metrics = {**(output.metrics or {}), f"{metric_key_prefix}_loss": math.fsum(losses) / float(tokens.sum())}
        return output._replace(metrics=metrics)


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
