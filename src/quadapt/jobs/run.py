"""`quadapt run`: a whole job from one file, stage after stage; a stage that is finished is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quadapt.config import EvalConfig, ExportConfig, MergeConfig, RunConfig, TuneConfig, checked
from quadapt.hf.workspace import remove, write_json
from quadapt.jobs.evaluate import evaluate
from quadapt.jobs.export import export
from quadapt.jobs.merge import merge
from quadapt.jobs.source import job_of
from quadapt.jobs.tune import tune
from quadapt.report.ui import UI

SUFFIX = {"gguf": "model.gguf", "hf": "dense", "lora": "lora"}
"""Names of exports inside the job's folder."""


def run(config: RunConfig, where: str, ui: UI) -> dict[str, Any]:
    """Run the job. All stages' settings are checked before the first one starts.

    Raises:
        QuadaptError: A setting is wrong (named with its section), or a stage cannot be done.
    """
    folder = Path(config.output)
    adapter, merged = str(folder / "adapter"), str(folder / "merged")
    result = merged if config.merge is not None else adapter
    stages: list[tuple[str, Any, Callable[[Any, UI], dict[str, Any]], Path]] = []
    settings = checked(TuneConfig, {**config.tune, "output": adapter}, f"{where}: tune")
    settings.chosen_method()
    stages.append(("tune", settings, tune, folder / "adapter"))
    if config.merge is not None:
        stages.append(
            (
                "merge",
                checked(MergeConfig, {**config.merge, "adapter": adapter, "output": merged}, f"{where}: merge"),
                merge,
                folder / "merged",
            )
        )
    if config.eval is not None:
        output = folder / "eval.json"
        stages.append(
            (
                "eval",
                checked(EvalConfig, {**config.eval, "model": result, "output": str(output)}, f"{where}: eval"),
                evaluate,
                output,
            )
        )
    if config.export is not None:
        output = folder / SUFFIX.get(config.export.get("format", "gguf"), "export")
        stages.append(
            (
                "export",
                checked(ExportConfig, {**config.export, "model": result, "output": str(output)}, f"{where}: export"),
                export,
                output,
            )
        )
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _stage(name, settings, work, output, folder, config, ui) for name, settings, work, output in stages}


def _stage(
    name: str,
    settings: Any,
    work: Callable[[Any, UI], dict[str, Any]],
    output: Path,
    folder: Path,
    config: RunConfig,
    ui: UI,
) -> dict[str, Any]:
    """Do a stage, unless its output is there from the same settings and inputs."""
    stamp = folder / f"{name}.json" if output.name != f"{name}.json" else folder / f".{name}.json"
    inputs = [getattr(settings, field, None) for field in ("model", "adapter", "data", "eval_data", "calibration_data")]
    job = json.loads(json.dumps(job_of(name, settings.model_dump(mode="json"), inputs)))
    if output.exists() and stamp.exists() and not config.overwrite and json.loads(stamp.read_text())["job"] == job:
        ui.say(f"{name}: done before")
        return dict(json.loads(stamp.read_text())["result"])
    remove(output)
    ui.say(f"{name} ..")
    result = work(settings, ui)
    write_json(stamp, {"job": job, "result": json.loads(json.dumps(result, default=str))})
    return result
