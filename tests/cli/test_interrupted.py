"""Stopped at any moment, the same command goes on and ends in the same weights; no output is ever half-written."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, digests, give

import quadapt
from quadapt.hf import blocks, workspace
from quadapt.jobs import quantize as quantizing
from quadapt.report import memory
from quadapt.train import loop as train

COMMANDS = {
    "quantize": ("quantize", "dense", "--calibration-data", "story.txt", "--calibration-length", "32"),
    "tune": (
        *("tune", "dense", "--data", "story.txt", "--method", "gptq-lora", "--group-size", "32", "--dropout", "0.1"),
        *("--max-steps", "6", "--save-steps", "2", "--calibration-sequences", "8", *SHORT),
    ),
}
"""Both round by GPTQ, whose blocks depend on those before; the adapter has dropout, whose random numbers must go on."""

WATCHED: list[tuple[Any, str]] = [
    *((os, "replace"), (os, "rename"), (shutil, "rmtree"), (quantizing, "save_quantized")),
    *((blocks, "save_file"), (blocks.BlockFiles, "keep")),
    *((train._Watcher, "on_step_end"), (train._Watcher, "on_save")),
]
"""A command may be stopped before and after each call of these."""


@pytest.fixture(autouse=True)
def _no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate of memory takes half of the time of so short a run."""
    monkeypatch.setattr(memory, "step_bytes", lambda *_, **__: 0)


@contextmanager
def stopped(at: int = 0) -> Iterator[list[int]]:
    """Ctrl-C at the moment number `at`, if there is such; yields how many moments there have been."""
    count = [0]

    def moment() -> None:
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            moment()
            result = function(*arguments, **settings)
            moment()
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in WATCHED:
            patch.setattr(owner, name, watched(getattr(owner, name)))
        yield count


