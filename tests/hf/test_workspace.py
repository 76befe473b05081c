"""Folders are written all or nothing, and an interrupted run is gone on with."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quadapt.errors import ConfigError, ResourceError
from quadapt.hf.workspace import Workspace, check_disk, remove, write_json

JOB = {"command": "quantize", "bits": 4, "inputs": ["model", None], "sizes": (1, 2)}


def names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


def finished(output: Path) -> Path:
    """An output of an earlier run."""
    with Workspace(output, {"command": "other"}) as space:
        (space.path / "old").write_text("precious")
        space.commit()
    return output


def interrupt(output: Path, job: dict[str, Any] = JOB, **settings: Any) -> None:
    """A run that fails after its first file."""

    def run() -> None:
        with Workspace(output, job, **settings) as space:
            (space.path / "first").write_text("done")
            (space.path / "folder").mkdir()
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run()


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_the_output_exists_only_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "model"
    with Workspace(output, JOB) as space:
        assert space.path == tmp_path / "deep" / "model.partial"
        assert not space.resumed
        (space.path / "weights").write_text("all")
        (space.path / "blocks").mkdir()
        (space.path / "blocks" / "0").write_text("half")
        assert not output.exists()
        space.commit("blocks")
        assert space.path == output
    assert names(output) == {"weights", "quadapt.json"}
    assert names(output.parent) == {"model"}


def test_a_run_that_fails_leaves_its_work_and_no_output(tmp_path: Path) -> None:
    interrupt(tmp_path / "model")
    assert names(tmp_path) == {"model.partial"}
    assert {"first", "folder", "job.json"} <= names(tmp_path / "model.partial")


def test_a_run_that_fails_before_it_did_anything_leaves_no_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="at once"), Workspace(tmp_path / "model", JOB):
        raise RuntimeError("at once")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_stopped_is_no_different(stop: type[BaseException], tmp_path: Path) -> None:
    def run() -> None:
        with Workspace(tmp_path / "model", JOB) as space:
            (space.path / "first").write_text("done")
            raise stop

    with pytest.raises(stop):
        run()
    with Workspace(tmp_path / "model", JOB) as space:
        assert space.resumed
        assert (space.path / "first").read_text() == "done"
        space.commit()


def test_a_run_that_does_not_commit_has_no_output(tmp_path: Path) -> None:
    with Workspace(tmp_path / "model", JOB) as space:
        (space.path / "first").write_text("done")
    assert not (tmp_path / "model").exists()


# --- going on ---------------------------------------------------------------------------------------------------------


def test_the_same_job_goes_on(tmp_path: Path) -> None:
    interrupt(tmp_path / "model")
    with Workspace(tmp_path / "model", {**JOB, "sizes": [1, 2]}) as space:  # as JSON the same
        assert space.resumed
        assert (space.path / "first").read_text() == "done"
        space.commit("first")
    assert names(tmp_path / "model") == {"folder", "quadapt.json"}


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({**JOB, "bits": 3}, "bits: 4 -> 3"),
    ({"command": "quantize"}, "bits: 4 -> not given; "),
    ({**JOB, "seed": 0}, "seed: not given -> 0"),
]


@pytest.mark.parametrize(("other", "change"), OTHERS, ids=str)
def test_another_job_is_refused_and_says_what_differs(other: dict[str, Any], change: str, tmp_path: Path) -> None:
    interrupt(tmp_path / "model")
    with pytest.raises(ConfigError, match=rf"{change}.*own command to go on, .*--overwrite to delete"):
        Workspace(tmp_path / "model", other)
    with Workspace(tmp_path / "model", JOB) as space:
        assert space.resumed
        assert (space.path / "first").read_text() == "done"


def test_another_job_starts_over_if_told_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupt(tmp_path / "model")
    with (
        caplog.at_level(logging.WARNING, "quadapt"),
        Workspace(tmp_path / "model", {**JOB, "bits": 3}, overwrite=True) as space,
    ):
        assert not space.resumed
        assert names(space.path) == {".lock", "job.json"}
    assert "belongs to another job (bits: 4 -> 3): starting over" in caplog.text


def test_where_nothing_can_be_gone_on_with_another_job_starts_over(tmp_path: Path) -> None:
    interrupt(tmp_path / "model", keeps=False)
    for job in (JOB, {**JOB, "bits": 3}):
        with Workspace(tmp_path / "model", job, keeps=False) as space:
            assert not space.resumed
            assert names(space.path) == {".lock", "job.json"}
            (space.path / "second").write_text("half")
    interrupt(tmp_path / "other")  # but what another command can go on with is kept
    with pytest.raises(ConfigError, match="bits: 4 -> 3"):
        Workspace(tmp_path / "other", {**JOB, "bits": 3}, keeps=False)


def test_work_of_an_earlier_version_is_kept(tmp_path: Path) -> None:
    interrupt(tmp_path / "model")
    note = {"command": "tune", "version": "0.1.0", "settings": {"seed": 0}, "inputs": []}
    (tmp_path / "model.partial" / "job.json").write_text(json.dumps(note))
    with pytest.raises(ConfigError, match="begun by an earlier version"):
        Workspace(tmp_path / "model", JOB)
    assert (tmp_path / "model.partial" / "first").read_text() == "done"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.unlink(),
        lambda path: path.write_text('{"form": 2, "job": 5, "keeps": true}'),
        lambda path: path.write_text('{"form": 2, "job": {}, "keeps": true, "whole": [{}], "drop": [], "result": {}}'),
        lambda path: path.write_text('{"form": 2, "job": {}, "keeps": 1, "whole": [], "drop": ["../x"], "result": {}}'),
    ],
)
def test_work_of_unknown_origin_is_left_alone(damage: Callable[[Path], Any], overwrite: bool, tmp_path: Path) -> None:
    interrupt(tmp_path / "model")
    damage(tmp_path / "model.partial" / "job.json")
    with pytest.raises(ConfigError, match=r"model\.partial', where .*, exists and is not of an interrupted run"):
        Workspace(tmp_path / "model", JOB, overwrite=overwrite)
    assert (tmp_path / "model.partial" / "first").read_text() == "done"


# --- what is in the way -----------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_kept_unless_told(tmp_path: Path) -> None:
    output = finished(tmp_path / "model")
    (tmp_path / "model.partial").mkdir()  # left by a run that was killed right before its last step
    with pytest.raises(ConfigError, match=r"exists\. Use --overwrite"):
        Workspace(output, JOB)
    assert names(tmp_path) == {"model"}
    with Workspace(output, JOB, overwrite=True) as space:
        (space.path / "new").write_text("better")
        assert (output / "old").exists()  # until the new one is complete
        space.commit()
    assert names(output) == {"new", "quadapt.json"}


def test_a_run_that_fails_while_overwriting_keeps_the_old_output(tmp_path: Path) -> None:
    output = finished(tmp_path / "model")
    interrupt(output, overwrite=True)
    assert names(output) == {"old", "quadapt.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced_by_a_folder(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("precious")
    with pytest.raises(ConfigError, match=r"exists|is a file"):
        Workspace(tmp_path / "model", JOB, overwrite=overwrite)
    assert (tmp_path / "model").read_text() == "precious"


def test_two_runs_do_not_write_the_same_folder(tmp_path: Path) -> None:
    with Workspace(tmp_path / "model", JOB) as space:
        (space.path / "first").write_text("done")
        for job in (JOB, {"another": 1}):
            with pytest.raises(ConfigError, match="another quadapt is writing"):
                Workspace(tmp_path / "model", job)
        assert (space.path / "first").read_text() == "done"
    with Workspace(tmp_path / "model", JOB) as space:  # released
        assert space.resumed


def test_a_run_that_died_holds_no_lock(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        space = Workspace(tmp_path / "model", JOB)
        (space.path / "first").write_text("done")
        os._exit(1)
    os.waitpid(pid, 0)
    with Workspace(tmp_path / "model", JOB) as space:
        assert space.resumed


@pytest.mark.parametrize("failing", ["a file in the way", "a file above"])
def test_a_folder_that_cannot_be_made_is_named(failing: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    output = tmp_path / "taken" / "model" if failing == "a file above" else tmp_path / "model"
    if failing == "a file in the way":
        (tmp_path / "model.partial").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written .*Use another --output"):
        Workspace(output, JOB)


# --- disk space -------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A disk with 1 GB free; the folders that were asked about."""
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(Path(path)), SimpleNamespace(free=10**9))[1])
    return asked


def test_a_disk_that_is_too_full_is_refused_before_anything_is_written(disk: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"1\.00 GB free, the output needs 1\.50 GB"):
        Workspace(tmp_path / "new" / "model", JOB, needs=1_500_000_000)
    assert names(tmp_path) == set()
    assert disk == [tmp_path]  # the nearest folder that exists
    with Workspace(tmp_path / "model", JOB, needs=10**9) as space:
        space.commit()


def test_space_is_looked_for_where_the_folder_will_be(
    disk: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_disk(Path("a") / "b", 5)
    assert disk == [Path()]
    with pytest.raises(ResourceError):
        check_disk(Path("a"), 10**9 + 1)


# --- files ------------------------------------------------------------------------------------------------------------


def test_json_is_replaced_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.json"
    write_json(path, {"größe": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"größe": 1}
    assert names(tmp_path) == {"note.json"}

    def fail(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        write_json(path, {"größe": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"größe": 1}


def test_what_is_removed_may_be_anything_or_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "inside").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(kept)
    for name in ("folder", "file", "link", "nothing"):
        remove(tmp_path / name)
    assert names(tmp_path) == {"kept"}
    assert (kept / "inside").read_text() == "precious"  # a link goes, not what it points to
