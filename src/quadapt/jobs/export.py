"""`quadapt export`: a file or folder that others serve; and which formats hold a model at all (`--format ?`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from quadapt.config import ExportConfig, ServeConfig
from quadapt.data import PromptForm
from quadapt.errors import CheckpointError, ConfigError, ExportError
from quadapt.exporters.formats import EXPORTERS, Answer, Exporter, Origin
from quadapt.exporters.lora import merges
from quadapt.exporters.ollama import modelfile
from quadapt.exporters.report import ExportReport
from quadapt.exporters.survey import COLUMNS, Subject, merged_layout, rows, survey
from quadapt.exporters.tensors import base_of
from quadapt.hf.card import CARD, exported_card, noted
from quadapt.hf.context import context_of
from quadapt.hf.ending import set_ends
from quadapt.hf.folder import Folder, find_base, open_folder
from quadapt.hf.loading import check_content, load, over_any_base, read_quantization
from quadapt.hf.merge import merge as merge_model
from quadapt.hf.merge import with_dense
from quadapt.hf.peft_layer import adapted_layers, adapter_of
from quadapt.hf.reading import reading
from quadapt.hf.settled import settle_quantizers
from quadapt.hf.trained import merge_parts, parts_of, settle_ties
from quadapt.hf.workspace import Workspace, check_disk, check_output
from quadapt.jobs.identity import earlier_job, inputs_of, job_of
from quadapt.jobs.merge import load_adapted
from quadapt.jobs.publish import publishes
from quadapt.jobs.source import device_of
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import Adapter
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.report.ui import UI


@publishes
def export(config: ExportConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt export` and return what was written.

    Raises:
        QuadaptError: Input cannot be used, or the format cannot hold it; see the message.
    """
    folder = open_folder(config.model)
    if folder.kind == "model":
        raise CheckpointError(f"{config.model!r} is a dense model. Quantize or tune it first")
    where = find_base(folder, config.base) if folder.kind == "adapter" else folder.name
    if config.output is None:
        return _formats(config, folder, where, ui)
    exporter, output = config.exporter(), Path(config.output)
    adapter = _check(config, exporter, folder, where, output)
    files = [output, *_more(config, exporter, folder, where, adapter, output)]
    files += [config.modelfile] if config.ollama else []
    places = {file.name: file for file in files}
    job = job_of("export", config, earlier_job(output), base=where)
    with Workspace(
        output, job, overwrite=config.overwrite, keeps=False, places=places, folder=not exporter.suffix
    ) as space:
        if space.finished is not None:
            return space.finished
        reports = _exported(config, exporter, folder, where, space.path / output.name, ui)
        reports = [replace(report, path=str(places[Path(report.path).name])) for report in reports]
        result = {"output": config.output, "reports": [report.as_dict() for report in reports]}
        result |= {"modelfile": str(config.modelfile)} if config.ollama else {}
        space.commit(result=result)
    show(reports, ui)
    if config.ollama:
        ui.show(f"{config.modelfile}: for Ollama. Next: ollama create NAME -f {config.modelfile}")
    return result


def show(reports: Iterable[ExportReport], ui: UI) -> None:
    """Say what was written, how large it is, and what one should know of it."""
    for report in reports:
        for note in report.notes:
            ui.show(note)
        bits = f", {report.bits_per_weight:.3f} bits per quantized weight" if report.bits_per_weight else ""
        ui.show(f"{report.path}: {report.bytes / 1e6:.2f} MB{bits}")


def _more(
    config: ExportConfig, exporter: Exporter, folder: Folder, where: str, adapter: Adapter | None, output: Path
) -> list[Path]:
    """The files that may be written beside the output: that of an adapter, and what matrices have no room for."""
    unmerged = adapter is not None and adapter.exactness == "none" and exporter.unmerged == "beside"
    files = [exporter.beside(output)] if unmerged else []
    if not exporter.paired:
        return files
    layouts = _layouts(folder, where, adapter, trust_remote_code=config.trust_remote_code)
    unknown = adapter is not None and adapter.base == "float"  # over a dense base nothing has a layout yet
    return [*files, exporter.second(output)] if unknown or any(map(exporter.pairs, layouts.values())) else files


