"""The plug-in with which transformers loads and saves quantized checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from quadapt.errors import CheckpointError, ConfigError
from quadapt.hf.config import QuadaptConfig
from quadapt.hf.stored_form import changes, conversions
from quadapt.model.layer import quantize_layer
from quadapt.model.linear_form import linear_form
from quadapt.model.quantize import fingerprint, quantized_layers
from quadapt.model.select import refuse_foreign, select
from quadapt.nn.experts import Experts
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.weight import Layout, hash_tensor


class QuadaptQuantizer(HfQuantizer):
    """Swaps linear layers for quantized ones before weights are loaded, and checks afterwards that all of them were."""

    quantization_config: QuadaptConfig
    requires_calibration = False

    def is_serializable(self) -> bool:
        """A quantized model saves as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train over the frozen codes."""
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the checkpoint is a float weight to be quantized on loading."""
        if self.pre_quantized:
            return False
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, QuantLinear) and name == "weight"

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """How many bytes an element of a parameter takes, from which `device_map="auto"` decides what fits."""
        if self.param_needs_quantization(model, param_name):
            return float(self.quantization_config.bits) / 8
        return float(super().param_element_size(model, param_name, param))

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """How the tensors of files become those of the model, which is in the linear form."""
        found = conversions(model, weight_conversions, dense=not self.pre_quantized)
        updated: list[Any] = super().update_weight_conversions(found, model)
        return updated

    def get_quantize_ops(self) -> ConversionOps:
        """How a float weight is quantized on loading."""
        return _QuantizeOnLoading(self.quantization_config)

    def _process_model_before_weight_loading(
        self, model: nn.Module, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        linear_form(model)
        for module in model.modules():
            if any(isinstance(child, Experts) for child in module.children()):
                module._is_hf_initialized = True  # type: ignore[assignment]  # Qwen's draws stacks that are no more
        if not self.pre_quantized:
            selection = select(model, skip=config.skip)
            self._left = selection.left
            for name, linear in selection.chosen.items():
                self._swap(
                    model,
                    name,
                    config.quantization().layout(name, linear.out_features, linear.in_features),
                    dtype,
                    wish=True,
                )
            return
        for name, layout in config.layouts.items():
            linear = _linear(model, name)
            if (linear.out_features, linear.in_features) != (layout.out, layout.columns):
                raise CheckpointError(
                    f"{name}: is {linear.out_features} x {linear.in_features} in the model, {layout.out} x "
                    f"{layout.columns} in quantization_config. config.json belongs to another model"
                )
            self._swap(model, name, layout, dtype, wish=False)

    def _swap(self, model: nn.Module, name: str, layout: Layout, dtype: torch.dtype | None, *, wish: bool) -> None:
        layer = QuantLinear(layout, bias=_linear(model, name).bias is not None, device="meta", dtype=dtype)
        if wish:  # the loader hands the float tensor over only if the model has a float tensor of that name and shape
            dense = torch.empty(layout.out, layout.columns, dtype=dtype, device="meta")
            layer.weight = nn.Parameter(dense, requires_grad=False)
        layer._is_hf_initialized = True  # type: ignore[assignment]  # codes that are missing are not drawn at random
        model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        layers = quantized_layers(model)
        for name, layer in layers.items():
            for tensor_name in layer.layout.shapes:
                if not getattr(layer.get_parameter(tensor_name), "_is_hf_initialized", False):
                    raise CheckpointError(
                        f"{name}.{tensor_name}: is not in the checkpoint, or has another shape there than "
                        f"{' x '.join(map(str, layer.layout.shapes[tensor_name]))}. The download is incomplete, or "
                        "config.json belongs to another model"
                    )
            for parameter in layer.parameters():
                parameter.requires_grad_(False)  # the loader makes float tensors trainable
        if not self.pre_quantized:
            adopt(model, left=self._left, made={"rounding": "nearest", "range": self.quantization_config.range})
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in quantized_layers(model).items():
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            dense.weight = nn.Parameter(layer.quant_weight.dequantize(dtype or torch.float32), requires_grad=False)
            if layer.bias is not None:
                dense.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
            model.set_submodule(name, dense)
        if changes(model):
            model._weight_conversions = None  # type: ignore[assignment]  # those of its family, not of our folder
        return model


class _QuantizeOnLoading(ConversionOps):
    def __init__(self, config: QuadaptConfig) -> None:
        self.config = config

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        model, made = kwargs["model"], dict[str, Any]()
        for full, found in input_dict.items():
            weight = found[0] if isinstance(found, list) else found
            name = (full if len(input_dict) > 1 else kwargs["full_layer_name"]).rpartition(".")[0]
            layer = model.get_submodule(name)
            if not isinstance(layer, QuantLinear):  # one of several that come from one tensor, and is skipped
                made[full] = weight
                continue
            quantized = quantize_layer(name, weight, self.config.quantization(), {})[0].weight
            layer.__dict__["layout"] = quantized.layout
            for tensor_name, tensor in quantized.tensors.items():  # what the loader will compare shapes with
                if tensor_name != "weight":
                    layer.register_parameter(tensor_name, nn.Parameter(tensor.to("meta"), requires_grad=False))
            made |= {f"{name}.{tensor_name}": tensor for tensor_name, tensor in quantized.tensors.items()}
        return made


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise CheckpointError(
            f"{name}: the checkpoint says that this layer is quantized, but {type(model).__name__} has no linear "
            "layer of that name. config.json belongs to another model"
        )
    return module


def adopt(model: Any, *, left: Mapping[str, str], made: Mapping[str, Any], besides: str = "") -> Any:
    """Make a model that was quantized in place known to transformers as quantized, so that it saves as such.

    Args:
        model: Changed in place, and returned.
        left: Why each other matrix is not quantized, by name.
        made: How it was made, for people to read.
        besides: Digest of what merges have changed outside of the quantized layers.

    Raises:
        ConfigError: Something else has quantized a part of it.
    """
    refuse_foreign(model)
    weights = {_plain(name): layer.quant_weight for name, layer in quantized_layers(model).items()}
    config = QuadaptConfig.of(
        {name: weight.layout for name, weight in weights.items()},
        left=left,
        made=made,
        fingerprint=fingerprint(weights, besides),
        besides=besides,
    )
    model.name_or_path = ""  # PEFT writes it into adapters as their base; what bears that name is another model
    model.hf_quantizer = QuadaptQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = config.quant_method
    return model


def disown(model: Any, before: Any) -> None:
    """Undo :func:`adopt`: the model is again what `before`, its quantization config from then, says; None: dense."""
    if before is not None:
        model.config.quantization_config = before
        model.hf_quantizer = QuadaptQuantizer(before, pre_quantized=True)
        return
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized, model.quantization_method = False, None


def fingerprint_of(model: nn.Module) -> str:
    """What tells one base from another: of a quantized model as its config has it, of a dense one over its matrices.

    Adapters that lie over the model do not count. Empty if a matrix is not there to be read (on the meta device).
    """
    layers = quantized_layers(model)
    if layers:
        config = getattr(getattr(model, "config", None), "quantization_config", None)
        return getattr(config, "fingerprint", "") or content_of(model)
    state = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not _of_an_adapter(name):
            if module.weight.device.type == "meta":
                return ""
            state.update(f"{_plain(name)}:{module.weight.dtype}".encode())
            hash_tensor(state, module.weight)
    return state.hexdigest()


def content_of(model: nn.Module) -> str:
    """The fingerprint of a quantized base, computed from its tensors. Empty if they are on the meta device."""
    weights = {_plain(name): layer.quant_weight for name, layer in quantized_layers(model).items()}
    if any(tensor.device.type == "meta" for weight in weights.values() for tensor in weight.tensors.values()):
        return ""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return fingerprint(weights, getattr(config, "besides", ""))


def _of_an_adapter(name: str) -> bool:
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def _plain(name: str) -> str:
    """A layer's name in the base, without what PEFT puts around it."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def base_config(model: nn.Module) -> QuadaptConfig:
    """The quantization config of a quantized model.

    Raises:
        ConfigError: The model is not quantized by quadapt.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, QuadaptConfig):
        raise ConfigError(f"{type(model).__name__} is not quantized by quadapt. Quantize it first (quadapt quantize)")
    return config


def register() -> None:
    """Make transformers know the quantizer, once."""
    if "quadapt" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("quadapt")(QuadaptConfig)
        register_quantizer("quadapt")(QuadaptQuantizer)


register()
