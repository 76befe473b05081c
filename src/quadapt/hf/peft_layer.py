"""The one PEFT layer: every adapter of ours, and stock LoRA over codes.

PEFT sees an ordinary LoRA adapter (`peft_type` is LORA), so saving, loading, `load_adapter` and resuming are its own.
Which adapter of ours it is, and over which base, is said in its config: see `hf/adapter_config.py`. PEFT gets to know
this layer by `hf/plug.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from quadapt.errors import ConfigError, MergeError, locate
from quadapt.hf.adapter_config import adapter_of as adapter_of
from quadapt.hf.adapter_config import identity_of
from quadapt.hf.adapter_config import lora_config as lora_config
from quadapt.hf.also import stored_bias
from quadapt.nn.adapters import Adapter, Param, Source
from quadapt.nn.adapters.base import Dropout, Part, same
from quadapt.nn.adapters.codes import stacked, stacked_dense
from quadapt.nn.quant_linear import QuantLinear, autocast
from quadapt.quant.weight import QuantWeight


class QuantLoraLinear(nn.Module, LoraLayer):
    """Adapters over a linear layer, quantized or (for adapters that quantize in their forward) dense.

    It stores whatever its adapters declare, each parameter under `lora_NAME` by the adapter's name, and adds these to
    what PEFT saves, loads, freezes and deletes. Adapters that stack may be active together; others one at a time.

    With the adapter disabled the layer computes what it did before training: the base, with the first factors of
    adapters that start from more than zero. DPO and other losses take that as their reference.

    Args:
        base_layer: The layer (or PEFT's layer over one).
        adapter_name: PEFT's name of the first adapter.
        config: The configuration of that adapter.
        r: The rank of that adapter.
        lora_alpha: The alpha of that adapter.
        kwargs: What PEFT passes on to `LoraLayer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self.adapters: dict[str, Adapter] = {}
        self.declared: dict[str, Mapping[str, Param]] = {}
        self.frozen_peft_weight_names = {}
        self.dense_steps = False
        self.first_quantized = False
        self._before: list[nn.Module] = []  # a list: while it is merged, the base from before is no part of the model
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    # --- adding, choosing and removing adapters ---

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter to the layer; PEFT calls this hook."""
        adapter = adapter_of(config)
        with locate(kwargs.get("target_name") or "layer"):
            self._admit(adapter, config)
            layout = adapter.layout_of(self.source)
            adapter.check(layout, r, config.lora_dropout)
        self.adapters[adapter_name] = adapter
        self.declared[adapter_name] = adapter.params(layout, r, started=bool(identity_of(config).get("start")))
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)  # type: ignore[arg-type]
        for name, param in self.declared[adapter_name].items():
            self._store(adapter_name, name, param, config.init_lora_weights)
        for name in {"A", "B"} - self.declared[adapter_name].keys():
            del getattr(self, f"lora_{name}")[adapter_name]
        frozen = tuple(f"lora_{name}" for name, param in self.declared[adapter_name].items() if not param.trains)
        self.frozen_peft_weight_names[adapter_name] = frozen
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _admit(self, adapter: Adapter, config: LoraConfig) -> None:
        """Raise ConfigError if an adapter cannot be in this layer, beside those that are there."""
        quantized, own = isinstance(self.source, QuantWeight), ", ".join(self.adapters)
        if any(each.stacks for each in self.adapters.values()) and not adapter.stacks:
            raise ConfigError(
                f"a {adapter.kind} adapter trains the grid itself, and this layer has adapters over its codes ({own}). "
                "Delete or merge these first"
            )
        fits = not adapter.stacks and quantized != (adapter.base == "float") and not self.merged
        if any(not each.stacks for each in self.adapters.values()) and not fits:
            raise ConfigError(
                f"this layer's grid is trained by {own}; a further adapter must train it too, over the same weights, "
                f"with none merged, and {adapter.kind} cannot. Merge or delete the other first"
            )
        if quantized == (adapter.base == "float"):
            have = "quantized" if quantized else "dense"
            raise ConfigError(
                f"{adapter.kind} adapters train over {adapter.base} weights, and this layer is {have}. Give the "
                + ("dense model" if quantized else "model that quadapt has quantized")
            )
        if config.lora_bias and not adapter.stacks:
            raise ConfigError(f"LoraConfig.lora_bias: {adapter.kind} adapters have no bias. Leave it unset")

    def _store(self, adapter_name: str, name: str, param: Param, how: Any) -> None:
        """Make room for a parameter, and begin it as declared; `how` is PEFT's `init_lora_weights`."""
        place, usual = f"lora_{name}", self.lora_A[adapter_name].get_parameter("weight")
        if name in ("A", "B"):  # PEFT has made them, for all inputs
            linear, (rows, columns) = getattr(self, place)[adapter_name], param.shape
            if linear.weight.shape != param.shape:
                linear = nn.Linear(columns, rows, linear.bias is not None, usual.device, usual.dtype)
                getattr(self, place)[adapter_name] = linear
            tensor = linear.weight
        else:
            if place not in self.adapter_layer_names:
                self.adapter_layer_names = (*self.adapter_layer_names, place)
                self.register_module(place, nn.ParameterDict())
            empty = torch.empty(param.shape, device=usual.device, dtype=param.dtype or usual.dtype)
            tensor = getattr(self, place)[adapter_name] = nn.Parameter(empty, requires_grad=param.trains)
        if tensor.device.type == "meta":
            return
        if param.group == "ternary" and how is not True:
            raise ConfigError(f"LoraConfig.init_lora_weights={how!r}: {name} holds -1, 0 and 1 alone. Use True")
        with torch.no_grad():
            if name not in ("A", "B") or how is True:
                param.init(tensor, self.source)
            elif how == "gaussian" and name == "A":
                nn.init.normal_(tensor, std=1 / len(tensor))

    @torch.no_grad()
    def begin(self, adapter_name: str, up: Tensor, down: Tensor) -> None:
        """Start an adapter from `up @ down`: the factors absorb the scaling."""
        root = float(self.scaling[adapter_name]) ** 0.5
        self.adapters[adapter_name].begin(self.params(adapter_name), up / root, down / root)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter (PEFT's hook).

        Raises:
            ConfigError: There are several, and one trains this layer's grid, so it can only be active alone.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        ours = [name for name in names if name in self.adapters]
        if len(ours) > 1 and not all(self.adapters[name].stacks for name in ours):
            raise ConfigError(
                f"adapters {', '.join(ours)} each train the grid of this layer; set one of them at a time"
            )
        super().set_adapter(names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the layer; PEFT calls this hook."""
        super().delete_adapter(adapter_name)
        self.adapters.pop(adapter_name, None)
        self.declared.pop(adapter_name, None)

    def active(self) -> list[str]:
        """Names of the adapters of this layer that are active."""
        return [name for name in self.active_adapters if name in self.adapters]

    # --- what they compute from ---

    @property
    def source(self) -> Source:
        """What is trained over: the quantized weight, or the dense one."""
        layer = self.get_base_layer()
        return layer.quant_weight if isinstance(layer, QuantLinear) else layer.get_parameter("weight")

    @property
    def quant(self) -> QuantLinear:
        """The quantized layer that the adapters lie over."""
        layer = self.get_base_layer()
        assert isinstance(layer, QuantLinear)
        return layer

    def params(self, name: str) -> dict[str, Tensor]:
        """The parameters of an adapter, by the names that it has declared."""
        values = {each: getattr(self, f"lora_{each}")[name] for each in self.declared[name]}
        return {each: one if isinstance(one, Tensor) else one.weight for each, one in values.items()}

    def parts(self, names: list[str] | None = None) -> list[Part]:
        """The adapters at work, by default those that are active, whether switched off or not."""
        return [
            Part(self.adapters[name], self.params(name), float(self.scaling[name]), self._dropout(name))
            for name in (self.active() if names is None else names)
        ]

    def _dropout(self, name: str) -> Dropout:
        drop: Any = self.lora_dropout[name]
        return drop if self.training else same

    def as_lora(self, name: str) -> tuple[Tensor, Tensor] | None:
        """`A [rank, in]` and `B [out, rank]` of the ordinary LoRA that does what an adapter does; None if none does."""
        return self.adapters[name].as_lora(self.source, self.params(name))

    # --- forward ---

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with all active adapters."""
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ConfigError(
                "adapter_names: a batch that mixes adapters is not supported over quantized layers. "
                "Run one batch per adapter"
            )
        base: Any = self._before[0] if self.disable_adapters and self._before else self.base_layer
        if self.disable_adapters:
            return self._as_at_first(x, base)
        names = [] if self.merged else self.active()
        if not names:
            return base(x)
        parts = self.parts(names)
        if self.dense_steps:
            part = parts[0]
            return part.adapter.dense_step(autocast(x), base(x), part.params, part.scaling)
        y = self._product(autocast(x), parts)
        for name in names:
            if self.lora_bias[name]:
                y = y + self.scaling[name] * self.lora_B[name].bias.to(y.dtype)
        bias: Any = self.get_base_layer().bias
        return y if bias is None else y + bias.to(y.dtype)

    def _product(self, x: Tensor, parts: list[Part]) -> Tensor:
        if len(parts) == 1:
            part = parts[0]
            return part.adapter.forward(x, self.source, part.params, part.scaling, part.dropout)
        return stacked(x, self.quant.quant_weight, parts)

    def _as_at_first(self, x: Tensor, base: nn.Module) -> Tensor:
        """The output of the base, plus what the active adapters started from.

        With `first_quantized`, the output of what the first step computed with, where an adapter quantizes its base.
        """
        parts = self.parts()
        if self.first_quantized and any(part.adapter.base != "codes" for part in parts):
            product, bias = stacked(autocast(x), self.first_weight(), []), self.get_base_layer().bias
            return product if bias is None else product + bias.to(product.dtype)  # type: ignore[operator]
        y: Tensor = base(x)
        for part in parts:
            first = part.adapter.first(part.params)
            if first is not None:
                y = part.adapter.side(autocast(x), y, self.quant.quant_weight, first, part.scaling, same)
        return y

    @torch.no_grad()
    def begin_quantizing(self) -> None:
        """Leave the dense steps: the grid starts from the matrix as these have changed it."""
        for part in self.parts():
            part.adapter.begin_quantizing(self.source, part.params, part.scaling)
        self.dense_steps = False

    # --- merging ---

    def merged_weight(self) -> QuantWeight:
        """The quantized weight with all active adapters merged into it.

        Raises:
            MergeError: An adapter cannot merge.
        """
        return self._merged(self.active())

    def _merged(self, names: list[str]) -> QuantWeight:
        weight = self.source
        for part in self.parts(names):
            weight = part.adapter.merge(weight, part.params, part.scaling)
        assert isinstance(weight, QuantWeight)
        return weight

    def merged_bias(self, names: list[str] | None = None) -> Tensor | None:
        """The layer's bias with those of the active adapters (`lora_bias`) added, `[out]`; None if there is none.

        Raises:
            MergeError: An adapter has a bias where the layer, as its model defines it, has none.
        """
        bias: Any = stored_bias(self.get_base_layer())
        for name in self.active() if names is None else names:
            if self.lora_bias[name]:
                if bias is None:
                    raise MergeError(
                        f"the adapter {name!r} has a bias (lora_bias), and the layer has none that it could merge "
                        "into. Train with lora_bias=False, or serve the adapter beside its base (quadapt export "
                        "--format lora)"
                    )
                bias = (bias + self.scaling[name] * self.lora_B[name].bias).to(bias.dtype)
        return bias

    def check_merge(self, names: list[str] | None = None) -> None:
        """Raise MergeError if adapters (the active ones, unless named) cannot merge, or their biases."""
        names = self.active() if names is None else [name for name in names if name in self.adapters]
        every = list(dict.fromkeys([*names, *self.merged_adapters]))
        if len(every) > 1 and not all(self.adapters[name].stacks for name in every):
            raise MergeError(f"adapters {', '.join(every)} each give this layer a grid of its own. Merge one of them")
        names = [name for name in names if name not in self.merged_adapters]
        self.merged_bias(names)
        if any(self.adapters[name].exactness == "none" for name in names):
            self._merged(names)

    def first_weight(self) -> QuantWeight:
        """The quantized weight from before the first step."""
        parts = self.parts()
        if not parts:
            return self.quant.quant_weight
        return parts[0].adapter.untrained(self.source, parts[0].params, parts[0].scaling)

    @torch.no_grad()
    def dense_adapted(self) -> Tensor:
        """The weight that the layer computes with, adapters included, as float32 `[out, in]`."""
        parts = self.parts()
        if len(parts) == 1:
            return parts[0].adapter.dense(self.source, parts[0].params, parts[0].scaling)
        return stacked_dense(self.quant.quant_weight, parts)

    def settle(self, weight: QuantWeight, bias: Tensor | None) -> None:
        """Replace the weight and the bias by quantized ones, for good."""
        layer = self.get_base_layer()
        if not isinstance(layer, QuantLinear):
            self.base_layer = QuantLinear.of(weight, bias)
            return
        layer.quant_weight = weight
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the quantized weight.

        Raises:
            MergeError: An adapter cannot merge. Nothing has been merged then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.adapters]
        if names:
            self.check_merge(names)
            weight, bias, layer = self._merged(names), self.merged_bias(names), self.get_base_layer()
            if not self._before:
                self._before = [_copy(layer) if isinstance(layer, QuantLinear) else layer]
            self.settle(weight, bias)
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put back the weight from before the merges."""
        for before in self._before:
            if isinstance(before, QuantLinear):
                self.quant.quant_weight, self.quant.bias = before.quant_weight, before.bias
            else:
                self.base_layer = before
        self._before.clear()
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter changes about the dense weight, float32 `[out, in]`."""
        lora = self.as_lora(adapter)
        if lora is not None:
            return self.scaling[adapter] * (lora[1].float() @ lora[0].float())
        (part,), source = self.parts([adapter]), self.source
        base = source.dequantize() if isinstance(source, QuantWeight) else source.float()
        return part.adapter.dense(source, part.params, part.scaling) - base

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def _copy(layer: QuantLinear) -> QuantLinear:
    """Another layer with the same tensors: a merge gives `layer` itself new ones."""
    other = QuantLinear.of(layer.quant_weight)
    other.bias = layer.bias
    return other


def adapted_layers(model: nn.Module) -> dict[str, QuantLoraLinear]:
    """The layers of a model that carry adapters of ours, by their name in the base model."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, QuantLoraLinear)
    }


def declared_params(model: nn.Module) -> Iterator[tuple[nn.Parameter, Param]]:
    """Each parameter of an adapter of ours in a model, with what the adapter has declared about it."""
    for layer in adapted_layers(model).values():
        for adapter_name, declared in layer.declared.items():
            for name, tensor in layer.params(adapter_name).items():
                assert isinstance(tensor, nn.Parameter)
                yield tensor, declared[name]
