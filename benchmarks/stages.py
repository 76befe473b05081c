"""Stages of `quadapt tune` that runs have in common, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from quadapt.config import TuneConfig
from quadapt.jobs.first import tuned_first
from quadapt.jobs.tune import _make_base
from quadapt.methods import Run


class Stages:
    """What `tune` makes before the adapter trains, kept for runs that differ in the adapter's rate alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def shared(self, name: str) -> Iterator[None]:
        """Within it, stages that were made under this name are copied into the output in the making."""

        def first(config: TuneConfig, space: Any, *rest: Any, **more: Any) -> Any:
            run = next(each for each in rest if isinstance(each, Run))
            own = f"first-{run.seed}-{run.max_steps}"  # of another width it may have another share of the steps
            return self._once(own, space.path, lambda: tuned_first(config, space, *rest, **more))

        def base(path: Path, *rest: Any) -> Any:
            return self._once(name, path, lambda: _make_base(path, *rest))

        tune_job = import_module("quadapt.jobs.tune")
        with patch.object(tune_job, "tuned_first", first), patch.object(tune_job, "_make_base", base):
            yield

    def _once(self, name: str, path: Path, make: Callable[[], Any]) -> Any:
        """What `make` gives; the files that it adds to the output in the making are kept, and put there beforehand."""
        kept = self.folder / name
        if kept.exists():
            shutil.copytree(kept, path, dirs_exist_ok=True)
            return make()  # finds them, and goes on with them
        before = {item.name for item in path.iterdir()}
        found = make()
        kept.mkdir(parents=True)
        for item in path.iterdir():
            if item.name not in before:
                (shutil.copytree if item.is_dir() else shutil.copyfile)(item, kept / item.name)
        return found
