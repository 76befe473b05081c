"""An ordinary PEFT adapter, for servers that hold the dense base (`--format hf`) and know LoRA alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from quadapt.errors import ExportError, locate
from quadapt.exporters.files import new_folder
from quadapt.exporters.lora_experts import name_stacks, over_experts, tensors_over, wholes
from quadapt.exporters.report import ExportReport, TensorRow, size_of
from quadapt.exporters.tensors import TYPES

if TYPE_CHECKING:
    from quadapt.hf.peft_layer import QuantLoraLinear

Layers = Mapping[str, "QuantLoraLinear"]
"""The layers that carry an adapter, by their name in the base model."""


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

    layers, path = check_lora(model, adapter_name), Path(folder)
    ours = tuple(f"base_model.model.{name}." for name in layers)
    tensors = {  # of our layers the factors below and the bias, in which all is contained that serves
        name: tensor
        for name, tensor in get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        ).items()
        if not name.startswith(ours) or name.endswith((".lora_B.bias", ".base_layer.bias"))
        if not {"original_module", "modules_to_save"}.intersection(name.split("."))  # biases of theirs: once is enough
    }
    factors = {name: as_lora(name, layers, adapter_name) for name in layers}
    routed = over_experts(model, factors)
    found = wholes(model, {name: _scaled(factors[name], layers[name], adapter_name) for name in routed})
    tensors |= tensors_over(found)
    for name, (A, B) in factors.items():
        if name in routed:
            continue
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    config = _plain(model, adapter_name, base)
    fit_rank(config, model, factors, adapter_name)
    if found:
        name_stacks(config, model, found, adapter_name)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in sorted(tensors.items())}
    with new_folder(path) as partial:
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(partial))
    rows = [
        TensorRow(
            name=name, type=TYPES.get(tensor.dtype, str(tensor.dtype)), shape=tuple(tensor.shape), nbytes=tensor.nbytes
        )
        for name, tensor in tensors.items()
    ]
    report = adapter_report("lora", path, rows, layers, adapter_name)
    return replace(report, notes=(*report.notes, *_besides(model)))


def _besides(model: nn.Module) -> list[str]:
    """What is to be said of whole modules and biases in an adapter."""
    from quadapt.hf.trained import listed, parts_of

    parts = [part for part in parts_of(model) if part.exact]
    if not parts:
        return []
    return [f"it holds, besides factors, {listed(parts)}: PEFT loads these, and servers that know LoRA alone do not"]


def check_lora(model: Any, adapter_name: str = "default") -> Layers:
    """The quantized layers that carry an adapter, all of which stock LoRA can hold.

    Raises:
        ExportError: There are none, or more has trained than stock LoRA can hold.
    """
    layers = adapted(model, adapter_name)
    _refuse_unsaved(model, adapter_name)
    return layers


def _refuse_unsaved(model: Any, adapter_name: str) -> None:
    """Raise ExportError if parameters of the base have trained that are no part of PEFT's adapters."""
    from quadapt.hf.trained import parts_of

    if getattr(model.peft_config[adapter_name], "bias", "none") != "none":
        return  # which PEFT saves
    for part in parts_of(model):
        if part.kind == "a parameter of the base":
            raise ExportError(
                f"{part.name}: has trained in the base itself, which is no part of the adapter. Train it as one of "
                "LoraConfig's modules_to_save, or merge and export the model (--format hf)"
            )


def adapted(model: nn.Module, adapter_name: str) -> Layers:
    """The quantized layers that carry an adapter.

    Raises:
        ExportError: There are none.
    """
    from quadapt.hf.peft_layer import adapted_layers

    layers = {}
    for name, layer in adapted_layers(model).items():
        if adapter_name not in layer.adapters:
            continue
        if layer.as_lora(adapter_name) is None:
            kind = layer.adapters[adapter_name].kind
            raise ExportError(f"{name}: a {kind} adapter is part of the quantizer, no LoRA. Merge it first")
        layers[name] = layer
    if not layers:
        known: Any = getattr(model, "peft_config", {})
        raise ExportError(
            f"adapter {adapter_name!r}: the model has no quantized layer with it; it has adapters "
            f"{', '.join(known) or 'none'}. Load it with PeftModel.from_pretrained"
        )
    return layers


def merges(model: nn.Module) -> bool:
    """Whether all active adapters of a model merge into codes; also if it has none."""
    from quadapt.hf.peft_layer import adapted_layers

    layers = adapted_layers(model).values()
    return all(layer.adapters[name].exactness != "none" for layer in layers for name in layer.active())


