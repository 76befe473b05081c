"""`quadapt eval`: the figures of a model's task on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quadapt.config import EvalConfig
from quadapt.files import sweep
from quadapt.hf.context import MOST_CONTEXT, positions_of
from quadapt.hf.folder import open_folder
from quadapt.hf.workspace import check_disk, check_output, write_json
from quadapt.jobs.benchmarks import by_tasks
from quadapt.jobs.identity import inputs_of
from quadapt.jobs.source import load_as_asked
from quadapt.jobs.tasking import kind_in, noted_task, reading_of
from quadapt.report.ui import UI
from quadapt.tasks import Asking


def evaluate(config: EvalConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt eval` and return its figures.

    Raises:
        QuadaptError: Input cannot be used, see the message.
    """
    if config.output:
        check_output(Path(config.output), overwrite=config.overwrite, inputs=inputs_of(config), folder=False)
        check_disk(Path(config.output).parent, 0)
    result = by_tasks(config, ui) if config.tasks else _on_rows(config, ui)
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        sweep(Path(config.output).parent)
        write_json(Path(config.output), result, overwrite=config.overwrite)
    return result


def _on_rows(config: EvalConfig, ui: UI) -> dict[str, Any]:
    """The figures of the model's own task on rows of data."""
    note = {} if config.model.endswith(".gguf") else open_folder(config.model).note
    code = config.trust_remote_code
    task = noted_task(note, kind_in(config.model, config.base, trust_remote_code=code))
    rows = task.read(config.data, reading_of(config, note.get("settings")), held_out=True)
    for word in (*rows.notes, *rows.bad.notes()):
        ui.say(word)
    if config.limit is not None:
        rows = rows.select(range(min(config.limit, len(rows))))
    model, tokenizer = load_as_asked(config)
    asking = Asking(
        batch_size=config.batch_size,
        length=config.context or task.length(positions_of(model), MOST_CONTEXT),
        stride=config.stride,
        protocol=config.protocol,
        max_new_tokens=config.max_new_tokens,
        samples=config.samples,
        prompt_form=config.prompt_form,
        system=config.system,
        note=note,
        progress=lambda label: lambda batches: ui.over(label, batches),
        show=ui.show,
    )
    about = {"kind": "quadapt eval", "model": config.model, "data": rows.source}
    return {**about, **task.measure(model, tokenizer, rows, asking)}