def _check(config: ExportConfig, exporter: Exporter, folder: Folder, where: str, output: Path) -> Adapter | None:
    """Refuse what cannot be done before anything is loaded; the adapter, if there is one."""
    adapter = _adapter(folder)
    if adapter is not None:
        exporter.check_adapter(adapter)
    elif exporter.takes == "adapter":
        raise ConfigError(f"{config.model!r} is no adapter. Give the folder that tune wrote, or use --format hf")
    if exporter.takes == "model":
        _check_layouts(exporter, folder, where, adapter, trust_remote_code=config.trust_remote_code)
    inputs = [*inputs_of(config), where]
    check_output(output, overwrite=config.overwrite, inputs=inputs, folder=not exporter.suffix)
    check_disk(output.parent, sum(file.stat().st_size for file in Path(where).glob("*.safetensors")))
    return adapter


def _adapter(folder: Folder) -> Adapter | None:
    """The adapter of a folder that holds one."""
    from peft import PeftConfig

    if folder.kind != "adapter":
        return None
    return adapter_of(reading(folder.name, PeftConfig.from_pretrained, folder.name))


def _check_layouts(
    exporter: Exporter, folder: Folder, where: str, adapter: Adapter | None, *, trust_remote_code: bool
) -> None:
    """Raise ExportError if a layer's layout alone says that the format cannot hold it, merged if its adapter merges.

    What a layout leaves open ("may not be exact") is decided by the numbers, when they are loaded; and so is all of a
    dense base, which has no layouts yet.
    """
    for name, layout in _layouts(folder, where, adapter, trust_remote_code=trust_remote_code).items():
        why = exporter.never(layout)
        if why:
            raise ExportError(f"{name}: {why}")


def _layouts(folder: Folder, where: str, adapter: Adapter | None, *, trust_remote_code: bool) -> dict[str, Layout]:
    """The layouts that the matrices of a model have when they are written: merged, if its adapter merges."""
    about = read_quantization(where, trust_remote_code=trust_remote_code)
    merges = adapter is not None and adapter.exactness != "none"
    adapted = _adapted(folder) if merges else set()
    return {
        name: merged_layout(adapter, layout) if adapter is not None and name in adapted else layout
        for name, layout in (about.layouts if about is not None else {}).items()
    }


def _adapted(folder: Folder) -> set[str]:
    """Names of the layers that have a part in an adapter's file."""
    names: set[str] = set()
    for file in folder.path.glob("adapter_model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= {key.partition(".lora_")[0] for key in tensors.keys() if ".lora_" in key}  # noqa: SIM118
    return {name.removeprefix("base_model.model.") for name in names}


def _exported(
    config: ExportConfig, exporter: Exporter, folder: Folder, where: str, path: Path, ui: UI
) -> list[ExportReport]:
    """Load and write; reports on what was written, the model first."""
    model, tokenizer = loaded(config, folder, where)
    assert config.output is not None
    origin = Origin(note=folder.note, base=where, output=Path(config.output))
    with over_any_base(config.any_base):
        reports = write(model, tokenizer, exporter, path, ui, origin=origin)
    if config.ollama:
        text = _modelfile(model, tokenizer, folder, path, exporter.besides(path))
        path.with_name(config.modelfile.name).write_text(text, encoding="utf-8")
    if path.is_dir() and not (path / CARD).exists():
        card = exported_card(
            {**noted(where), **folder.note},
            format=exporter.name,
            served_by=exporter.served_by,
            bits=reports[0].bits_per_weight,
            notes=reports[0].notes,
            adapter=exporter.takes == "adapter",
        )
        (path / CARD).write_text(card, encoding="utf-8")
    return reports


def _modelfile(model: Any, tokenizer: Any, folder: Folder, path: Path, besides: Sequence[Path]) -> str:
    form = PromptForm.recorded(folder.note, tokenizer)
    form.check(tokenizer)
    set_ends(model, tokenizer)
    ends = model.generation_config.eos_token_id  # GGUF needs one, so there is one
    return modelfile(
        path,
        form=form,
        ends=tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends]),
        context=context_of(model.config),
        adapters=besides,
    )


