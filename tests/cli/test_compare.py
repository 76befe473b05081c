"""`quadapt compare` and `quadapt report`: fair parts, the best rate, runs that are found again, right figures."""

from __future__ import annotations

import json
import math
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from commands import SUMS, digests, give, quadapt, tree
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from quadapt.config import CompareConfig, TuneConfig, checked
from quadapt.data import read
from quadapt.errors import ConfigError
from quadapt.exporters import llama_quantize
from quadapt.jobs import cells, compare
from quadapt.jobs.cells import LORA, WHOLE, Cell
from quadapt.jobs.compare import MORE_RATES, halving
from quadapt.jobs.parts import CHARACTERS, parts_of
from quadapt.jobs.shared import Shared
from quadapt.jobs.tune import tune
from quadapt.report import memory
from quadapt.report.ui import UI
from quadapt.report.weights import weights_of

TINY = (
    *("--max-steps", 2, "--batch-size", 2, "--gradient-accumulation", 1, "--rank", 2, "--seq-len", 32),
    *("--set", "calibration_sequences=4", "--set", "group_size=32", "--measure-rows", 4, "--dtype", "float32"),
)


@pytest.fixture(autouse=True)
def _no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate of memory takes half of the time of so short a run."""
    monkeypatch.setattr(memory, "step_bytes", lambda *_, **__: 0)


def settings(**values: Any) -> CompareConfig:
    return checked(CompareConfig, {"model": "dense", "data": "sums.jsonl", **values})


# --- settings --------------------------------------------------------------------------------------------------------


def test_lists_are_given_with_commas_or_as_lists() -> None:
    one = settings(bits="4,3", methods="qa-lora, l4q", rates="1e-3")
    assert one == settings(bits=[4, 3], methods=["qa-lora", "l4q"], rates=["1e-3"])
    assert one.widths == (4, 3)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--bits", "4,7"), "bits='7'"),
        (("--rates", "1e-3,fast"), "'fast' is no learning rate"),
        (("--methods", "qa-lor"), "qa-lora"),
        (("--set", "dropout"), "must be a setting and its value"),
        (("--set", "dropuot=0.1"), "dropuot is not a setting. Did you mean dropout?"),
        (("--methods", "qlora", "--bits", "5"), "bits=5"),
        (("--choose-split", "0"), "choose_split=0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_run(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    error = give("compare", "dense", "--data", "sums.jsonl", "-o", tmp_path / "new", *TINY, *arguments, code=2).error
    assert said in error
    assert not (tmp_path / "new" / "runs").exists()


def test_a_folder_of_others_is_left_alone(away: Path) -> None:
    before = tree(away / "dense")
    error = give("compare", "dense", "--data", "sums.jsonl", "-o", "dense", *TINY, code=2).error
    assert "exists and is no comparison" in error
    assert tree(away / "dense") == before


def test_two_processes_do_not_meet(away: Path) -> None:
    (away / "both").mkdir()
    with filelock.FileLock(away / "both" / ".lock"):
        assert (
            "at work in 'both'" in give("compare", "dense", "--data", "sums.jsonl", "-o", "both", *TINY, code=2).error
        )


@pytest.mark.usefixtures("here", "shelf")
def test_a_model_that_writes_nothing_is_refused() -> None:
    assert "quantized already" in give("compare", "q4", "--data", "sums.jsonl", *TINY, code=2).error


# --- data ------------------------------------------------------------------------------------------------------------


def test_no_row_is_in_two_parts(away: Path) -> None:
    config = settings(choose_split=0.125, test_split=0.25)
    parts = parts_of(config, away / "data")
    rows = {name: read(str(path)).data for name, path in vars(parts).items()}
    found = {name: {(row["prompt"], row["completion"]) for row in part} for name, part in rows.items()}
    assert {name: len(part) for name, part in found.items()} == {"train": 15, "choose": 3, "test": 6}
    assert set.union(*found.values()) == {(row["prompt"], row["completion"]) for row in SUMS}
    before = tree(away / "data")
    assert parts_of(config, away / "data") == parts
    assert tree(away / "data") == before  # written once: what is trained on keeps its identity


def test_a_text_is_cut_into_parts_that_follow_each_other(away: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(4000))
    (away / "long.txt").write_text(text)
    parts = parts_of(settings(data="long.txt", measure_rows=5), away / "data")
    train, choose, test = ("".join(read(str(path)).data["text"]) for path in (parts.train, parts.choose, parts.test))
    assert len(choose) == len(test) == 5 * CHARACTERS
    assert text.startswith(train + choose)
    assert 0.84 < len(train) / len(text) < 0.86
    assert 0.89 < text.index(test) / len(text) < 0.91


def test_chats_keep_their_turns_and_tools(away: Path) -> None:
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"messages": [{**turns[0], "content": f"{at} + 1"}, turns[1]], "tools": tools} for at in range(20)]
    (away / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = parts_of(settings(data="chats.jsonl"), away / "data")
    found = [json.loads(line) for path in vars(parts).values() for line in path.read_text().splitlines()]
    assert sorted(found, key=str) == sorted(rows, key=str)
    assert read(str(parts.train)).kind == "messages"


# --- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 21))
def test_halving_halves(count: int) -> None:
    rounds = halving(count)
    assert rounds[0][0] == count
    assert rounds[-1] == (1, 1.0)
    for (before, share), (after, more) in pairwise(rounds):
        assert after == before // 2
        assert more == 2 * share
    assert sum(tried * share for tried, share in rounds) <= len(rounds) * count * rounds[0][1]


class _Landscape:
    """Runs whose loss is known: a valley over the logarithm of the rate, deeper with more steps."""

    def __init__(self, valley: float) -> None:
        self.valley, self.made, self.discarded = valley, list[Cell](), list[Cell]()

    def tuned(self, cell: Cell) -> dict[str, Any]:
        self.made.append(cell)
        distance = math.log10(cell.rate) - self.valley
        return {"choose": None if distance > 1.4 else 1 + distance**2 + 1 / cell.steps}

    def discard(self, cell: Cell) -> None:
        self.discarded.append(cell)


@given(st.floats(-5.5, -0.5))
def test_the_rate_is_the_best_and_not_at_the_edge(valley: float) -> None:
    runs: Any = _Landscape(valley)
    grid = compare._Grid(settings(), runs, 64, UI(quiet=True))
    found = grid._chosen("qa-lora", 4)
    first = {cell.rate for cell in runs.made if cell.steps == 16}
    best = min(first, key=lambda rate: abs(math.log10(rate) - valley))
    assert abs(math.log10(found.rate) - valley) <= abs(math.log10(best) - valley) + 1e-9
    assert found.steps == 64
    assert min(first) < found.rate < max(first) or len(first) == 5 + MORE_RATES
    assert len([cell for cell in runs.made if cell.steps == 64]) == 1
    assert set(runs.discarded) == set(runs.made) - {found}
    assert grid.trails[0]["rate"] == found.rate
    assert len(grid.trails[0]["tried"]) == len(runs.made)


def test_a_method_that_diverges_with_every_rate_is_an_error() -> None:
    runs: Any = _Landscape(-9)
    with pytest.raises(ConfigError, match="qa-lora at 4 bits: training diverged with every rate"):
        compare._Grid(settings(rates="1e-2,1e-1"), runs, 64, UI(quiet=True))._chosen("qa-lora", 4)


def test_the_budget_sets_the_steps() -> None:
    """A second a step and ten besides for each run, and five to measure: what fits is computed by hand."""

    class _Clock:
        full, lora_rate, spent = 0, None, 0.0

        def untuned(self) -> dict[str, Any]:
            return {"wall": 3.0}

        def tuned(self, cell: Cell) -> dict[str, Any]:
            self.spent += 14.0
            return {"wall": 14.0, "seconds": 4.0}

        def measured(self, cell: Cell) -> None:
            self.spent += 5.0

        def discard(self, cell: Cell) -> None:
            assert cell.steps == compare.PILOT

    runs: Any = _Clock()
    config = settings(budget_minutes=60, rates="1e-3,1e-2", seeds=2, methods="qa-lora,l4q", bits="4,3")
    grid = [("qa-lora", 4), ("l4q", 4), ("qa-lora", 3), ("l4q", 3)]
    steps = compare._affordable(config, runs, grid, 3600.0)
    trials = 3 * 19.0  # LoRA and each method once
    tunings, whole = 2 + 1 + 1, 2 * 0.5 + 1 + 1  # two rates on half of the steps, the better on all, another seed
    fixed = 3 + 5 * (tunings * 10 + 2 * 5)
    assert steps == math.floor((3600 - trials - fixed) / (5 * whole))
    with pytest.raises(ConfigError, match="8 steps for each run take 8 minutes here"):
        compare._affordable(config, _Clock(), grid, 120.0)


# --- what is said of weights -----------------------------------------------------------------------------------------


def test_errors_of_layers_are_those_of_the_exported_weights(here: Path, shelf: dict[str, Any]) -> None:
    """The merged model was exported as dense floats, too: the norms of the differences, in NumPy."""
    found = weights_of("dense", "merged", "adapter/base")
    dense, after = (load_file(here / name / "model.safetensors") for name in ("dense", "hf"))
    assert len(found["layers"]) == len(shelf["q4"]["rows"])
    for layer in found["layers"]:
        W, Q = (tensors[f"{layer['name']}.weight"].astype(np.float64) for tensors in (dense, after))
        assert layer["error"] == pytest.approx(np.linalg.norm(Q - W) / np.linalg.norm(W), rel=1e-4)
    rows = {row["name"]: row["error"] for row in json.loads((here / "adapter/base/quadapt.json").read_text())["rows"]}
    assert {layer["name"]: layer["base_error"] for layer in found["layers"]} == pytest.approx(rows, rel=1e-3)


@pytest.mark.usefixtures("here")
def test_changed_codes_are_those_of_the_certificate(shelf: dict[str, Any]) -> None:
    exact, lossy = weights_of("dense", "merged", "adapter/base"), weights_of("dense", "lossy", "qlora/base")
    (width, kept), *_ = exact["codes"].items()
    assert width == "3"
    assert kept["changed"] == 0
    assert kept["before"] == kept["after"]
    assert sum(kept["after"]) == kept["weights"] == shelf["q4"]["quantized_weights"]
    (changed,) = lossy["codes"].values()
    layers = shelf["lossy"]["certificate"]["layers"]
    assert changed["changed"] == sum(layer["codes_changed"] for layer in layers) > 0
    assert changed["before_is"] == "base"


@pytest.mark.usefixtures("here", "shelf")
def test_without_a_base_codes_are_those_of_the_nearest_rounding() -> None:
    (counts,) = weights_of("dense", "nearest")["codes"].values()
    assert counts["before_is"] == "nearest"
    assert counts["changed"] == 0


# --- pages of single runs --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_a_page_of_an_adapter(shelf: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    said = quadapt("report", "adapter", "--data", "sums.jsonl", "--limit", 4, "--samples", 2, "-o", out)
    point = said["points"][0]
    assert [loss for _, loss in point["curve"]] == [log["loss"] for log in shelf["adapter"]["losses"] if "loss" in log]
    assert point["loss"] == pytest.approx(
        quadapt("eval", "adapter", "--data", "sums.jsonl", "--limit", 4)["perplexity"]["loss"]
    )
    assert len(point["samples"]) == 2
    text = out.read_text()
    for words in ("Learning curves", "Errors by layer", "Codes before and after", "Samples", f"{point['loss']:.4f}"):
        assert words in text
    assert "exists. Use --overwrite" in give("report", "adapter", "-o", out, code=2).error
    quadapt("report", "adapter", "--data", "sums.jsonl", "--limit", 4, "--samples", 2, "-o", out, "--overwrite")
    assert out.read_text() == text


@pytest.mark.usefixtures("here", "shelf")
def test_a_page_of_a_merged_model(tmp_path: Path) -> None:
    said = quadapt("report", "merged", "-o", tmp_path / "page.html")
    assert said["points"][0]["certificate"]["verdict"] == "exact"
    text = (tmp_path / "page.html").read_text()
    assert "bit for bit" in text
    assert "Loss against size" not in text
    assert said["left_out"] == ["loss and samples, for which data are needed: --data FILE"]


@pytest.mark.usefixtures("here", "shelf")
def test_what_is_no_run_has_no_page(tmp_path: Path) -> None:
    assert "is no run" in give("report", "dense", "-o", tmp_path / "page.html", code=2).error
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "quadapt.json").write_text('{"kind": "comparison"}')
    assert "the comparison is not finished" in give("report", tmp_path / "half", code=2).error
    assert not (tmp_path / "page.html").exists()


# --- the usual route -------------------------------------------------------------------------------------------------


def test_the_program_is_taken_where_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] || { echo "no such type $3" >&2; exit 1; }\ncp "$1" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    source, target = tmp_path / "a.gguf", tmp_path / "b.gguf"
    source.write_bytes(b"GGUF")
    quantize = llama_quantize.quantizer()
    quantize(source, target, "Q4_K_M")
    assert target.read_bytes() == b"GGUF"
    with pytest.raises(Exception, match="no such type Q9"):
        quantize(source, target, "Q9")
    assert not target.exists()


# --- whole comparisons -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq-lora", pytest.param("recover", marks=pytest.mark.deep)])
def test_what_runs_share_changes_nothing(away: Path, method: str) -> None:
    """A run that takes over the base of another ends in the same adapter as one that makes it itself."""
    shared, found = Shared(away / "shared"), []
    block_ap = {"calibration_epochs": 1, "first_share": 0.5, "max_steps": 6} if method == "recover" else {}
    for name, rate, kept in (("first", 1e-3, shared), ("second", 2e-2, shared), ("alone", 2e-2, None)):
        values = {"model": "dense", "data": ["story.txt"], "output": name, "method": method, "learning_rate": rate}
        small = {"max_steps": 3, "batch_size": 2, "gradient_accumulation": 1, "rank": 2, "seq_len": 32}
        config = checked(TuneConfig, {**values, **small, "group_size": 32, "calibration_sequences": 4, **block_ap})
        tune(config, UI(quiet=True), shared=kept)
        found.append(digests(away / name))
    assert found[1] == found[2] != found[0]
    assert len(list((away / "shared").iterdir())) == 1
    base = "base/model.safetensors"
    assert (away / "first" / base).stat().st_ino == (away / "second" / base).stat().st_ino


def _lasting(value: Any) -> Any:
    """Figures without times and memory, which no two runs share."""
    if isinstance(value, dict):
        return {
            name: _lasting(each)
            for name, each in value.items()
            if name not in ("seconds", "peak_memory", "spent_seconds")
        }
    return [_lasting(each) for each in value] if isinstance(value, list) else value


@pytest.mark.deep
def test_a_comparison_goes_on_where_it_was_stopped(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at every third note that it writes, it ends with the same figures; given again, with the same page."""
    command = ("compare", "dense", "--data", "sums.jsonl", "--methods", "qa-lora,qlora", "--bits", "4", "--seeds", 2)
    command += ("--rates", "1e-2,3e-2", "--no-usual", *TINY)
    whole = quadapt(*command, "-o", "whole")
    labels = [point["label"] for point in whole["points"]]
    assert labels == [
        "the model as it was given",
        "LoRA in full precision",
        "qa-lora, 4 bits",
        "qlora, 4 bits, as trained",
        "qlora, 4 bits, requantized",
    ]
    assert all(len(point["losses"]) == 2 for point in whole["points"][1:])
    assert whole["points"][2]["certificate"]["verdict"] == "exact"
    write, stops = cells.write_json, [0]

    def stopping(path: Path, value: Any) -> None:
        stops[0] += 1
        if stops[0] % 3 == 0:
            raise KeyboardInterrupt
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "write_json", stopping)
        codes = []
        while not codes or codes[-1] == 130:
            codes.append(give(*command, "-o", "stopped").code)
    assert codes[-1] == 0
    assert len(codes) > 3
    one, other = (json.loads((away / name / "compare.json").read_text()) for name in ("whole", "stopped"))
    assert _lasting(one) == _lasting(other)
    page = (away / "stopped" / "index.html").read_bytes()
    with monkeypatch.context() as patch:
        for name in ("tune", "tune_dense", "evaluate", "merge"):
            patch.setattr(cells, name, None)
        quadapt(*command, "-o", "stopped")
        assert (away / "stopped" / "index.html").read_bytes() == page
        quadapt("report", "stopped")
    assert (away / "stopped" / "index.html").read_bytes() == page
    more = quadapt(*command[:5], "qa-lora", *command[6:8], "3", *command[9:], "-o", "stopped")
    assert more["points"][1] == json.loads(json.dumps(other["points"][1]))  # the anchor was found again


