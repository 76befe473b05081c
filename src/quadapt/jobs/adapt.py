"""Put a method's adapter over a quantized model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn

from quadapt.config import TuneConfig
from quadapt.hf.peft_layer import lora_config
from quadapt.hf.quantizer import base_config
from quadapt.model.quantize import bits_of, quantized_layers
from quadapt.model.select import matching

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger("quadapt")


def adapt(model: nn.Module, config: TuneConfig, *, on_meta: bool = False) -> PeftModel:
    """A PEFT model with a fresh adapter over the quantized layers that `target_modules` names.

    Args:
        model: Quantized.
        config: Names the method; its rank, alpha and dropout hold.
        on_meta: Shapes alone, for estimates.

    Raises:
        ConfigError: A name matches no quantized layer, or the adapter cannot train over the format.
    """
    from peft import get_peft_model

    chosen = config.chosen_method()
    layers = quantized_layers(model)
    names = matching(layers, config.target_modules)
    recipe = chosen.recipe
    wasted = [name for name in names if recipe.rank > chosen.adapter.inputs(layers[name].layout)]
    if wasted and not on_meta:
        log.warning(
            "rank %d is more than the %d inputs of the adapter at %s%s: the rest of the rank is wasted",
            recipe.rank,
            chosen.adapter.inputs(layers[wasted[0]].layout),
            wasted[0],
            f" and {len(wasted) - 1} more" if len(wasted) > 1 else "",
        )
    fingerprint = "" if on_meta else base_config(model).fingerprint
    settings = lora_config(
        chosen.adapter,
        rank=recipe.rank,
        alpha=recipe.alpha,
        dropout=recipe.dropout,
        target_modules=names,
        base_fingerprint=fingerprint,
    )
    return get_peft_model(model, settings, low_cpu_mem_usage=on_meta)


def true_bits(model: nn.Module) -> dict[str, float]:
    """True bits per quantized weight: of the base, and with the adapter as it is stored."""
    layouts = [layer.layout for layer in quantized_layers(model).values()]
    weights = sum(layout.out * layout.columns for layout in layouts)
    adapter = sum(8 * parameter.nbytes for name, parameter in model.named_parameters() if "lora_" in name)
    return {"base": bits_of(layouts), "with_adapter": bits_of(layouts) + adapter / weights}
