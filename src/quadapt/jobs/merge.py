"""`quadapt merge`: an adapter into its quantized base, with a certificate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quadapt.calibrate import Batch
from quadapt.config import MergeConfig
from quadapt.data import Calibration
from quadapt.errors import CheckpointError, QuadaptError
from quadapt.hf.compressed import attach
from quadapt.hf.context import MOST_CONTEXT, positions_of
from quadapt.hf.folder import Folder, find_base, open_folder
from quadapt.hf.kinds import KINDS, kind_of_model
from quadapt.hf.loading import holder_of, load_model, load_processor, over_any_base
from quadapt.hf.merge import Certificate
from quadapt.hf.merge import merge as merge_model
from quadapt.hf.quantizer import base_config
from quadapt.hf.reading import reading
from quadapt.hf.saving import save_quantized
from quadapt.hf.workspace import Workspace, check_output
from quadapt.jobs.adapt import true_bits
from quadapt.jobs.identity import earlier_job, inputs_of, job_of
from quadapt.jobs.publish import publishes
from quadapt.jobs.source import device_of
from quadapt.jobs.tasking import noted_task, reading_of
from quadapt.model.quantize import bits_of
from quadapt.model.trial import check_runs
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest
from quadapt.report.ui import UI


@publishes
def merge(config: MergeConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt merge` and return the certificate with the sizes.

    Raises:
        QuadaptError: Input cannot be used, or the adapter cannot merge; see the message.
    """
    folder = adapter_folder(config.adapter)
    where = find_base(folder, config.base)
    output = Path(config.output)
    check_output(output, overwrite=config.overwrite, inputs=[*inputs_of(config), where])
    job = job_of("merge", config, earlier_job(output), base=where)
    needs = sum(file.stat().st_size for file in Path(where).glob("*.safetensors")) if Path(where).is_dir() else 0
    with Workspace(output, job, overwrite=config.overwrite, needs=int(1.2 * needs), keeps=False) as space:
        if space.finished is not None:
            return space.finished
        model, tokenizer = load_adapted(folder, where, config)
        bits = true_bits(model)
        probe, name = _probe(config, folder, tokenizer, model, ui)
        rounding = None
        if config.requantize:
            rounding = GPTQ(range=config.range) if config.rounding == "gptq" else Nearest(range=config.range)
        batches = [] if rounding is None or not rounding.needs else _calibration(config, folder, tokenizer, model)
        with over_any_base(config.any_base):
            merged, certificate = merge_model(
                model,
                probe=probe,
                probe_name=name,
                requantize=rounding,
                batches=batches,
                progress=lambda layers: ui.over("merging", layers),
            )
        check_runs(merged)
        note = _note(merged, certificate, folder, bits)
        save_quantized(merged, tokenizer, space.path, note)
        result = {"output": config.output, **note}
        space.commit(result=result)
    ui.show(str(certificate))
    ui.show(
        f"{note['bits']['merged']:.3f} true bits per quantized weight after the merge, {bits['base']:.3f} before "
        f"({bits['with_adapter']:.3f} with the adapter)"
    )
    kind = kind_of_model(merged)
    further = "export {} --format gguf --output FILE" if kind is None or kind.writes else "eval {} --data FILE"
    ui.say(f"wrote {config.output}. Next: quadapt {further.format(config.output)}")
    return result


def adapter_folder(name: str) -> Folder:
    """Open the folder of an adapter that is to be worked on.

    Raises:
        CheckpointError: It is something else, or not there.
    """
    folder = open_folder(name)
    if folder.kind != "adapter":
        raise CheckpointError(f"{name!r} is a {folder.kind} model, not an adapter. Give the folder that tune wrote")
    return folder


def load_adapted(folder: Folder, where: str, config: Any) -> tuple[nn.Module, Any]:
    """The PEFT model of an adapter folder, and its tokenizer.

    Raises:
        CheckpointError: The base is another one than the adapter was trained over, or something is damaged.
    """
    trained = folder.note.get("settings", {}).get("dtype", "auto")
    dtype = trained if config.dtype == "auto" else config.dtype
    base = load_model(where, dtype=dtype, device=device_of(config), trust_remote_code=config.trust_remote_code)
    with over_any_base(config.any_base):
        model: Any = reading(folder.name, attach, base, folder.path)
    holder, code = holder_of(folder, where), config.trust_remote_code
    return model.eval(), load_processor(holder, kind_of_model(base), trust_remote_code=code)


def _probe(config: MergeConfig, folder: Folder, tokenizer: Any, model: nn.Module, ui: UI) -> tuple[Batch | None, str]:
    """What to compare the models on: the data given, or the training data if it is still there."""
    sources, _ = _sources(config, folder)
    if not sources or not (config.data or all(Path(source).exists() for source in sources)):
        return None, ""
    try:
        found = _examples(config, folder, tokenizer, model, length=min(128, positions_of(model)), sequences=2)
    except QuadaptError as error:
        if config.data:
            raise
        ui.say(f"comparing on random tokens, since the training data cannot be read: {error}")
        return None, ""
    first = found.batches[0]
    words = f"{found.tokens} tokens" if isinstance(first, Tensor) else f"{found.sequences} examples"
    return first, f"{words} of {found.source}"


def _sources(config: MergeConfig, folder: Folder) -> tuple[list[str], int | None]:
    """Data given, or that was trained on; and how many of its rows may be bad."""
    settings = folder.note.get("settings", {})
    trained = settings.get("data") or []
    if config.data:
        return list(config.data), None
    return [trained] if isinstance(trained, str) else list(trained), settings.get("max_bad_rows")


def _examples(
    config: MergeConfig, folder: Folder, tokenizer: Any, model: nn.Module, *, length: int, sequences: int
) -> Calibration:
    """Batches of the data given, or of the training data, as the adapter's task makes them."""
    sources, most = _sources(config, folder)
    task = noted_task(folder.note, kind_of_model(model) or KINDS["causal-lm"])
    reading = replace(reading_of(config, folder.note.get("settings")), max_bad_rows=most)
    rows = task.read(sources, reading)
    return task.calibration(rows, tokenizer, model, length=length, sequences=sequences, at_least=None, reading=reading)


def _calibration(config: MergeConfig, folder: Folder, tokenizer: Any, model: nn.Module) -> list[Batch]:
    if not _sources(config, folder)[0]:
        raise CheckpointError("rounding='gptq' needs text to calibrate on. Give --data FILE")
    length = min(MOST_CONTEXT, positions_of(model))
    return _examples(config, folder, tokenizer, model, length=length, sequences=128).batches


def _note(merged: nn.Module, certificate: Certificate, folder: Folder, bits: dict[str, float]) -> dict[str, Any]:
    layouts = list(base_config(merged).layouts.values())
    settings = folder.note.get("settings") or {}
    columns = {name: settings[name] for name in ("text_column", "label_column") if settings.get(name)}
    return {
        **({"task": folder.note["task"]} if folder.note.get("task") else {}),
        **({"settings": columns} if columns else {}),
        "made": dict(base_config(merged).made),
        "left": base_config(merged).left,
        "bits_per_weight": bits_of(layouts),
        "bits": {**bits, "merged": bits_of(layouts)},
        "certificate": certificate.as_dict(),
        "prompt": folder.note.get("prompt"),
        "trained": {
            **{name: folder.note.get(name) for name in ("method", "recipe", "steps")},
            "data": settings.get("data"),
        },
    }
