"""Adapters over experts: in the linear form each matrix of each expert has its own, under its own name.

PEFT knows how experts are stacked in transformers, and translates what names single experts into what names stacks, the
names of layers in a config as well as the tensors of a file. Over the linear form nothing is to be translated. Its own
way to name stacks, `LoraConfig(target_parameters=["mlp.experts.gate_up_proj"])`, names here the layers that are views
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from quadapt.errors import ConfigError
from quadapt.hf.stored_form import conversions, stacks_of
from quadapt.nn.experts import Experts


def has_experts(model: Any) -> bool:
    """Whether a model, in whatever PEFT has put around it, has experts in the linear form."""
    return isinstance(model, nn.Module) and any(isinstance(module, Experts) for module in model.modules())


def convert_config(stock: Callable[..., None], peft_config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """PEFT's `convert_peft_config_for_transformers`: over the linear form names are those of layers."""
    if not has_experts(model):
        stock(peft_config, model, *args, **kwargs)
    elif getattr(peft_config, "target_parameters", None):
        _name_layers(peft_config, model)


def _name_layers(config: Any, model: nn.Module) -> None:
    """Let a config name the layers of experts where it names stacked parameters, in place.

    Raises:
        ConfigError: It names something else, or names layers by a pattern, to which nothing can be added.
    """
    asked, found = sorted(config.target_parameters), set[str]()
    for name in asked:
        layers = {
            piece.removesuffix(".weight")
            for stack in stacks_of(model)
            if f".{stack.path}.{stack.name}".endswith(f".{name}") and stack.leaf == "weight"
            for piece in stack.pieces()
        }
        if not layers:
            raise ConfigError(
                f"LoraConfig.target_parameters: {name!r} is no stack of experts of this model. It has "
                f"{', '.join(sorted({f'experts.{stack.name}' for stack in stacks_of(model)}))}"
            )
        found |= layers
    if isinstance(config.target_modules, str):
        raise ConfigError(
            f"LoraConfig.target_parameters with target_modules={config.target_modules!r}: give the layers beside the "
            "experts as a list of names"
        )
    config.target_modules, config.target_parameters = {*(config.target_modules or ()), *found}, None


def convert_state(
    stock: Callable[..., Mapping[str, Tensor]],
    model: Any,
    peft_config: Any,
    adapter_state_dict: Mapping[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> Mapping[str, Tensor]:
    """PEFT's `convert_peft_adapter_state_dict_for_transformers`: over the linear form tensors stay as they are."""
    return adapter_state_dict if has_experts(model) else stock(model, peft_config, adapter_state_dict, *args, **kwargs)


def mapping_for_adapters(stock: Callable[..., Sequence[Any]], model: Any, *args: Any, **kwargs: Any) -> Sequence[Any]:
    """Transformers' `get_model_conversion_mapping`, as its loader of adapters calls it."""
    found = stock(model, *args, **kwargs)
    return conversions(model, found, dense=False) if has_experts(model) else found
