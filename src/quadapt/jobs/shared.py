"""What `quadapt tune` makes before an adapter trains, shared by runs that differ in the adapter's training alone.

A search for a learning rate would otherwise quantize the same model again for every rate.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from quadapt.config import TuneConfig
from quadapt.files import remove
from quadapt.hf.start import GRIDS, START
from quadapt.jobs.first import TUNED
from quadapt.jobs.identity import job_of

MADE = (TUNED, "base", START, GRIDS)
"""Names, within an output in the making, of what is made before the adapter trains."""

_RATES = {"learning_rate", "grid_learning_rate", "also_learning_rate"}
_TRAINING = {
    *("max_steps", "epochs", "batch_size", "gradient_accumulation", "schedule", "warmup_ratio", "weight_decay"),
    *("max_grad_norm", "dropout", "alpha"),
}
"""Settings that a base does not depend on, unless the dense model is tuned before it is quantized."""


class Shared:
    """A folder of bases and tuned dense models, by what they depend on.

    Args:
        folder: Where they are kept; it is made when there is something to keep.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, config: TuneConfig) -> Path:
        """The folder of what is made before the adapter of a run trains."""
        job = job_of("shared", config)
        left_out = _RATES | (set() if config.spec.method.tune_first.tunes else _TRAINING)
        settings = {name: value for name, value in job["settings"].items() if name not in left_out}
        inputs = {name: value for name, value in job["inputs"].items() if name != "eval_data"}
        about = json.dumps([settings, inputs, job["version"]], sort_keys=True)
        return self.folder / hashlib.sha256(about.encode()).hexdigest()[:16]


def bring(shared: Shared | None, config: TuneConfig, making: Path) -> None:
    """Put what an earlier run has made into an output in the making, as far as it is not there."""
    kept = None if shared is None else shared.of(config)
    if kept is None or not kept.exists():
        return
    for item in kept.iterdir():
        if not (making / item.name).exists():
            _copy(item, making / item.name)


def keep(shared: Shared | None, config: TuneConfig, making: Path) -> None:
    """Keep what a run has made for the next one."""
    kept = None if shared is None else shared.of(config)
    found = [making / name for name in MADE if (making / name).exists()]
    if kept is None or kept.exists() or not found:
        return
    new = kept.with_name(f"{kept.name}.partial")
    remove(new)
    new.mkdir(parents=True)
    for item in found:
        _copy(item, new / item.name)
    os.rename(new, kept)


def _copy(item: Path, to: Path) -> None:
    """Give a file or a folder a second name, or copy it where a file cannot have two; it appears whole.

    What is written here is never changed in place, so that two names for one file are as good as a copy.
    """
    new = to.with_name(f"{to.name}.shared")
    remove(new)
    if item.is_dir():
        shutil.copytree(item, new, copy_function=_link)
    else:
        _link(str(item), str(new))
    os.rename(new, to)


def _link(one: str, other: str) -> None:
    try:
        os.link(one, other)
    except OSError:
        shutil.copy2(one, other)
