"""Training on pairs of answers: what is lowered compares the model with itself, its adapter switched off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quadapt.errors import ConfigError
from quadapt.hf.peft_layer import adapted_layers
from quadapt.hf.trained import Adapting, adapters_off
from quadapt.nn.objective import PairObjective
from quadapt.train.trainer import AdapterTrainer, losses_by_sequence


class PairTrainer(AdapterTrainer):
    """Trains an adapter on pairs; batches are those of :class:`~quadapt.data.pairs.PairCollator`.

    The likelihoods under the model from before training are computed in each step, with the adapter switched off and
    in evaluation mode, so that no second model is in memory. It is the very model that the first step computed with:
    also for adapters that start from a fit, and for those that quantize their base, of which it is the quantized form.
    """

    pair_objective: PairObjective

    def prefer_by(self, objective: PairObjective) -> None:
        """Take the loss of each pair from an objective, in training and on held-out data.

        Raises:
            ConfigError: Something trains that stays as trained while adapters are off, so there is no reference.
        """
        self.pair_objective = objective
        self.model_accepts_loss_kwargs = False  # a step's loss is a mean over pairs, not over tokens
        model: Any = self.model
        adapting: list[Any] = [module for module in model.modules() if isinstance(module, Adapting)]
        switched = {id(parameter) for module in adapting for parameter in module.parameters()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (id(parameter) not in switched or ".base_layer." in name):
                raise ConfigError(
                    f"objective={type(objective).name!r} compares with the model from before training, which is this "
                    f"one with its adapter switched off, and {name} would stay as it is trained. Leave biases out of "
                    "train_also"
                )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        margins, outputs = self._margins(model, inputs)
        loss = self.pair_objective.losses(margins).mean()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Loss and margin of each pair, float64 `[pairs, 2]`, where `Trainer` gathers predictions."""
        with torch.no_grad(), self.compute_loss_context_manager():
            margins, _ = self._margins(model, dict(self._prepare_inputs(inputs)))
        return None, torch.stack([self.pair_objective.losses(margins), margins], dim=1).double(), None

    def figures(self, predictions: Any) -> dict[str, float]:
        """Mean loss, share of pairs the right way round, and mean margin, of what `prediction_step` gave."""
        losses, margins = np.asarray(predictions).T
        count = len(losses)
        return {
            "loss": math.fsum(losses) / count,
            "accuracy": float(np.count_nonzero(margins > 0)) / count,
            "margin": math.fsum(margins) / count,
        }

    def _margins(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """By how much the chosen answers gained more than the rejected ones, float32 `[pairs]`; what the model gave."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        with _as_at_first(model):
            before = log_likelihoods(model(**inputs).logits, labels)
        outputs = model(**inputs)
        chosen, rejected = (log_likelihoods(outputs.logits, labels) - before).chunk(2)
        return chosen - rejected, outputs


def log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-likelihood of what bears loss in each sequence, float32 `[batch]`.

    Args:
        logits: `[batch, length, vocabulary]`, any float dtype; log-probabilities are computed in float32.
        labels: `[batch, length]`, unshifted; `NO_LOSS` where a token bears none.
    """
    return -losses_by_sequence(logits, labels)[:, 0].float()


@contextmanager
def _as_at_first(model: nn.Module) -> Iterator[None]:
    """The model from before training: adapters off, evaluation mode, no gradients."""
    modes = {module: module.training for module in model.modules()}
    layers = adapted_layers(model).values()
    model.eval()
    try:
        for layer in layers:
            layer.first_quantized = True
        with torch.no_grad(), adapters_off(model):
            yield
    finally:
        for layer in layers:
            layer.first_quantized = False
        for module, mode in modes.items():
            module.training = mode