@pytest.fixture(scope="module", params=COMMANDS)
def whole(request: pytest.FixtureRequest, place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An uninterrupted run: its command, the moments at which it could have been stopped, and what it wrote."""
    output = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch, stopped() as count:
        patch.chdir(place)
        give(*COMMANDS[request.param], "--output", output, code=0)
    return {"command": COMMANDS[request.param], "moments": count[0], "digests": digests(output)}


@pytest.mark.usefixtures("here")
def test_stopped_anywhere_it_goes_on_to_the_same_weights(whole: dict[str, Any], tmp_path: Path) -> None:
    moments = range(1, whole["moments"] + 1)
    assert len(moments) > 20
    for at in moments[:: max(1, len(moments) // 18)]:
        output = tmp_path / f"at{at}"
        command = (*whole["command"], "--output", output)
        with stopped(at):
            said = give(*command, code=130)
        assert said.error == "quadapt: interrupted. Give the same command again to go on", at
        if not output.exists():  # otherwise it was stopped while it tidied up
            give(*command, code=0)
        assert digests(output) == whole["digests"], at
        assert not {"blocks", "checkpoints"} & {item.name for item in output.iterdir()}
        shutil.rmtree(output)
    assert not any(tmp_path.iterdir())


def test_an_overwriting_run_that_is_stopped_loses_neither_folder(
    whole: dict[str, Any], away: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    give("quantize", "dense", "--rounding", "nearest", "--output", output, code=0)
    old = digests(output)
    command = (*whole["command"], "--output", output, "--overwrite")
    with stopped(whole["moments"] // 2):
        give(*command, code=130)
    assert digests(output) == old
    give(*command, code=0)
    assert digests(output) == whole["digests"]
    assert {item.name for item in away.iterdir()} == {"dense", "story.txt", "sums.jsonl", "out"}


def test_between_two_folders_the_finished_one_is_kept(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("quantize", "dense", "--rounding", "nearest", "--output", "out")
    give(*command, "--bits", "8", code=0)
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "exchange", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        give(*command, "--overwrite", code=130)
    said = give(*command, "--overwrite", code=0)  # the new one was whole, and only takes its place
    assert "quantizing" not in said.err
    assert {item.name for item in away.iterdir()} == {"dense", "story.txt", "sums.jsonl", "out"}


def test_a_folder_that_was_only_partly_removed_is_not_the_output(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("quantize", "dense", "--rounding", "nearest", "--output", "out")
    give(*command, "--bits", "8", code=0)
    rmtree = shutil.rmtree

    def fail(path: Any, *rest: Any, **more: Any) -> None:
        if "out" in Path(path).name:
            (Path(path) / "config.json").unlink()
            raise KeyboardInterrupt
        rmtree(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        give(*command, "--overwrite", code=130)
    give("inspect", "out", "--verify", code=0)
    give(*command, "--overwrite", code=0)
    assert {item.name for item in away.iterdir()} == {"dense", "story.txt", "sums.jsonl", "out"}


# --- what is gone on with ---------------------------------------------------------------------------------------------


def stop_at_step(step: int, command: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a command, and press Ctrl-C after an optimizer step."""
    own = train._Watcher.on_step_end

    def watch(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        own(self, args, state, *rest, **more)
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train._Watcher, "on_step_end", watch)
        give(*command, code=130)


TUNE = (*COMMANDS["tune"], "--output", "out")


def test_training_goes_on_from_the_last_checkpoint(
    away: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop_at_step(5, TUNE, monkeypatch)
    before = digests(away / "out.partial" / "base")
    with caplog.at_level(logging.INFO, "quadapt"):
        said = give(*TUNE, code=0)
    assert "going on from step 4 of 6" in caplog.text
    assert "quantizing" not in said.err
    assert digests(away / "out" / "base") == before
    note = json.loads((away / "out" / "quadapt.json").read_text())
    assert [entry["step"] for entry in note["losses"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_not_gone_on_from(
    away: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    give(*TUNE[:-1], "whole", code=0)
    stop_at_step(5, TUNE, monkeypatch)
    file = away / "out.partial" / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level(logging.INFO, "quadapt"):
        give(*TUNE, code=0)
    assert "checkpoint-4 was interrupted while it was written, and is removed" in caplog.text
    assert "going on from step 2 of 6" in caplog.text
    assert digests(away / "out") == digests(away / "whole")


@pytest.mark.parametrize("damage", ["cut", "emptied"])
def test_a_damaged_block_is_made_anew(damage: str, away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (*COMMANDS["quantize"], "--output", "out")
    give(*command[:-1], "whole", code=0)
    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "save_quantized", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        give(*command, code=130)
    file = away / "out.partial" / "blocks" / "model.layers.0.safetensors"
    file.write_bytes(file.read_bytes()[: 1000 if damage == "cut" else 0])
    assert "going on with out.partial" in give(*command, code=0).err
    assert digests(away / "out") == digests(away / "whole")


@pytest.mark.parametrize(("change", "shown"), [("--seed 1", "seed: 0 -> 1"), ("--max-steps 7", "max_steps: 6 -> 7")])
def test_other_settings_are_refused_and_start_over_if_told_so(
    change: str, shown: str, away: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop_at_step(5, TUNE, monkeypatch)
    before = digests(away / "out.partial")
    said = give(*TUNE, *change.split(), code=2)
    assert f"would not go on with: {shown}. Give that run's own command" in said.error
    assert digests(away / "out.partial") == before
    with caplog.at_level(logging.INFO, "quadapt"):
        said = give(*TUNE, *change.split(), "--overwrite", code=0)
    assert "starting over" in caplog.text
    assert "going on" not in caplog.text + said.err
    assert "quantizing" in said.err
    assert {item.name for item in away.iterdir()} == {"dense", "story.txt", "sums.jsonl", "out"}


def test_other_data_under_the_same_name_is_refused(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_step(5, TUNE, monkeypatch)
    story = (away / "story.txt").read_text()
    (away / "story.txt").write_text(story.replace("fox", "owl"))
    assert "data: its content has changed" in give(*TUNE, code=2).error
    (away / "story.txt").write_text(story)
    assert "going on" in give(*TUNE, code=0).err


def test_what_does_not_change_the_result_does_not_matter(
    away: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other names of the same content, another version of the same release, and settings of how it is reported."""
    give(*TUNE[:-1], "whole", code=0)
    stop_at_step(5, TUNE, monkeypatch)
    os.utime(away / "story.txt")
    shutil.copytree(away / "dense", away / "moved")
    (away / "moved" / "README.md").write_text("a model")
    shutil.copy(away / "story.txt", away / "copy.txt")
    monkeypatch.setattr("quadapt.__version__", quadapt.__version__ + "1")
    moved = {"dense": "moved", "story.txt": "copy.txt"}
    command = [*(moved.get(word, word) for word in TUNE), "--device", "cpu", "--save-steps", "3", "--keep", "last"]
    with caplog.at_level(logging.INFO, "quadapt"):
        said = give(*command, "--eval-data", "sums.jsonl", code=0)
    assert "going on with out.partial" in said.err
    assert "going on from step 4 of 6" in caplog.text
    assert digests(away / "out") == digests(away / "whole")


def test_training_that_was_done_is_not_gone_on_with(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(*TUNE[:-1], "whole", code=0)
    with monkeypatch.context() as patch:
        patch.setattr("quadapt.jobs.training._written", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for _ in range(2):
            give(*TUNE, code=130)
    said = give(*TUNE, "--json", code=0).json
    assert said["steps"] == 6
    assert [entry["step"] for entry in said["losses"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert digests(away / "out") == digests(away / "whole")


def test_a_mistake_does_not_cost_an_interrupted_run(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_step(5, TUNE, monkeypatch)
    before = digests(away / "out.partial")
    for mistake in (("--data", "stroy.txt"), ("--skip", "nope"), ("--seq-len", "0"), ("--calibration-data", "no.txt")):
        give(*TUNE, *mistake, code=2)
    give("quantize", "dense", "--calibration-data", "no.txt", "--output", "out", code=2)
    assert digests(away / "out.partial") == before


# --- real signals -----------------------------------------------------------------------------------------------------

CHILDREN = """
import json, os, signal, sys, time
from pathlib import Path
import quadapt.cli, quadapt.train, quadapt.hf.blocks, quadapt.jobs.tune, quadapt.jobs.quantize

def slow(owner, name):  # so that there is time to send the signal
    own = getattr(owner, name)
    def call(*arguments, **settings):
        result = own(*arguments, **settings)
        time.sleep(0.5)
        return result
    setattr(owner, name, call)

slow(quadapt.hf.blocks.BlockFiles, "keep")
slow(quadapt.train.loop._Watcher, "on_save")
found = []
for name, arguments, sign, reached in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        sys.argv = ["quadapt", *arguments, "--output", name]
        try:
            quadapt.cli.main()
        except SystemExit as error:
            os._exit(error.code)
        os._exit(99)
    end = time.monotonic() + 60
    while not list(Path(f"{name}.partial").glob(reached)) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(child, getattr(signal, sign))
    found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(found))
"""


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As the children have: the number of threads is part of what a job is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_killed_and_interrupted_by_the_system(away: Path, run_python: Callable[..., str]) -> None:
    reached = {"quantize": "blocks/*.safetensors", "tune": "checkpoints/checkpoint-2/complete.json"}
    jobs = [
        (f"{name}-{sign}", COMMANDS[name], sign, reached[name]) for name in COMMANDS for sign in ("SIGKILL", "SIGINT")
    ]
    printed = run_python(CHILDREN, json.dumps(jobs), cwd=away, OMP_NUM_THREADS="1")
    assert json.loads(printed.splitlines()[-1]) == [-9, 130, -9, 130]
    for name, command in COMMANDS.items():
        give(*command, "--output", "whole", code=0)
        for sign in ("SIGKILL", "SIGINT"):
            output = away / f"{name}-{sign}"
            assert not output.exists()
            assert f"going on with {output.name}.partial" in give(*command, "--output", output.name, code=0).err
            assert digests(output) == digests(away / "whole")
        shutil.rmtree(away / "whole")
