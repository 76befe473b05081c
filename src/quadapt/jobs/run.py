"""`quadapt run`: a whole job from one file, stage after stage; a stage that is finished is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadapt.config import EvalConfig, ExportConfig, MergeConfig, RunConfig, Settings, TuneConfig, checked
from quadapt.errors import ConfigError
from quadapt.exporters.formats import EXPORTERS
from quadapt.files import remove, sweep, write_json
from quadapt.hf.folder import find_base, open_folder
from quadapt.hf.notes import FORM, JOB, NOTE, differences, mark
from quadapt.hf.reading import read_json
from quadapt.jobs.evaluate import evaluate
from quadapt.jobs.export import export
from quadapt.jobs.identity import job_of
from quadapt.jobs.merge import merge
from quadapt.jobs.tune import tune
from quadapt.report.ui import UI


@dataclass(frozen=True)
class Stage:
    """One command of a job, and the file that remembers what it did."""

    name: str
    """The name of the command, which is that of its section in the job file."""

    settings_type: type[Settings]
    """The class of the command's settings."""

    work: Callable[[Any, UI], dict[str, Any]]
    """The function that runs the command."""

    output: Path
    """What it writes, all or nothing."""

    settings: Any
    """The settings of the command, already checked."""

    @property
    def stamp(self) -> Path:
        """The file beside the output in which the stage's job and result are kept."""
        return self.output.with_name(f".{self.name}.json")

    def job(self) -> dict[str, Any]:
        """What it is to do, and with what: the base of an adapter belongs to that."""
        more, base = {}, getattr(self.settings, "base", None)
        for name in (getattr(self.settings, "adapter", None), getattr(self.settings, "model", None)):
            if name is not None and (Path(name) / "adapter_config.json").exists():
                more["base of it"] = find_base(open_folder(name), base)
        return job_of(self.name, self.settings, self.before().get("job"), **more)

    def before(self) -> dict[str, Any]:
        """What the last call left in the stamp: its job, and its result if it came to an end."""
        return read_json(self.stamp) if self.stamp.exists() else {}

    def changes(self) -> list[str]:
        """What differs from the last call, in words."""
        return differences({"form": 1, **self.before()}, {"form": FORM, "job": self.job()})

    def result(self) -> dict[str, Any] | None:
        """The result, if the stage has been done with these settings and inputs."""
        before = self.before()
        if not self.output.exists() or self.changes():
            return None
        if "result" in before or (self.output / JOB).exists() or mark(self.output) == before.get("replaces"):
            return before.get("result")
        if self.output.is_dir() and (self.output / NOTE).exists():  # it was killed right after its last step
            return {"output": str(self.output), **read_json(self.output / NOTE)}
        return read_json(self.output) if self.output.suffix == ".json" else None

    def stamped(self, job: Mapping[str, Any], **more: Any) -> None:
        """Note the job, and how far it has come."""
        write_json(self.stamp, {"form": FORM, "job": job, **more})


def run(config: RunConfig, where: str, ui: UI) -> dict[str, Any]:
    """Run the job. All stages' settings are checked before the first one starts.

    Raises:
        QuadaptError: A setting is wrong (named with its section), or a stage cannot be done.
    """
    folder = Path(config.output)
    stages = stages_of(config, folder, where)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    if config.overwrite and all(stage.result() is not None for stage in stages):
        for stage in stages:
            remove(stage.stamp)
    return {stage.name: _done(stage, config, ui) for stage in stages}


def stages_of(config: RunConfig, folder: Path, where: str) -> list[Stage]:
    """The stages of a job, with all of their settings checked.

    Args:
        config: The job.
        folder: The folder that the stages write into.
        where: The name of the job file, for what is said of wrong settings.

    Raises:
        ConfigError: A setting is wrong; the message has its section.
    """
    adapter, merged = folder / "adapter", folder / "merged"
    model = str(merged if config.merge is not None else adapter)
    format = (config.export or {}).get("format", "gguf")
    file = EXPORTERS[format].place if isinstance(format, str) and format in EXPORTERS else "export"
    rows: list[tuple[str, type[Settings], Callable[[Any, UI], dict[str, Any]], Path, dict[str, str]]] = [
        ("tune", TuneConfig, tune, adapter, {}),
        ("merge", MergeConfig, merge, merged, {"adapter": str(adapter)}),
        ("eval", EvalConfig, evaluate, folder / "eval.json", {"model": model}),
        ("export", ExportConfig, export, folder / file, {"model": model}),
    ]
    stages = []
    for name, cls, work, output, inputs in rows:
        section = getattr(config, name)
        if section is not None:
            settings = _checked(cls, section, {**inputs, "output": str(output)}, f"{where}: {name}.")
            stages.append(Stage(name, cls, work, output, settings))
    return stages


def _checked(cls: type[Settings], section: Mapping[str, Any], fixed: Mapping[str, str], where: str) -> Settings:
    """The settings of a stage; what it reads and where it writes is the job's own affair."""
    for name in fixed:
        if name in section:
            raise ConfigError(f"{where}{name} is not a setting: the job's stages hand it on. Leave it out")
    settings = checked(cls, {**section, **fixed}, where)
    if isinstance(settings, TuneConfig):
        try:
            _ = settings.spec
        except ConfigError as error:  # said before any work, and where it is
            raise ConfigError(f"{where}{error}") from None
    return settings


def _done(stage: Stage, config: RunConfig, ui: UI) -> dict[str, Any]:
    """Do a stage, unless it has been done with the same settings and inputs."""
    result, job = stage.result(), stage.job()
    if result is not None:
        if "result" not in stage.before():  # it was killed right after its last step
            stage.stamped(job, result=result)
        ui.say(f"{stage.name}: done before")
        return result
    if stage.output.exists() and not config.overwrite:
        if not stage.stamp.exists():
            raise ConfigError(f"{str(stage.output)!r} exists. Use overwrite: true to replace it, or another output")
        if stage.name == "tune" and stage.changes():
            raise ConfigError(
                f"{str(stage.output)!r} was trained with other settings or data ({'; '.join(stage.changes())}). Use "
                "overwrite: true to train again, or another output"
            )
    ui.say(f"{stage.name} ..")
    if "replaces" not in stage.before() or stage.changes():
        stage.stamped(job, replaces=mark(stage.output))
    # What was trained is never given up on the way; what follows from it is made anew.
    overwrite = config.overwrite or stage.name != "tune"
    result = stage.work(stage.settings.model_copy(update={"overwrite": overwrite}), ui)
    stage.stamped(job, result=json.loads(json.dumps(result, default=str)))
    return result
