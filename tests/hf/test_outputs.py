"""What is not of our making is never replaced, and what is read is never written over."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from quadapt import files
from quadapt.errors import ConfigError
from quadapt.hf import workspace
from quadapt.hf.workspace import Workspace, check_output

JOB = {"command": "merge", "settings": {"seed": 0}, "inputs": {}}


def made(output: Path, content: str = "old") -> Path:
    with Workspace(output, JOB, overwrite=True) as space:
        (space.path / "weights").write_text(content)
        space.commit()
    return output


def test_a_folder_of_someone_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "sea.jpg").write_text("blue")
    with pytest.raises(ConfigError, match="no folder that quadapt has written"):
        Workspace(tmp_path / "holiday", JOB, overwrite=True)
    assert (tmp_path / "holiday" / "sea.jpg").read_text() == "blue"


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = made(tmp_path / "disk")
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: [SimpleNamespace(mountpoint=str(output))])
    with pytest.raises(ConfigError, match="is a mount point"):
        Workspace(output, JOB, overwrite=True)


def test_names_beside_the_output_are_the_users_own(tmp_path: Path) -> None:
    own = {".model.old", ".model.new", "model.old", ".note.json.tmp"}
    for name in own:
        (tmp_path / name).write_text("mine")
    made(tmp_path / "model")
    made(tmp_path / "model", "new")
    assert {item.name for item in tmp_path.iterdir()} == {
        ".model.old",
        ".model.new",
        "model.old",
        ".note.json.tmp",
        "model",
    }


def test_an_input_is_not_written_over(tmp_path: Path) -> None:
    model = made(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}")
    for output, name in ((tmp_path / "rows.jsonl", tmp_path / "rows.jsonl"), (model / "config.json", model)):
        with pytest.raises(ConfigError, match="would replace"):
            check_output(output, overwrite=True, inputs=[str(name)], folder=False)
    with pytest.raises(ConfigError, match="would replace"):  # a teacher in the folder that is to be replaced
        check_output(model, overwrite=True, inputs=[str(model / "config.json")])
    (model / "eval.json").write_text(json.dumps({"kind": "quadapt eval"}))
    check_output(model / "eval.json", overwrite=True, inputs=[str(model)], folder=False)


def test_without_a_swap_in_one_step_the_next_run_brings_it_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = made(tmp_path / "model"), os.rename
    monkeypatch.setattr(workspace, "exchange", lambda *_: False)

    def stop(old: Path, new: Path) -> None:
        if str(old).endswith(".partial"):
            raise KeyboardInterrupt
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            made(output, "new")
    assert not output.exists()
    with Workspace(output, JOB) as space:
        assert space.finished == {}
    assert (output / "weights").read_text() == "new"
    assert {item.name for item in tmp_path.iterdir()} == {"model"}


def test_a_file_system_without_locks_is_not_another_quadapt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(workspace.filelock.FileLock, "_acquire", refuse)
    assert (made(tmp_path / "model") / "weights").read_text() == "old"


def test_a_link_at_a_temporary_name_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "precious").write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0" * 16)
    name = f".quadapt-{files._HOST}-{os.getpid()}-{'0' * 16}.tmp"
    (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        files.write_json(tmp_path / "note.json", {})
    assert (tmp_path / "precious").read_text() == "mine"


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: pid == 7)
    names = {number: f".quadapt-{files._HOST}-{number}-{'a' * 16}.tmp" for number in (7, 8)}
    for name in (*names.values(), f".quadapt-00000000-8-{'a' * 16}.tmp", ".note.tmp"):
        (tmp_path / name).write_text("")
    files.sweep(tmp_path)
    assert names[8] not in os.listdir(tmp_path)
    assert len(os.listdir(tmp_path)) == 3
