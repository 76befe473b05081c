"""`quadapt export`: a file or folder that others serve."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from quadapt.config import ExportConfig
from quadapt.errors import CheckpointError, ConfigError
from quadapt.exporters import compressed_tensors, dense, gguf, gguf_lora, lora, nf8
from quadapt.exporters.report import ExportReport
from quadapt.hf.folder import Folder, check_content, find_base, load, open_folder, over_any_base, write_note
from quadapt.hf.merge import merge as merge_model
from quadapt.hf.merge import with_dense
from quadapt.hf.peft_layer import adapted_layers
from quadapt.hf.trained import merge_parts, parts_of, settle_ties
from quadapt.hf.workspace import check_disk, check_output, remove
from quadapt.jobs.merge import load_adapted
from quadapt.jobs.source import device_of
from quadapt.report.ui import UI


def export(config: ExportConfig, ui: UI) -> dict[str, Any]:
    """Run the command.

    Raises:
        QuadaptError: Input cannot be used, or the format cannot hold it; see the message.
    """
    folder, output = open_folder(config.model), Path(config.output)
    where = _check(config, folder, output)
    if folder.kind == "adapter":
        model, tokenizer = load_adapted(folder, where, config)
    else:
        code = config.trust_remote_code
        model, tokenizer = load(config.model, dtype=config.dtype, device=device_of(config), trust_remote_code=code)
    check_content(where, model)
    reports: list[ExportReport] = []
    if folder.kind == "adapter" and config.format not in ("lora", "nf8"):
        with over_any_base(config.any_base):
            model, reports = _settle(model, config, output, ui)
    about = nf8.base_note(folder.note, where, output) if config.format == "nf8" else {}
    reports = _write(config, output, model, tokenizer, about, ui) + reports
    for report in reports:
        for note in report.notes:
            ui.show(note)
        bits = f", {report.bits_per_weight:.3f} bits per quantized weight" if report.bits_per_weight else ""
        ui.show(f"{report.path}: {report.bytes / 1e6:.2f} MB{bits}")
    return {"output": config.output, "reports": [report.as_dict() for report in reports]}


def _check(config: ExportConfig, folder: Folder, output: Path) -> str:
    """Refuse what cannot be done before anything is loaded; where the quantized weights are."""
    if folder.kind == "model":
        raise CheckpointError(f"{config.model!r} is a dense model. Quantize or tune it first")
    if config.format in ("lora", "nf8") and folder.kind != "adapter":
        raise ConfigError(f"{config.model!r} is no adapter. Give the folder that tune wrote, or use --format hf")
    where = find_base(folder, config.base) if folder.kind == "adapter" else folder.name
    check_output(output, overwrite=config.overwrite, inputs=[folder.name, where])
    check_disk(output.parent, sum(file.stat().st_size for file in Path(where).glob("*.safetensors")))
    return where


def _write(
    config: ExportConfig, output: Path, model: Any, tokenizer: Any, about: dict[str, Any], ui: UI
) -> list[ExportReport]:
    """Write beside the output; what is there is replaced once the new file or folder is whole."""

    def bar(items: Any) -> Any:
        return ui.over("exporting", items)

    if config.format == "gguf":
        return [gguf.export_gguf(model, tokenizer, output, dense=config.dense, name=output.stem, progress=bar)]
    new = output.with_name(f".{output.name}.new")
    remove(new)
    if config.format == "lora":
        report = lora.export_lora(model, new)
    elif config.format == "nf8":
        report = nf8.export_nf8(model, new)
        tokenizer.save_pretrained(new)
        write_note(new, about)
    elif config.format == "compressed-tensors":
        held: Any = "float16" if config.dtype == "auto" else config.dtype
        report = compressed_tensors.export_compressed_tensors(model, tokenizer, new, dtype=held)
    else:
        dtype: Any = "bfloat16" if config.dtype == "auto" else config.dtype
        report = dense.export_hf(model, tokenizer, new, dtype=dtype, progress=bar)
    remove(output)
    os.rename(new, output)
    return [replace(report, path=str(output))]


def _settle(model: Any, config: ExportConfig, output: Path, ui: UI) -> tuple[Any, list[ExportReport]]:
    """A model without adapters to export; an adapter that cannot merge is added up (hf), or written beside (gguf)."""
    layers = adapted_layers(model)
    if all(layer.adapters[name].exactness != "none" for layer in layers.values() for name in layer.active()):
        merged, certificate = merge_model(model)
        ui.say(f"merged first: {certificate}")
        return merged, []
    if config.format == "compressed-tensors":
        raise ConfigError(
            "the adapter cannot merge into codes. Requantize it first (quadapt merge --requantize), or use --format "
            "gguf or lora"
        )
    besides = parts_of(model)
    merge_parts(model)
    if config.format == "hf":
        ui.say("the adapter cannot merge into codes; base and adapter are added up in the dense weights")
        plain, reports = with_dense(model, layers), []
    else:
        ui.say("the adapter cannot merge into codes: it goes out as a LoRA file beside the base")
        reports = [gguf_lora.export_gguf_lora(model, output.with_name(f"{output.stem}-lora.gguf"))]
        plain = model.unload()
    for part in settle_ties(plain, besides):
        ui.say(f"{part.name}: {part.kind}, is part of the base that is written{', untied' if part.untied else ''}")
    return plain, reports