@pytest.mark.usefixtures("away")
@pytest.mark.deep
def test_the_usual_route_is_compared_with() -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (pip install 'quadapt[llama]')")
    said = quadapt(
        *("compare", "dense", "--data", "sums.jsonl", "--methods", "qa-lora", "--bits", "4", "--seeds", 1),
        *("--rates", "1e-2", *TINY, "-o", "usual"),
    )
    assert said["points"][-1]["route"] == "usual" or any("usual" in words for words in said["left_out"])


@pytest.mark.usefixtures("away")
def test_what_is_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_quantize.shutil, "which", lambda _: None)
    monkeypatch.setattr(llama_quantize.importlib.util, "find_spec", lambda _: None)
    words: list[str] = []
    grid = compare._Grid(settings(), None, 8, UI(quiet=True))  # type: ignore[arg-type]
    assert grid._usual(words) == ()
    assert re.search(r"the usual route: .*pip install 'quadapt\[llama\]'", words[0])


def test_a_run_is_named_after_all_that_decides_on_it(away: Path) -> None:
    def place(cell: Cell, **values: Any) -> Path:
        config = settings(**values)
        runs = cells.Runs(config, parts_of(config, away / "data"), Path("runs"), UI(quiet=True))
        return runs.place(cell)

    cell = Cell("qa-lora", 4, 1e-3, 8, 0)
    assert place(cell) == place(cell, seeds=1, methods="l4q", rates="1e-1", tolerance=1.0, output="other")
    others = {
        place(cell),
        place(Cell("qa-lora", 3, 1e-3, 8, 0)),
        place(Cell("qa-lora", 4, 1e-3, 8, 1)),
        place(Cell(LORA, WHOLE, 1e-3, 8, 0)),
        place(cell, rank=4),
        place(cell, settings="weight_decay=0.5"),
        place(cell, settings="qa-lora.weight_decay=0.25"),
        place(cell, choose_split=0.2),
    }
    assert len(others) == 8
    assert place(cell, settings="l4q.weight_decay=0.25") == place(cell)
