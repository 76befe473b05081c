"""`quadapt report`: a page for a browser about one run, or about a comparison that has been made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quadapt.config import EvalConfig, ReportConfig, checked
from quadapt.errors import CheckpointError, ConfigError, QuadaptError, require
from quadapt.files import sweep, writing
from quadapt.hf.folder import Folder, find_base, open_folder
from quadapt.hf.notes import NOTE
from quadapt.hf.outputs import check_disk, check_output
from quadapt.hf.reading import read_json
from quadapt.jobs.cells import figures_of, training_of
from quadapt.jobs.compare import PAGE, RESULT
from quadapt.jobs.evaluate import evaluate
from quadapt.jobs.identity import inputs_of
from quadapt.report.ui import UI
from quadapt.report.weights import weights_of


def report(config: ReportConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt report` and return what the page shows.

    Raises:
        QuadaptError: The folder is none that quadapt has written, or the page cannot be made; see the message.
    """
    require("plotly", "report")
    from quadapt.report.page import page

    comparison = _comparison(Path(config.run))
    own = Path(config.run) / PAGE if comparison else Path(f"{config.run.rstrip('/')}.html")
    output = Path(config.output) if config.output else own
    if comparison is None or config.output:
        check_output(output, overwrite=config.overwrite, inputs=inputs_of(config), folder=False)
    check_disk(output.parent, 0)
    if comparison is not None and config.data:
        raise ConfigError("data: a comparison has its own, on which all of its models were measured. Leave it out")
    result = comparison or _of_a_run(config, ui)
    output.parent.mkdir(parents=True, exist_ok=True)
    sweep(output.parent)
    with writing(output) as temporary:
        temporary.write_text(page(result), encoding="utf-8")
    for each in result.get("left_out", ()):
        ui.say(f"left out: {each}")
    ui.say(f"wrote {output}")
    return {**result, "output": str(output)}


def _comparison(folder: Path) -> dict[str, Any] | None:
    """The figures of a comparison; None if the folder is something else.

    Raises:
        CheckpointError: It is a comparison that has not come to its end.
    """
    if not (folder / NOTE).exists() or read_json(folder / NOTE).get("kind") != "comparison":
        return None
    if not (folder / RESULT).exists():
        raise CheckpointError(f"{str(folder)!r}: the comparison is not finished. Give its own command again")
    return read_json(folder / RESULT)


def _of_a_run(config: ReportConfig, ui: UI) -> dict[str, Any]:
    """What is known of a folder that tune or merge has written."""
    folder = open_folder(config.run)
    note, left_out = folder.note, list[str]()
    if folder.kind == "model" or not note:
        raise CheckpointError(
            f"{config.run!r} is no run: quadapt has written nothing about it. Give a folder that tune, merge or "
            "compare has written"
        )
    trained = note if folder.kind == "adapter" else note.get("trained") or {}
    method = str(trained.get("method") or note.get("made", {}).get("method") or "a quantized model")
    point: dict[str, Any] = {
        "key": method,
        "label": method if folder.kind == "adapter" else f"{method}, merged" if note.get("certificate") else method,
        "method": method,
        "route": "as trained" if folder.kind == "adapter" else "merged",
        **_sizes(folder),
        **_weights(folder, left_out, ui),
    }
    if folder.kind == "adapter":
        point |= {name: value for name, value in training_of(note).items() if name != "bits"}
        point["rate"] = note.get("recipe", {}).get("learning_rate")
    if note.get("certificate"):
        layers = note["certificate"]["layers"]
        changed = sum(layer["codes_changed"] for layer in layers)
        point["certificate"] = {**note["certificate"], "codes_changed": changed}
    if config.data:
        asked = {"model": config.run, "data": config.data, "limit": config.limit, "samples": config.samples}
        figures = figures_of(evaluate(checked(EvalConfig, asked), ui))
        point |= {**figures, "losses": [figures["loss"]]}
    else:
        left_out.append("loss and samples, for which data are needed: --data FILE")
    settings = note.get("settings") or {}
    data = trained.get("data") or settings.get("data") or []
    return {
        "kind": "quadapt run",
        "model": Path(config.run).name,
        "method": method,
        "data": [data] if isinstance(data, str) else [data["source"]] if isinstance(data, Mapping) else list(data),
        "steps": trained.get("steps"),
        "rank": (trained.get("recipe") or {}).get("rank"),
        "versions": note.get("versions") or {},
        "points": [point],
        "left_out": left_out,
    }


def _sizes(folder: Folder) -> dict[str, Any]:
    """True bits and bytes of what is served."""
    bits, size = folder.note.get("bits") or {}, _bytes(folder.path)
    if folder.kind == "adapter":
        return {"bits": bits.get("with_adapter", 0.0), "bytes": size + _bytes(Path(_base(folder) or ""))}
    return {"bits": bits.get("merged") or folder.note.get("bits_per_weight", 0.0), "bytes": size}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.name else 0


def _base(folder: Folder) -> str | None:
    try:
        return find_base(folder)
    except CheckpointError:  # it has been moved: the rest can still be shown
        return None


def _weights(folder: Folder, left_out: list[str], ui: UI) -> dict[str, Any]:
    """Errors and codes of the layers, if the dense model is where it was."""
    model = _base(folder) if folder.kind == "adapter" else folder.name
    made = {} if model is None else open_folder(model).note.get("made") or {}
    source = made.get("source") or (folder.note.get("settings") or {}).get("model")
    if model is None or source is None or open_folder(model).kind != "quantized":
        left_out.append("errors of layers and codes: there is no quantized model to compare. Merge the adapter first")
        return {}
    ui.say(f"comparing the weights with those of {source}")
    try:
        return weights_of(source, model)
    except QuadaptError as error:
        left_out.append(f"errors of layers and codes: {error}")
        return {}
