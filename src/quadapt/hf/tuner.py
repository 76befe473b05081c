"""What PEFT does to a model: which layer it puts over each of its own, and what it does to the whole at once.

A model that is merged stays known to transformers as what it now is: quantized, with the fingerprint of the weights it
has, so that an adapter trained over it is not taken for one of the base.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from quadapt.errors import ConfigError, locate
from quadapt.hf.adapter_config import KEY, STOCK, identity_of, settings_of
from quadapt.hf.also import settle
from quadapt.hf.identity import admit
from quadapt.hf.peft_layer import QuantLoraLinear, adapted_layers
from quadapt.hf.quantizer import adopt, base_config, disown
from quadapt.hf.trained import Part, changed_besides, merge_parts, parts_of, settle_ties
from quadapt.model.linear_form import linear_form
from quadapt.model.quantize import quantized_layers
from quadapt.model.select import left_over, refuse_foreign
from quadapt.nn.adapters import adapter_from
from quadapt.nn.quant_linear import QuantLinear

log = logging.getLogger("quadapt")

BEFORE = "_quadapt_before"
"""Attribute of a base model in which adapters are merged for the time being: its config from before, or None."""


def create(
    stock: Callable[..., nn.Module], lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
) -> nn.Module:
    """PEFT's choice of a layer: ours over quantized layers, and for adapters that quantize dense ones."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, QuantLinear) and identity_of(lora_config)["kind"] == STOCK:
        return stock(lora_config, adapter_name, target, **kwargs)
    kwargs = {name: kwargs[name] for name in ("r", "lora_alpha", "target_name") if name in kwargs}
    with locate(kwargs.get("target_name") or "layer"):
        refuse_foreign(base)
    return QuantLoraLinear(target, adapter_name, lora_config, **kwargs)


