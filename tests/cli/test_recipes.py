"""The recipes of papers: their settings are allowed, and each runs on a tiny model with a few of them replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import quadapt

from quadapt.config import read_job
from quadapt.jobs.run import stages_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

SMALL: dict[str, Any] = {
    "output": "job",
    "tune.model": "dense",
    "tune.data": "sums.jsonl",
    "tune.max_steps": 2,
    "tune.seq_len": 32,
    "tune.rank": 2,
    "tune.batch_size": 2,
    "tune.gradient_accumulation": 1,
    "tune.calibration_length": 16,
    "tune.calibration_sequences": 2,
    "eval": "{data: sums.jsonl, max_new_tokens: 2}",
}
"""What is replaced; tasks of the harness need another package, and are tested where it is."""


def test_there_are_recipes_of_five_papers() -> None:
    assert [path.stem.removesuffix("-alpaca") for path in RECIPES] == [
        "ir-qlora",
        "l4q",
        "lq-lora-c4",
        "qa-lora",
        "quailora",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_complete(path: Path, tmp_path: Path) -> None:
    """All of its settings are checked as a run would, and nothing that decides the result is left to a default."""
    job = read_job(str(path), [f"output={tmp_path}"])
    stages = {stage.name: stage.settings for stage in stages_of(job, tmp_path, str(path))}
    assert {"tune", "eval"} <= set(stages)
    assert {"method", "bits", "group_size", "learning_rate", "rank", "alpha", "batch_size", "seq_len", "seed"} <= set(
        job.tune
    )
    assert {"max_steps", "epochs"} & set(job.tune)
    assert "Published" in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(path: Path, away: Path) -> None:
    changes = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    said = quadapt("run", path, *changes)
    assert said["eval"]["perplexity"]["tokens"] > 0
    assert (away / "job" / "adapter").is_dir()
