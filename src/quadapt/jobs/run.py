"""`quadapt run`: a whole job from one file, stage after stage; a stage that is finished is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadapt.config import EvalConfig, ExportConfig, MergeConfig, RunConfig, Settings, TuneConfig, checked
from quadapt.errors import ConfigError
from quadapt.hf.reading import read_json
from quadapt.hf.workspace import remove, write_json
from quadapt.jobs.evaluate import evaluate
from quadapt.jobs.export import export
from quadapt.jobs.merge import merge
from quadapt.jobs.source import job_of
from quadapt.jobs.tune import tune
from quadapt.report.ui import UI

SUFFIX = {"gguf": "model.gguf", "hf": "dense", "lora": "lora"}
"""Names of exports inside the job's folder."""


@dataclass(frozen=True)
class Stage:
    """One command of a job, and the file that remembers what it did."""

    name: str
    """Its section in the job file."""

    kind: type[Settings]
    """Of its settings."""

    work: Callable[[Any, UI], dict[str, Any]]
    """The command."""

    output: Path
    """What it writes, all or nothing."""

    settings: Any
    """Checked."""

    @property
    def stamp(self) -> Path:
        """Where its job and its result are kept."""
        return self.output.with_name(f".{self.name}.json")

    def job(self) -> dict[str, Any]:
        """What it is to do, and with what."""
        names = ("model", "adapter", "data", "eval_data", "calibration_data")
        given = [getattr(self.settings, name, None) or () for name in names]
        inputs = [name for each in given for name in ([each] if isinstance(each, str) else each)]
        return dict(json.loads(json.dumps(job_of(self.name, self.settings.model_dump(mode="json"), inputs))))

    def before(self) -> dict[str, Any]:
        """What the last call left in the stamp: its job, and its result if it came to an end."""
        return read_json(self.stamp) if self.stamp.exists() else {}

    def result(self) -> dict[str, Any] | None:
        """The result, if the stage has been done with these settings and inputs."""
        before = self.before()
        return before.get("result") if self.output.exists() and before.get("job") == self.job() else None


def run(config: RunConfig, where: str, ui: UI) -> dict[str, Any]:
    """Run the job. All stages' settings are checked before the first one starts.

    Raises:
        QuadaptError: A setting is wrong (named with its section), or a stage cannot be done.
    """
    folder = Path(config.output)
    stages = _stages(config, folder, where)
    folder.mkdir(parents=True, exist_ok=True)
    if config.overwrite and all(stage.result() is not None for stage in stages):
        for stage in stages:
            remove(stage.stamp)
    return {stage.name: _done(stage, config, ui) for stage in stages}


def _stages(config: RunConfig, folder: Path, where: str) -> list[Stage]:
    adapter, merged = folder / "adapter", folder / "merged"
    model = str(merged if config.merge is not None else adapter)
    file = SUFFIX.get((config.export or {}).get("format", "gguf"), "export")
    rows: list[tuple[str, type[Settings], Callable[[Any, UI], dict[str, Any]], Path, dict[str, str]]] = [
        ("tune", TuneConfig, tune, adapter, {}),
        ("merge", MergeConfig, merge, merged, {"adapter": str(adapter)}),
        ("eval", EvalConfig, evaluate, folder / "eval.json", {"model": model}),
        ("export", ExportConfig, export, folder / file, {"model": model}),
    ]
    stages = []
    for name, kind, work, output, inputs in rows:
        section = getattr(config, name)
        if section is not None:
            settings = _checked(kind, section, {**inputs, "output": str(output)}, f"{where}: {name}.")
            stages.append(Stage(name, kind, work, output, settings))
    return stages


def _checked(kind: type[Settings], section: Mapping[str, Any], fixed: Mapping[str, str], where: str) -> Settings:
    """The settings of a stage; what it reads and where it writes is the job's own affair."""
    for name in fixed:
        if name in section:
            raise ConfigError(f"{where}{name} is not a setting: the job's stages hand it on. Leave it out")
    settings = checked(kind, {**section, **fixed}, where)
    if isinstance(settings, TuneConfig):
        settings.chosen_method()
    return settings


def _done(stage: Stage, config: RunConfig, ui: UI) -> dict[str, Any]:
    """Do a stage, unless it has been done with the same settings and inputs."""
    result, job = stage.result(), stage.job()
    if result is not None:
        ui.say(f"{stage.name}: done before")
        return result
    if stage.name == "tune" and stage.output.exists() and stage.before().get("job") != job and not config.overwrite:
        raise ConfigError(
            f"{str(stage.output)!r} was trained with other settings or data. Use overwrite: true to train again, or "
            "another output"
        )
    ui.say(f"{stage.name} ..")
    write_json(stage.stamp, {"job": job})
    settings = stage.settings.model_copy(update={"overwrite": True} if "overwrite" in stage.kind.model_fields else {})
    result = stage.work(settings, ui)
    write_json(stage.stamp, {"job": job, "result": json.loads(json.dumps(result, default=str))})
    return result
