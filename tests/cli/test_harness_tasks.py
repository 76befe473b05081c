"""`quadapt eval --tasks`: an adapter and what it merges to have the same figures, in the harness's own JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import give, quadapt

pytest.importorskip("lm_eval", reason="comes with the extra eval")


@pytest.fixture
def bench(tmp_path: Path) -> str:
    """A folder with questions of PIQA."""
    rows = [
        {
            "instruction": f"Please choose the correct solution to the question: {at}?\n\nSolution1: the fox {at}\n\n"
            f"Solution2: {at} swim\n\nAnswer format: solution1/solution2",
            "answer": f"solution{1 + at % 2}",
        }
        for at in range(12)
    ]
    (tmp_path / "piqa").mkdir()
    for split in ("train", "test"):
        (tmp_path / "piqa" / f"{split}.json").write_text(json.dumps(rows))
    return str(tmp_path)


def test_an_adapter_and_its_merged_model_have_the_same_figures(
    shelf: dict[str, dict[str, Any]], bench: str, here: Path, tmp_path: Path
) -> None:
    assert (here / "merged").is_dir()
    assert shelf["merged"]["certificate"]["verdict"] == "exact"
    file = tmp_path / "found.json"
    words = ("--tasks", "piqa", "--task-files", bench, "--few-shot", 1)
    adapter = quadapt("eval", "adapter", *words, "--output", file)
    merged = quadapt("eval", "merged", *words)
    assert adapter["results"] == merged["results"]
    assert adapter["n-shot"] == {"piqa": 1}
    written = json.loads(file.read_text())
    assert (written["kind"], written["results"]) == ("quadapt eval", adapter["results"])
    assert {"configs", "versions", "n-samples", "lm_eval_version", "config"} <= set(written)
    said = give("eval", "merged", *words, code=0)
    assert "Loglikelihood" not in said.err
    assert "acc_norm" in said.out


def test_files_that_are_not_there_are_said_before_the_model_is_loaded(here: Path, tmp_path: Path) -> None:
    said = give("eval", here / "dense", "--tasks", "hellaswag", "--task-files", tmp_path, code=2)
    assert "hellaswag is looked for as hellaswag/test.json, in any folder below" in said.error
