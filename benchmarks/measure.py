"""Time several things in turn, so that a machine whose speed drifts slows all of them alike; store what was found."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
THREADS = 2


class Kept:
    """Runs that take long, in a JSON file: given again, a script goes on with what is missing.

    Args:
        name: Of the file in `results`.
        about: Settings; runs of other settings do not count.
        make: Makes a run of its key.
    """

    def __init__(self, name: str, about: dict[str, Any], make: Callable[..., dict[str, Any]]) -> None:
        self.path, self.about, self.make = RESULTS / f"{name}.json", about, make
        self.runs = self._stored()

    def _stored(self) -> dict[str, Any]:
        """The runs of these settings that the file has."""
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        runs: dict[str, Any] = found.get("runs", {}) if found.get("about") == self.about else {}
        return runs

    def get(self, *key: Any) -> dict[str, Any]:
        """A run, made now if it is missing."""
        name = " ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in key)
        if name not in self.runs:
            made = self.make(*key)
            self.runs = {**self._stored(), name: made}  # another process may have added some meanwhile
            content = {"environment": environment(), "about": self.about, "runs": self.runs}
            RESULTS.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(content, indent=1) + "\n")
            found = self.runs[name].items()
            print(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in found if isinstance(v, float)), flush=True)
        return self.runs[name]


def in_turn(candidates: Mapping[str, Callable[[], object]], rounds: int = 9, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each candidate in each round: A B C, A B C, .."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, work in candidates.items():
            start = time.perf_counter()
            work()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(mine / theirs for mine, theirs in zip(times[name], times[base], strict=True))


def environment() -> dict[str, Any]:
    """Versions, machine and commit."""
    packages = {}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "numba", "safetensors"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    commit = os.environ.get("COMMIT") or head  # the sources may be a copy and no clone
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--", "../src"], capture_output=True, text=True, check=False
    ).stdout.strip()
    processor = (
        next(
            (
                line.partition(":")[2].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    return {
        "packages": packages,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor,
        "threads": torch.get_num_threads(),
        "commit": commit,
        "uncommitted_changes": bool(dirty),
    }


def store(name: str, figures: Mapping[str, Any]) -> None:
    """Write `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"environment": environment(), **figures}, indent=2) + "\n")


def table(title: str, columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """Print a table."""
    cells = [tuple(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row) for row in rows]
    widths = [max(len(row[index]) for row in [columns, *cells]) for index in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
