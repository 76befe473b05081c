"""Dense models are loaded in the linear form, with their weights mapped from the files.

transformers would stack the matrices of experts in memory first. What it lets quantizers do, namely to change a model
before its weights are loaded and to say how files become weights, is all that is needed; so this is a quantizer that
quantizes nothing, and is gone when the model is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quadapt.hf.stored_form import conversions
from quadapt.model.linear_form import linear_form

NAME = "quadapt-linear-form"
"""The name by which transformers knows this, while it loads."""


class LinearForm(QuantizationConfigMixin):
    """Asks for a dense model in the linear form; it never stands in a folder."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = NAME  # type: ignore[assignment]  # an enum of transformers' own


class LinearFormQuantizer(HfQuantizer):
    """Brings a model into the linear form before its weights are loaded."""

    def is_serializable(self) -> bool:
        """Whether it can be saved: nothing is quantized."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained: as any dense model."""
        return True

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """How the tensors of files become those of the linear form."""
        found = conversions(model, weight_conversions, dense=True)
        updated: list[Any] = super().update_weight_conversions(found, model)
        return updated

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        linear_form(model)


def in_linear_form(load: Callable[..., Any], config: Any, **settings: Any) -> tuple[Any, Any]:
    """Call a loader of transformers that gives a model and what it says about it, so that it gives the linear form.

    Args:
        load: The loader, which takes a configuration and further settings.
        config: The configuration of the dense model; it is not changed.
        settings: Passed on.
    """
    asked = copy.deepcopy(config)
    asked.quantization_config = LinearForm().to_dict()
    model, info = load(config=asked, **settings)
    model.hf_quantizer.remove_quantization_config(model)
    return model, info


def register() -> None:
    """Make transformers know it, once."""
    if NAME not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(NAME)(LinearForm)
        register_quantizer(NAME)(LinearFormQuantizer)


register()
