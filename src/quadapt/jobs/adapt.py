"""Put a method's adapter over a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from quadapt.config.spec import Spec
from quadapt.errors import ConfigError, QuadaptError
from quadapt.hf.also import also, widen
from quadapt.hf.kinds import peft_task
from quadapt.hf.peft_layer import adapted_layers, declared_params, lora_config
from quadapt.hf.vocabulary import token_layers
from quadapt.model.quantize import bits_of, quantized_layers
from quadapt.model.select import matching, select
from quadapt.nn.adapters import Adapter
from quadapt.quant.weight import Layout

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger("quadapt")


def adapt(
    model: nn.Module, spec: Spec, *, tokens: Sequence[int] = (), on_meta: bool = False, stored: Any = None
) -> PeftModel:
    """A PEFT model with a fresh adapter over the layers that `target_modules` names.

    Args:
        model: Quantized; dense for methods that quantize in their forward.
        spec: The method; its rank, alpha and dropout hold.
        tokens: Ids of tokens whose rows of embedding and head train too.
        on_meta: Shapes alone, for estimates.
        stored: The dtype of the base on disk; by default that of the base in memory.

    Raises:
        ConfigError: A name matches no layer, or the adapter cannot train over the format.
    """
    from peft import get_peft_model

    chosen = spec.method
    layouts = _layouts(model, chosen.adapter, spec)
    names = matching(layouts, spec.target_modules)
    if spec.shape.excluded:
        without = set(matching(layouts, spec.shape.excluded))
        names = [name for name in names if name not in without]
        if not names:
            raise ConfigError("exclude_modules leaves no layer that gets an adapter. Name fewer")
    recipe, inputs = chosen.recipe, chosen.adapter.inputs
    wasted = [name for name in names if 0 < inputs(layouts[name]) < recipe.rank]
    if wasted and not on_meta:
        log.warning(
            "rank %d is more than the %d inputs of the adapter at %s%s: the rest of the rank is wasted",
            recipe.rank,
            inputs(layouts[wasted[0]]),
            wasted[0],
            f" and {len(wasted) - 1} more" if len(wasted) > 1 else "",
        )
    settings = lora_config(
        chosen.adapter,
        rank=recipe.rank,
        alpha=recipe.alpha,
        dropout=recipe.dropout,
        target_modules=names,
        start=chosen.start.name if chosen.adapter.begins == "factors" else "zero",
        task=peft_task(model),
        **spec.shape.layers(names),
    )
    besides = also(model, spec.also, tokens, spec.part)
    besides.configure(settings)
    try:
        settings.trainable_token_indices = token_layers(model, tokens)
        adapted = get_peft_model(model, settings, low_cpu_mem_usage=on_meta)
    except QuadaptError:
        raise
    except ValueError as error:  # layers that a family cannot have adapted (Mamba's out_proj)
        raise ConfigError(
            f"PEFT refuses the adapter ({error}). Name the layers that are to get one with --target-modules"
        ) from error
    for name, parameter in adapted.named_parameters():  # in half precision small steps would be lost
        if "trainable_tokens_delta" in name:
            parameter.data = parameter.data.float()
    widen(adapted, besides, stored)
    return adapted


def _layouts(model: nn.Module, adapter: Adapter, spec: Spec) -> dict[str, Layout]:
    """Layers that `adapter` can train over, with their layout: of the base, or of the product over a dense one."""
    if adapter.base == "float":
        chosen = select(model, skip=spec.skip, part=spec.part).chosen
        return {name: adapter.layout_of(linear.weight) for name, linear in chosen.items()}
    return {name: layer.layout for name, layer in quantized_layers(model).items()}


def true_bits(model: nn.Module) -> dict[str, float]:
    """True bits per adapted weight: of the base, and with the adapter as it is stored."""
    layouts = [layer.layout for layer in quantized_layers(model).values()]
    if not layouts:
        dense = [layer.get_base_layer().get_parameter("weight") for layer in adapted_layers(model).values()]
        weights, bits = sum(weight.numel() for weight in dense), sum(8 * weight.nbytes for weight in dense)
        base = bits / weights
    else:
        weights, base = sum(layout.out * layout.columns for layout in layouts), bits_of(layouts)
    adapter = sum(8 * parameter.nbytes for parameter, declared in declared_params(model) if declared.serves)
    return {"base": base, "with_adapter": base + adapter / weights}
