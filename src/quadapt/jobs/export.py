"""`quadapt export`: a file or folder that others serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from quadapt.config import ExportConfig
from quadapt.errors import CheckpointError, ConfigError
from quadapt.hf.folder import Folder, find_base, load, open_folder
from quadapt.hf.merge import dense_adapted
from quadapt.hf.merge import merge as merge_model
from quadapt.hf.peft_layer import adapted_layers, adapter_of
from quadapt.hf.workspace import check_disk, remove
from quadapt.jobs.merge import load_adapted
from quadapt.jobs.source import device_of
from quadapt.report.ui import UI


def export(config: ExportConfig, ui: UI) -> dict[str, Any]:
    """Run the command.

    Raises:
        QuadaptError: Input cannot be used, or the format cannot hold it; see the message.
    """
    from quadapt.export import dense, gguf, gguf_lora, lora

    folder, output = open_folder(config.model), Path(config.output)
    if folder.kind == "model":
        raise CheckpointError(f"{config.model!r} is a dense model. Quantize or tune it first")
    if output.exists() and not config.overwrite:
        raise ConfigError(f"output={config.output!r} exists. Use --overwrite to replace it, or another --output")
    adapted = folder.kind == "adapter"
    where = find_base(folder, config.base) if adapted else folder.name
    weights = sum(file.stat().st_size for file in Path(where).glob("*.safetensors")) if Path(where).is_dir() else 0
    check_disk(output.parent, weights)
    model, tokenizer = load_adapted(folder, where, config) if adapted else load(
        config.model, dtype=config.dtype, device=device_of(config), trust_remote_code=config.trust_remote_code)
    if config.format == "lora" and not adapted:
        raise ConfigError(f"{config.model!r} has no adapter to export. Give the folder that tune wrote, or use --format hf")
    model, beside = (model, None) if not adapted or config.format == "lora" else _settle(model, config, ui)
    if config.overwrite and output.is_dir():
        remove(output)

    def bar(items: Any) -> Any:
        return ui.over("exporting", items)

    reports = []
    if config.format == "lora":
        reports.append(lora.export_lora(model, output, base=_dense_source(folder, where)))
    elif config.format == "hf":
        dtype: Any = "bfloat16" if config.dtype == "auto" else config.dtype
        reports.append(dense.export_hf(model, tokenizer, output, dtype=dtype, progress=bar))
    else:
        reports.append(gguf.export_gguf(model, tokenizer, output, dense=config.dense, name=output.stem, progress=bar))
        if beside is not None:
            reports.append(gguf_lora.export_gguf_lora(beside, output.with_name(f"{output.stem}-lora.gguf")))
    for report in reports:
        for note in report.notes:
            ui.show(note)
        ui.show(f"{report.path}: {report.bytes / 1e6:.2f} MB, {report.bits_per_weight:.3f} bits per quantized weight")
    return {"output": config.output, "reports": [report.as_dict() for report in reports]}


def _settle(model: nn.Module, config: ExportConfig, ui: UI) -> tuple[nn.Module, nn.Module | None]:
    """A model without adapters to export; and, where the adapter must stay beside it, the adapted model."""
    mergeable = all(adapter_of(about).exactness != "none" for about in model.peft_config.values())  # type: ignore[union-attr, operator]
    if mergeable:
        merged, certificate = merge_model(model)
        ui.say(f"merged first: {certificate}")
        return merged, None
    if config.format == "hf":
        ui.say("the adapter cannot merge into codes; base and adapter are added up in the dense weights")
        return _densified(model), None
    ui.say("the adapter cannot merge into codes: it goes out as a LoRA file beside the base")
    return model, model


def _densified(model: nn.Module) -> nn.Module:
    """Replace each adapted layer by a dense one with its adapter added."""
    layers = adapted_layers(model)
    dense = {name: (dense_adapted(layer).detach(), layer.quant.bias) for name, layer in layers.items()}
    plain = model.unload()  # type: ignore[operator]
    for name, (weight, bias) in dense.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), bias
        plain.set_submodule(name, linear)
    return plain  # type: ignore[no-any-return]


def _dense_source(folder: Folder, where: str) -> str:
    """The dense model that an adapter's base stands for, as far as is known."""
    return str(folder.note.get("settings", {}).get("model", where))