def inject(
    stock: Callable[..., None], self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """PEFT's `inject_adapter`: an adapter that may go over a model gets its layers, and a name for its base."""
    given = self.peft_config[adapter_name]
    if KEY in (getattr(given, "auto_mapping", None) or {}):
        linear_form(model)  # over which it was trained, and which its names are of
    self.peft_config[adapter_name] = admit(model, given)
    with _asked_for_embeddings(model):
        stock(self, model, adapter_name, *args, **kwargs)
    finish_injection(self, model, adapter_name, given)


@contextmanager
def _asked_for_embeddings(model: Any) -> Iterator[None]:
    """Inside, a model that has no embedding says so instead of raising: PEFT asks which layers are tied to it."""
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        model.get_input_embeddings = nn.Module
        try:
            yield
        finally:
            del model.get_input_embeddings
    except AttributeError:  # no model of transformers
        yield
    else:
        yield


def about(model: Any) -> tuple[dict[str, Any], Mapping[str, str]]:
    """How a quantized base was made and what it leaves unquantized; of a dense base there is nothing to say."""
    if not quantized_layers(model):
        adapters = {layer.adapters[name].kind for layer in adapted_layers(model).values() for name in layer.active()}
        return {"method": ", ".join(sorted(adapters))}, {}
    config = base_config(model)
    return dict(config.made), config.left


def _check(model: Any, names: list[str] | None) -> None:
    """Raise MergeError if an adapter cannot merge; the layer is named, and nothing has been merged yet."""
    for name, layer in adapted_layers(model).items():
        with locate(name), torch.no_grad():
            layer.check_merge(names)


def unload(stock: Callable[..., Any], self: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
    """Run PEFT's `merge_and_unload` or `unload`, and declare to transformers what the model holds then."""
    layers = list(adapted_layers(self.model).values())
    if not layers and not quantized_layers(self.model):
        return stock(self, merge, *args, **kwargs)
    names = kwargs.get("adapter_names")
    made, left = about(self.model) if merge else ({}, {})
    parts = parts_of(self.model) if merge else []
    if merge:
        _check(self.model, names)
        if names is None:
            merge_parts(self.model)
    changed = any(layer.merged for layer in layers) or (merge and any(layer.active() for layer in layers))
    model = stock(self, merge, *args, **kwargs)
    settle(model)
    if merge:
        settle_ties(model, [])
        if changed or parts:
            _declare(model, made, left, parts)
    model.__dict__.pop(BEFORE, None)
    return model


def _declare(model: Any, made: Mapping[str, Any], left: Mapping[str, str], parts: Sequence[Part]) -> None:
    """Make transformers know what a model holds after a merge that nothing has measured."""
    adopt(
        model,
        left=left or left_over(model, "no adapter trained over it"),
        made={**made, "merge": "by PEFT, without a certificate"},
        besides=changed_besides(model, parts),
    )


def merge(stock: Callable[..., Any], self: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> None:
    """PEFT's `merge_adapter`: the base model is another one until `unmerge_adapter`."""
    _check(self.model, adapter_names)
    before, (made, left) = getattr(self.model.config, "quantization_config", None), about(self.model)
    parts = parts_of(self.model) if quantized_layers(self.model) else []
    stock(self, adapter_names, **kwargs)
    if parts or any(layer.merged for layer in adapted_layers(self.model).values()):
        self.model.__dict__.setdefault(BEFORE, before)
        _declare(self.model, made, left, parts)


def unmerge(stock: Callable[..., Any], self: Any) -> None:
    """Run PEFT's `unmerge_adapter`, after which the model counts as its old base again."""
    stock(self)
    if BEFORE in self.model.__dict__:
        disown(self.model, self.model.__dict__.pop(BEFORE))


def check_weighted(
    stock: Callable[..., Any], self: Any, adapters: list[str], combination_type: str, svd_rank: int | None
) -> Any:
    """PEFT's `add_weighted_adapter` works on `lora_A` and `lora_B` alone, and with svd on the dense sum of both."""
    found = stock(self, adapters, combination_type, svd_rank)
    configs = [self.peft_config[name] for name in adapters]
    settings = [settings_of(config) for config in configs]
    if any(each != settings[0] for each in settings):
        raise ConfigError(
            f"add_weighted_adapter: {', '.join(adapters)} are of other kinds or settings; they do not add"
        )
    adapter, started = adapter_from(settings[0]), any(identity_of(config).get("start") for config in configs)
    if adapter.extra or started or not adapter.stacks:
        raise ConfigError(
            f"add_weighted_adapter adds lora_A and lora_B alone, and a {adapter.kind} adapter trains more, or does "
            "what does not add. Merge one of them, and train on over the merged model"
        )
    if adapter.begins != "factors" and found[0].endswith("svd"):
        raise ConfigError(
            f"add_weighted_adapter: combination_type={combination_type!r} makes factors over all inputs, and "
            f"{adapter.kind} adapters have one for each group. Use 'cat', which is their weighted sum"
        )
    if combination_type != "cat" and not combination_type.endswith("svd"):
        log.warning(
            "add_weighted_adapter: combination_type=%r combines factors one by one, as PEFT does for any LoRA, and "
            "that is not the weighted sum of the adapters. combination_type='cat' is",
            combination_type,
        )
    return found


def finish_injection(self: Any, model: nn.Module, adapter_name: str, given: Any) -> None:
    """After an adapter was put over a model: refuse what would do wrong over codes, and copy what is to be a copy.

    trl's preference trainers add a reference adapter with the very config object of the trained one, and then copy
    its tensors by names that those of ours which are no `nn.Linear` do not have.
    """
    _refuse_other_tuners(model, given)
    twin = next((name for name, known in self.peft_config.items() if name != adapter_name and known is given), None)
    if twin is not None and _copy(model, twin, adapter_name):
        log.warning("the adapter %r was given the config of %r, and starts as a copy of it", adapter_name, twin)


def _refuse_other_tuners(model: nn.Module, config: Any) -> None:
    """Take PEFT's layers of other kinds than LoRA off quantized ones, and refuse them.

    They would name no base, and their merges write into the codes: IA3's without an error.
    """
    found: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module, QuantLoraLinear)
        and isinstance(module.get_base_layer(), QuantLinear)
    }
    for name, module in found.items():
        model.set_submodule(name, module.get_base_layer())
    if found:
        raise ConfigError(
            f"{next(iter(found))}: is quantized, and {config.peft_type.value} adapters of PEFT would neither name "
            "their base nor merge. Use LoraConfig, or a method of quadapt (quadapt.prepare)"
        )


@torch.no_grad()
def _copy(model: nn.Module, source: str, target: str) -> bool:
    """Copy all tensors of one adapter of ours into another; whether there were any."""
    layers = adapted_layers(model).values()
    for layer in layers:
        for part in layer.adapter_layer_names:
            values: Any = getattr(layer, part)
            if source in values and target in values:
                one, other = values[source], values[target]
                pairs = [(one, other)] if isinstance(one, torch.Tensor) else zip(one.parameters(), other.parameters())  # noqa: B905
                for old, new in pairs:
                    new.copy_(old)
    return bool(layers)
