"""Bits by budget, by commands alone: planned, kept to the bit, gone on with after a kill, refused where it must be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, give, logits, quadapt
from safetensors.torch import load_file, save_file

from quadapt import load
from quadapt.budget import BudgetPlan
from quadapt.config import TuneConfig
from quadapt.jobs import plan as job
from quadapt.quant.storage import STORAGES, Linear

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def made(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with `plan.json`, and what the command said."""
    folder = tmp_path_factory.mktemp("plan")
    return folder, quadapt("plan", place / "dense", "--budget", "3.3", "--rank", "2", "--output", folder / "plan.json")


def test_a_plan_is_kept_to_the_bit(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, said = made
    written = json.loads((folder / "plan.json").read_text())
    assert said["bits_per_weight"] == written["bits_per_weight"] <= said["budget"] == 3.3
    assert written["bits_per_weight"] > 3.2
    assert written["bound"] <= written["objective"]
    assert said["layers"] == len(written["layers"]) == 14
    dry = quadapt("quantize", "dense", "--plan", folder / "plan.json", "--output", tmp_path / "no", "--dry-run")
    made_ = quadapt("quantize", "dense", "--plan", folder / "plan.json", "--output", tmp_path / "q")
    inspected = quadapt("inspect", tmp_path / "q", "--verify")
    assert dry["bits_per_weight"] == made_["bits_per_weight"] == inspected["bits_per_weight"] == said["bits_per_weight"]
    assert made_["made"]["method"] == "lq-lora"  # of the plan
    for name, layer in written["layers"].items():
        assert inspected["layers"][name].startswith(f"nf{layer['format']['bits']}-g{layer['format']['group_size']}")
        assert isinstance(STORAGES[layer["storage"]["scales"]], Linear)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    parts = ("weight", "scales", "scales_largest", "scales_smallest")
    size = sum(stored[f"{name}.{part}"].nbytes for name in written["layers"] for part in parts)
    weights = sum(layer["out"] * layer["columns"] for layer in written["layers"].values())
    assert 8 * size / weights == said["bits_per_weight"]


def test_the_figure_shows_every_layer(made: tuple[Path, dict[str, Any]]) -> None:
    assert made[1]["figure"] == str(made[0] / "plan.png")
    assert (made[0] / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_figure_but_a_line(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    cache = ("--cache", made[0] / "plan-errors")
    said = give("plan", "dense", "--budget", "3.3", "--rank", "2", "-o", tmp_path / "plan.json", *cache, code=0)
    assert "no figure: matplotlib.figure is not installed" in said.err
    assert not (tmp_path / "plan.png").exists()
    assert "by kind of layer" in said.out
    assert "2 x down_proj" in said.out


def test_tune_trains_over_a_plan_and_exports(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    plan = ("--plan", made[0] / "plan.json")
    said = quadapt("tune", "dense", "--data", "story.txt", *plan, "--max-steps", "4", *SHORT, "--output", adapter)
    assert said["method"] == "lq-lora"
    assert said["bits"]["base"] == made[1]["bits_per_weight"]
    assert torch.isfinite(logits(load(adapter)[0])).all()
    quadapt("merge", adapter, "--requantize", "--output", tmp_path / "merged")
    assert quadapt("inspect", tmp_path / "merged")["bits_per_weight"] == made[1]["bits_per_weight"]
    for format in ("hf", "gguf"):
        quadapt("export", tmp_path / "merged", "--format", format, "--output", tmp_path / f"to-{format}")


def test_integers_are_planned_for_a_method_that_merges_into_them(tmp_path: Path) -> None:
    said = quadapt(
        "plan", "dense", "--budget", "3.5", "--method", "qa-lora", "--count-adapters", "fp16", "--rank", "2",
        "--output", tmp_path / "plan.json",
    )  # fmt: skip
    assert said["bits_per_weight"] < said["with_adapters"] <= 3.5
    tuned = quadapt(
        "tune", "dense", "--data", "story.txt", "--plan", tmp_path / "plan.json", "--max-steps", "4", *SHORT,
        "--calibration-length", "32", "--output", tmp_path / "adapter",
    )  # fmt: skip
    assert (tuned["method"], tuned["bits"]["base"]) == ("qa-lora", said["bits_per_weight"])
    merged = quadapt("merge", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert merged["certificate"]["verdict"] == "exact"
    assert quadapt("inspect", tmp_path / "merged")["bits_per_weight"] == said["bits_per_weight"]


def test_information_about_weights_moves_bits_to_those_that_matter(place: Path, tmp_path: Path) -> None:
    plain = quadapt("plan", "dense", "--budget", "3.3", "--method", "qlora", "--output", tmp_path / "plain.json")
    names = json.loads((tmp_path / "plain.json").read_text())["layers"]
    weights = load_file(place / "dense" / "model.safetensors")
    fisher = {name: torch.full_like(weights[f"{name}.weight"], 1e-6) for name in names}
    loved = next(name for name in names if name.endswith("0.self_attn.q_proj"))
    fisher[loved] *= 1e6
    save_file(fisher, tmp_path / "fisher.safetensors")
    aimed = quadapt(
        "plan", "dense", "--budget", "3.3", "--method", "qlora", "--fisher", tmp_path / "fisher.safetensors",
        "--output", tmp_path / "aimed.json",
    )  # fmt: skip
    after = json.loads((tmp_path / "aimed.json").read_text())["layers"]
    assert after[loved]["bits_per_weight"] > 8 > names[loved]["bits_per_weight"]
    assert aimed["objective"] < plain["objective"]
    save_file({name: fisher[name] for name in list(fisher)[:-1]}, tmp_path / "less.safetensors")
    said = give("plan", "dense", "--budget", "3", "--fisher", tmp_path / "less.safetensors", "-o", "new", code=2)
    assert f"{list(fisher)[-1]} is missing" in said.error
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    said = give("plan", "dense", "--budget", "3", "--fisher", tmp_path / "bad.safetensors", "-o", "new", code=2)
    assert "bad.safetensors: is damaged, or not safetensors" in said.error


# --- the table on disk ------------------------------------------------------------------------------------------------


def test_another_budget_measures_nothing(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made[0] / "plan-errors", cache)
    damaged = sorted(cache.iterdir())[0]
    damaged.write_text('{"layer": "x", "err')
    measured: list[int] = []
    real = job.measure
    monkeypatch.setattr(job, "measure", lambda *args, **more: measured.append(1) or real(*args, **more))
    common = ("dense", "--rank", "2", "--cache", cache)
    more = quadapt("plan", *common, "--budget", "4", "--output", tmp_path / "more.json")
    assert len(measured) == 1  # the damaged one
    assert more["objective"] < made[1]["objective"]
    quadapt("plan", "dense", "--rank", "3", "--cache", cache, "--budget", "4", "--output", tmp_path / "rank.json")
    assert len(measured) == 1 + 14


def test_killed_it_goes_on_to_the_same_plan(made: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path) -> None:
    main = "from quadapt.cli import main; main()"
    command = [sys.executable, "-c", main, "plan", str(place / "dense"), "--budget", "3.3", "--rank", "2"]
    command += ["--output", str(tmp_path / "plan.json")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    cache, deadline = tmp_path / "plan-errors", time.monotonic() + 120
    while len(list(cache.glob("*.json"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "plan.json").exists()
    before = {file.name: file.stat().st_mtime_ns for file in cache.glob("*.json")}
    assert 3 <= len(before) < 14
    quadapt(*command[3:])  # in this process, which has imported all there is to import
    after = {file.name: file.stat().st_mtime_ns for file in cache.glob("*.json")}
    assert len(after) == 14
    assert {name: after[name] for name in before} == before
    found, want = (json.loads((folder / "plan.json").read_text()) for folder in (tmp_path, made[0]))
    assert found["layers"].keys() == want["layers"].keys()
    assert found["objective"] == pytest.approx(want["objective"], rel=1e-3)
    assert found["model"] == want["model"]


# --- what is wrong is said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--budget", "1.5"), ("budget=1.5: these layers take at least 2.", "Raise the budget")),
        (("--budget", "3", "--rank", "64", "--count-adapters", "nf8"), ("adapters of rank 64 as nf8 included",)),
        (("--budget", "0"), ("budget=0", "above 0")),
        (("--budget", "3", "--method", "l4q"), ("l4q adapter quantizes by its own grid", "lq-lora, qlora")),
        (("--budget", "3", "--method", "lqlora"), ("method='lqlora'", "'lq-lora'")),
        (("--budget", "3", "--fisher", "none.safetensors"), ("fisher='none.safetensors' does not exist",)),
        (("--budget", "3", "--fisher", "none.txt"), ("none.txt",)),
        (("--budget", "3", "--cache", "story.txt"), ("cache='story.txt' is a file",)),
        (("--budget", "3", "--skip", "q_pro"), ("'q_pro' matches no layer",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_plans_that_cannot_be_made(arguments: tuple[str, ...], told: tuple[str, ...], tmp_path: Path) -> None:
    said = give("plan", "dense", *arguments, "--output", tmp_path / "plan.json", code=2)
    for words in told:
        assert words in said.error
    assert not (tmp_path / "plan.json").exists()


def test_a_plan_is_not_replaced_unasked(made: tuple[Path, dict[str, Any]]) -> None:
    said = give("plan", "dense", "--budget", "3", "--output", made[0] / "plan.json", code=2)
    assert "exists. Use --overwrite" in said.error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--plan", "{0}/plam.json"), ("plam.json' does not exist", "Did you mean", "plan.json'?")),
        (("--plan", "none.json"), ("plan='none.json' does not exist", "quadapt plan MODEL")),
        (("--plan", "story.txt"), ("story.txt: is damaged",)),
        (("--plan", "dense/config.json"), ("dense/config.json: is no plan",)),
        (("--plan", "{0}/plan.json", "--bits", "3"), ("bits=3 contradicts the plan",)),
        (("--plan", "{0}/plan.json", "--scales", "fp16"), ("scales='fp16' contradicts the plan",)),
        (("--plan", "{0}/plan.json", "--skip", "q_proj"), ("made for another model or other layers", "q_proj is not")),
        (("--plan", "{0}/plan.json", "--method", "l4q"), ("quantizes by its own grid",)),
        (("--plan", "{0}/plan.json", "--method", "lr-qat"), ("quantizes by its own grid",)),
        (("--plan", "{0}/plan.json", "--method", "qa-lora"), ("levels='int', the plan nf", "Use --method lq-lora")),
        (("--plan", "{0}/plan.json", "--rounding", "gptq"), ("needs them all at once",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("command", ["quantize", "dry", "tune"])
def test_plans_that_cannot_be_followed(
    command: str, arguments: tuple[str, ...], told: tuple[str, ...], made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    given = [each.format(made[0]) for each in arguments]
    start = {
        "quantize": ("quantize", "dense", "--calibration-data", "story.txt"),
        "dry": ("quantize", "dense", "--calibration-data", "story.txt", "--dry-run"),
        "tune": ("tune", "dense", "--data", "story.txt", *SHORT),
    }[command]
    said = give(*start, *given, "--output", tmp_path / "new", code=2)
    for words in told:
        assert words in said.error
    assert not (tmp_path / "new").exists()


def test_a_plan_of_another_model_is_refused(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    value = json.loads((made[0] / "plan.json").read_text())
    name = next(iter(value["layers"]))
    value["layers"][name]["out"] += 16
    (tmp_path / "plan.json").write_text(json.dumps(value))
    plan = ("--plan", tmp_path / "plan.json")
    said = give("quantize", "dense", *plan, "--output", tmp_path / "new", code=2)
    assert f"{name} is 64 x 64 here, 80 x 64 in the plan" in said.error
    value["version"] = 99
    (tmp_path / "plan.json").write_text(json.dumps(value))
    assert "version 99" in give("quantize", "dense", *plan, "--output", tmp_path / "new", code=2).error


def test_an_unnamed_output_is_named_after_the_plans_method(made: tuple[Path, dict[str, Any]]) -> None:
    config = TuneConfig(model="dense", data="story.txt", plan=str(made[0] / "plan.json"))
    assert (config.method, config.output) == ("lq-lora", "dense-lq-lora")
    assert "plan" in config.given()


def test_what_is_written_is_what_is_read(made: tuple[Path, dict[str, Any]]) -> None:
    value = json.loads((made[0] / "plan.json").read_text())
    again = BudgetPlan.from_json(value).as_json()
    assert {**again, "fisher": None} == value


def test_fisher_information_is_gathered_on_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: another budget, and tune with the same text, find it in the cache."""
    monkeypatch.setenv("QUADAPT_CACHE", str(tmp_path / "cache"))
    text = ("--calibration-length", "32", "--calibration-sequences", "6")
    more = ("--fisher", "story.txt", "--rank", "2", *text, "--output")
    give("plan", "dense", "--budget", "3", *more, tmp_path / "plan.json", code=0)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(kept) == 14
    said = give("plan", "dense", "--budget", "3.5", *more, tmp_path / "other.json", code=0)
    assert "statistics of the full-precision model: from" in said.err
    tune = ("tune", "dense", "--data", "story.txt", "--plan", tmp_path / "plan.json", "--fisher", "--max-steps", "2")
    said = give(*tune, *text, *SHORT, "--output", tmp_path / "adapter", code=0)
    assert "statistics of the full-precision model: from" in said.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == kept