def write(
    model: Any, tokenizer: Any, exporter: Exporter, path: Path, ui: UI, *, origin: Origin | None = None
) -> list[ExportReport]:
    """Write a loaded model, or a PEFT model; reports on what was written, the model first.

    Raises:
        QuadaptError: The format cannot hold it; see the message.
    """
    from peft import PeftModel

    reports: list[ExportReport] = []
    if isinstance(model, PeftModel) and exporter.unmerged == "beside":
        settle_quantizers(model)
    if isinstance(model, PeftModel) and exporter.takes == "model":
        model, reports = _settle(model, exporter, path, ui)
    exporter.check(model, tokenizer)
    written = exporter.write(
        model, tokenizer, path, origin=origin, progress=lambda names: ui.over("exporting", list(names))
    )
    return [written, *reports]


def loaded(config: ExportConfig | ServeConfig, folder: Folder, where: str) -> tuple[Any, Any]:
    """The model and its tokenizer: a PEFT model if the folder holds an adapter.

    Raises:
        CheckpointError: Something is missing, damaged, or belongs to another base.
    """
    if folder.kind == "adapter":
        model, tokenizer = load_adapted(folder, where, config)
    else:
        code = config.trust_remote_code
        model, tokenizer = load(config.model, dtype=config.dtype, device=device_of(config), trust_remote_code=code)
    check_content(where, model)
    return model, tokenizer


def _settle(model: Any, exporter: Exporter, path: Path, ui: UI) -> tuple[Any, list[ExportReport]]:
    """A model without adapters to export; an adapter that cannot merge is added up, or written beside it."""
    layers = adapted_layers(model)
    if merges(model):
        merged, certificate = merge_model(model)
        ui.say(f"merged first: {certificate}")
        return merged, []
    besides = parts_of(model)
    merge_parts(model)
    if exporter.unmerged == "added":
        ui.say("the adapter cannot merge into codes; base and adapter are added up in the dense weights")
        plain, reports = with_dense(model, layers), []
    else:
        ui.say("the adapter cannot merge into codes: it goes out as a LoRA file beside the base")
        reports = [exporter.write_beside(model, exporter.beside(path))]
        plain = model.unload()
    for part in settle_ties(plain, besides):
        ui.say(f"{part.name}: {part.kind}, is part of the base that is written{', untied' if part.untied else ''}")
    return plain, reports


# --- which formats hold a model ---


def _formats(config: ExportConfig, folder: Folder, where: str, ui: UI) -> dict[str, Any]:
    """Say what each format makes of the model; nothing is written."""
    with over_any_base(config.any_base):
        model, tokenizer = loaded(config, folder, where)
        answers = asked(model, tokenizer, folder, [config.exporter(name) for name in EXPORTERS])
    ui.table("", COLUMNS, rows(answers), wrapped=[COLUMNS[2], COLUMNS[4]])
    return {"model": config.model, "formats": [asdict(answer) for answer in answers]}


def asked(model: Any, tokenizer: Any, folder: Folder, exporters: Sequence[Exporter]) -> list[Answer]:
    """What formats make of a model that was loaded from a folder, in their order."""
    adapter = _adapter(folder)
    beside = [each for each in exporters if each.unmerged == "beside"]
    answers: dict[str, Answer] = {}
    for some in ([each for each in exporters if each not in beside], beside):
        if some is beside and adapter is not None:
            settle_quantizers(model)
        subject = Subject(matrices=_matrices(model, adapter), model=model, tokenizer=tokenizer, adapter=adapter)
        answers |= {answer.format: answer for answer in survey(subject, some)}
    return [answers[each.name] for each in exporters]


def _matrices(model: Any, adapter: Adapter | None) -> dict[str, Callable[[], QuantWeight]]:
    """A function for each quantized layer that gives its matrix: merged with its adapter, if that merges."""
    if adapter is None:
        return {name: partial(getattr, layer, "quant_weight") for name, layer in quantized_layers(model).items()}
    merges = adapter.exactness != "none"
    found = {
        name: layer.merged_weight if merges else layer.first_weight for name, layer in adapted_layers(model).items()
    }
    for name, layer in quantized_layers(base_of(model)).items():  # those without an adapter
        found.setdefault(name.removesuffix(".base_layer"), partial(getattr, layer, "quant_weight"))
    return found