def refuse_parts(model: nn.Module, advice: str, *, with_base: bool) -> None:
    """Raise ExportError if more has trained than adapters over quantized layers, which is all that a form holds.

    Args:
        model: A PEFT model.
        advice: What to do instead.
        with_base: Whether the base goes out too, and with it what has trained in its place.
    """
    from quadapt.hf.trained import parts_of

    for part in parts_of(model):
        if not (with_base and part.kind == "a parameter of the base"):
            raise ExportError(f"{part.name}: has {part.kind} trained, {advice}")


def as_lora(name: str, layers: Layers, adapter_name: str) -> tuple[Tensor, Tensor]:
    """`A [rank, in]` and `B [out, rank]` of the stock LoRA that does what a layer's adapter does, at its scaling."""
    with locate(name):
        found = layers[name].as_lora(adapter_name)
    assert found is not None  # :func:`adapted` refuses such layers
    return found[0].detach(), found[1].detach()


def _scaled(factors: tuple[Tensor, Tensor], layer: QuantLoraLinear, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Factors with the layer's scaling in the second one."""
    return factors[0], factors[1] * float(layer.scaling[adapter_name])


def fit_rank(config: Any, model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], adapter_name: str) -> None:
    """Give a config the rank of the factors, in place, and alphas with which the scaling stays as it is.

    The rank is not that of the adapter where frozen factors of a start stand beside those that have trained. One rank
    and one alpha say it where they can, which servers understand that do not know patterns.

    Args:
        config: PEFT's, of the adapter that goes out.
        model: The PEFT model.
        factors: Of each quantized layer, as :func:`as_lora` gives them.
        adapter_name: Which adapter.
    """
    from peft.tuners.lora.layer import LoraLayer

    ranks, alphas, same = {}, {}, True
    slope = 0.5 if config.use_rslora else 1.0
    for full, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.r:
            name = full.removeprefix("base_model.model.")
            ranks[name] = len(factors[name][0]) if name in factors else layer.r[adapter_name]
            alphas[name] = _whole(float(layer.scaling[adapter_name]) * ranks[name] ** slope)
            same = same and ranks[name] == layer.r[adapter_name]
    if same:
        return
    alone = len(set(ranks.values())) == len(set(alphas.values())) == 1
    if alone:
        config.r, config.lora_alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config.rank_pattern, config.alpha_pattern = ({}, {}) if alone else (ranks, alphas)


def _whole(alpha: float) -> float:
    """An alpha without what rounding has added to it, as an integer where it is one."""
    rounded = round(alpha, 9)
    return int(rounded) if rounded == int(rounded) else rounded


def adapter_report(
    format: str, path: Path, rows: Sequence[TensorRow], layers: Layers, adapter_name: str
) -> ExportReport:
    """The report on an adapter that went out as stock LoRA."""
    notes = ["its base is the dequantized one (--format hf or gguf of the base), not the model before quantization"]
    adapters = [layer.adapters[adapter_name] for layer in layers.values()]
    if any(as_lora(name, layers, adapter_name)[0].shape[0] > layer.r[adapter_name] for name, layer in layers.items()):
        notes.append(
            "the frozen factors of the start stand beside those that have trained, so the rank is twice the adapter's; "
            "servers that limit the rank (vLLM's --max-lora-rank) must allow for it"
        )
    for kind in dict.fromkeys(adapter.kind for adapter in adapters if adapter.merged_form):
        notes.append(
            f"the {kind} adapter was trained in the merged form, with offsets rounded as they are stored; "
            "beside the base it does the same up to that rounding. To serve it exactly, export it merged"
        )
    weights = sum(layer.quant.in_features * layer.quant.out_features for layer in layers.values())
    return ExportReport(
        format=format,
        path=str(path),
        bytes=size_of(path),
        tensors=tuple(rows),
        bits_per_weight=8 * sum(row.nbytes for row in rows) / weights,
        notes=tuple(notes),
    )


def _plain(model: Any, adapter_name: str, base: str) -> Any:
    """The adapter's config without anything of ours, as stock PEFT reads it."""
    from quadapt.hf.adapter_config import as_stock

    config = as_stock(model.peft_config[adapter_name])
    config.base_model_name_or_path = base or None
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules or ())
    config.init_lora_weights, config.inference_mode = True, True
    return config
