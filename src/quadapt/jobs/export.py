"""`quadapt export`: a file or folder that others serve."""

from __future__ import annotations

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
from quadapt.hf.peft_layer import adapted_layers, adapter_of
from quadapt.hf.reading import reading
from quadapt.hf.trained import merge_parts, parts_of, settle_ties
from quadapt.hf.workspace import Workspace, check_disk, check_output
from quadapt.jobs.identity import earlier_job, inputs_of, job_of
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
    files = [output, _lora_beside(output)] if _goes_beside(config, folder) else [output]
    places = {file.name: file for file in files}
    job = job_of("export", config, earlier_job(output), base=where)
    with Workspace(
        output, job, overwrite=config.overwrite, keeps=False, places=places, folder=config.format != "gguf"
    ) as space:
        if space.finished is not None:
            return space.finished
        reports = _exported(config, folder, where, space.path / output.name, ui)
        reports = [replace(report, path=str(places[Path(report.path).name])) for report in reports]
        result = {"output": config.output, "reports": [report.as_dict() for report in reports]}
        space.commit(result=result)
    for report in reports:
        for note in report.notes:
            ui.show(note)
        bits = f", {report.bits_per_weight:.3f} bits per quantized weight" if report.bits_per_weight else ""
        ui.show(f"{report.path}: {report.bytes / 1e6:.2f} MB{bits}")
    return result


def _goes_beside(config: ExportConfig, folder: Folder) -> bool:
    """Whether there will be a second GGUF file, for an adapter that cannot merge."""
    from peft import PeftConfig

    if config.format != "gguf" or folder.kind != "adapter":
        return False
    return adapter_of(reading(folder.name, PeftConfig.from_pretrained, folder.name)).exactness == "none"


def _lora_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-lora.gguf")


def _exported(config: ExportConfig, folder: Folder, where: str, path: Path, ui: UI) -> list[ExportReport]:
    """Load and write; reports on what was written, the model first."""
    if folder.kind == "adapter":
        model, tokenizer = load_adapted(folder, where, config)
    else:
        code = config.trust_remote_code
        model, tokenizer = load(config.model, dtype=config.dtype, device=device_of(config), trust_remote_code=code)
    check_content(where, model)
    reports: list[ExportReport] = []
    if folder.kind == "adapter" and config.format not in ("lora", "nf8"):
        with over_any_base(config.any_base):
            model, reports = _settle(model, config, path, ui)
    about = nf8.base_note(folder.note, where, Path(config.output)) if config.format == "nf8" else {}
    return [_write(config, path, model, tokenizer, about, ui), *reports]


def _check(config: ExportConfig, folder: Folder, output: Path) -> str:
    """Refuse what cannot be done before anything is loaded; where the quantized weights are."""
    if folder.kind == "model":
        raise CheckpointError(f"{config.model!r} is a dense model. Quantize or tune it first")
    if config.format in ("lora", "nf8") and folder.kind != "adapter":
        raise ConfigError(f"{config.model!r} is no adapter. Give the folder that tune wrote, or use --format hf")
    where = find_base(folder, config.base) if folder.kind == "adapter" else folder.name
    inputs = [*inputs_of(config), where]
    check_output(output, overwrite=config.overwrite, inputs=inputs, folder=config.format != "gguf")
    check_disk(output.parent, sum(file.stat().st_size for file in Path(where).glob("*.safetensors")))
    return where


def _write(config: ExportConfig, path: Path, model: Any, tokenizer: Any, about: dict[str, Any], ui: UI) -> ExportReport:
    """Write a file or folder of the format."""

    def bar(items: Any) -> Any:
        return ui.over("exporting", items)

    if config.format == "gguf":
        return gguf.export_gguf(model, tokenizer, path, dense=config.dense, progress=bar)
    if config.format == "lora":
        return lora.export_lora(model, path)
    if config.format == "nf8":
        report = nf8.export_nf8(model, path)
        tokenizer.save_pretrained(path)
        write_note(path, about)
        return report
    if config.format == "compressed-tensors":
        held: Any = "float16" if config.dtype == "auto" else config.dtype
        return compressed_tensors.export_compressed_tensors(model, tokenizer, path, dtype=held)
    dtype: Any = "bfloat16" if config.dtype == "auto" else config.dtype
    return dense.export_hf(model, tokenizer, path, dtype=dtype, progress=bar)


def _settle(model: Any, config: ExportConfig, path: Path, ui: UI) -> tuple[Any, list[ExportReport]]:
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
        reports = [gguf_lora.export_gguf_lora(model, _lora_beside(path))]
        plain = model.unload()
    for part in settle_ties(plain, besides):
        ui.say(f"{part.name}: {part.kind}, is part of the base that is written{', untied' if part.untied else ''}")
    return plain, reports
