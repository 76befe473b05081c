"""An ordinary PEFT adapter, for servers that hold the dense base (`--format hf`) and know LoRA alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from quadapt.errors import ExportError, locate
from quadapt.export.files import new_folder
from quadapt.export.report import ExportReport, TensorRow, size_of
from quadapt.nn.adapters import Adapter

if TYPE_CHECKING:
    from peft import LoraConfig

    from quadapt.hf.peft_layer import QuantLoraLinear


def export_lora(model: nn.Module, folder: str | Path, *, base: str = "", adapter_name: str = "default") -> ExportReport:
    """Write an adapter as stock LoRA, `A [rank, in]` and `B [out, rank]` at the same scaling.

    Args:
        model: A PEFT model over quantized layers.
        folder: Must not exist, or be empty.
        base: Name or folder of the dense base, to be written into `adapter_config.json`.
        adapter_name: Which adapter.

    Raises:
        ExportError: The folder is taken, or the model has no such adapter.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    layers, config = adapted(model, adapter_name), copy.copy(model.peft_config[adapter_name])  # type: ignore[index, union-attr]
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    for name, layer in layers.items():
        A, B = as_lora(name, layer, adapter_name)
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in sorted(tensors.items())}
    path = Path(folder)
    with new_folder(path) as partial:
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        _plain(config, base).save_pretrained(str(partial))
    rows = tuple(TensorRow(name=name, type=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), nbytes=tensor.nbytes)
                 for name, tensor in tensors.items())
    return ExportReport(format="lora", path=str(path), bytes=size_of(path), tensors=rows,
                        bits_per_weight=added_bits(rows, layers), notes=notes_on(layers, adapter_name))


def adapted(model: nn.Module, adapter_name: str) -> dict[str, QuantLoraLinear]:
    """The quantized layers that carry an adapter, by their name in the base model.

    Raises:
        ExportError: There are none.
    """
    from quadapt.hf.peft_layer import adapted_layers

    layers = {name: layer for name, layer in adapted_layers(model).items() if adapter_name in layer.adapters}
    if not layers:
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise ExportError(f"adapter {adapter_name!r}: the model has no quantized layer with it; it has {known}. "
                          "Load it with PeftModel.from_pretrained")
    return layers


def as_lora(name: str, layer: QuantLoraLinear, adapter_name: str) -> tuple[Tensor, Tensor]:
    """`A [rank, in]` and `B [out, rank]` of the stock LoRA that does what a layer's adapter does, at the same scaling."""
    with locate(name):
        A, B = layer.adapters[adapter_name].as_lora(layer.quant.quant_weight, *layer.factors(adapter_name))
    return A.detach(), B.detach()


def added_bits(rows: tuple[TensorRow, ...], layers: dict[str, QuantLoraLinear]) -> float:
    """What the adapter adds to each weight below it."""
    return 8 * sum(row.nbytes for row in rows) / sum(layer.in_features * layer.out_features for layer in layers.values())


def notes_on(layers: dict[str, QuantLoraLinear], adapter_name: str) -> tuple[str, ...]:
    """What one should know of an adapter that goes out as stock LoRA."""
    kinds: dict[str, Adapter] = {adapter.kind: adapter for layer in layers.values() for adapter in [layer.adapters[adapter_name]]}
    notes = ["the base must be the dequantized one (--format hf, or GGUF of the base), not the model from before quantization"]
    for kind, adapter in kinds.items():
        if adapter.merged_form:
            notes.append(f"{kind} was trained in the merged form, with offsets rounded to how they are stored; as a side branch over the "
                         "base it is equivalent up to that rounding. The merged model (--format gguf or hf after a merge) is exact")
    return tuple(notes)


def _plain(config: LoraConfig, base: str) -> LoraConfig:
    """The config without anything of ours, as stock PEFT reads it."""
    targets: Any = config.target_modules
    config.auto_mapping = None
    config.base_model_name_or_path = base or None
    config.target_modules = sorted(targets) if isinstance(targets, set | list) else targets
    config.init_lora_weights, config.inference_mode = True, True
    return config
