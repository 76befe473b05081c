"""`--push-to-hub`: only what is whole is uploaded; what does not work is said before the work, or with what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from commands import give, quadapt
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from quadapt.hf.notes import JOB, NOTE

Shelf = dict[str, dict[str, Any]]


@dataclass
class Hub:
    """What stands in the place of the hub: it writes down what it is asked."""

    failing: dict[str, Exception] = field(default_factory=dict)
    said: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    seen: dict[str, list[str]] = field(default_factory=dict)

    def called(self, name: str, **asked: Any) -> None:
        if name in self.failing:
            raise self.failing[name]
        self.said.append((name, asked))

    @property
    def names(self) -> list[str]:
        """What was asked, by name and in order."""
        return [name for name, _ in self.said]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    from huggingface_hub import HfApi, RepoUrl

    hub = Hub()

    def create(_: Any, repository: str, **asked: Any) -> RepoUrl:
        hub.called("create", repository=repository, **asked)
        return RepoUrl(f"https://huggingface.co/{repository}")

    def upload(_: Any, *, folder_path: Path, **asked: Any) -> None:
        hub.called("upload", folder_path=Path(folder_path), **asked)
        hub.seen[str(folder_path)] = sorted(str(each.relative_to(folder_path)) for each in folder_path.rglob("*"))

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr(HfApi, "whoami", lambda _: hub.called("whoami"))
    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return hub


QUANTIZE = ("quantize", "dense", "--rounding", "nearest", "-o", "out")


@pytest.mark.usefixtures("away")
def test_a_folder_is_uploaded_when_it_is_whole(hub: Hub) -> None:
    said = quadapt(*QUANTIZE, "--push-to-hub", "me/small", "--private")
    assert said["pushed_to_hub"] == "https://huggingface.co/me/small"
    assert hub.names == ["whoami", "create", "upload"]
    assert hub.said[1][1] == {"repository": "me/small", "private": True, "exist_ok": True}
    about = hub.said[2][1]
    assert (about["repo_id"], about["folder_path"], about["allow_patterns"]) == ("me/small", Path("out"), None)
    files = hub.seen["out"]
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json", NOTE} <= set(files)
    assert JOB not in files
    assert not Path("out.partial").exists()


@pytest.mark.usefixtures("away")
def test_nothing_is_uploaded_of_a_run_that_is_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from quadapt.jobs import quantize as quantizing

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "save_quantized", stopped)
        give(*QUANTIZE, "--push-to-hub", "me/small", code=130)
    assert hub.names == ["whoami"]
    quadapt(*QUANTIZE, "--push-to-hub", "me/other")  # another place changes no result, so the run is gone on with
    assert hub.said[-2][1] == {"repository": "me/other", "private": None, "exist_ok": True}


@pytest.mark.usefixtures("away")
def test_an_upload_that_fails_loses_nothing(hub: Hub) -> None:
    hub.failing["upload"] = ConnectionError("the line is dead\nand more")
    said = give(*QUANTIZE, "--push-to-hub", "me/small", code=2)
    assert "out is written and whole, but could not be uploaded (ConnectionError: the line is dead)" in said.error
    assert said.error.endswith("Upload it by hand: hf upload me/small out")
    assert quadapt("inspect", "out", "--verify")["layers"]


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--push-to-hub", "not a name"), "push_to_hub='not a name' is no name of a repository"),
        (("--private",), "Give --push-to-hub OWNER/NAME"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_the_work(given: tuple[str, ...], words: str, hub: Hub) -> None:
    assert words in give(*QUANTIZE, *given, code=2).error
    assert not Path("out").exists()
    assert hub.said == []


@pytest.mark.usefixtures("away")
def test_no_token_and_no_network_are_said_before_the_work(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OfflineModeIsEnabled("offline"), LocalTokenNotFoundError("none"), TimeoutError()):
        hub.failing["whoami"] = error
        said = give(*QUANTIZE, "--push-to-hub", "me/small", code=2)
        assert f"the hub does not say who you are ({type(error).__name__}" in said.error
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "Log in (hf auth login), or set HF_TOKEN" in give(*QUANTIZE, "--push-to-hub", "me/small", code=2).error
    assert hub.said == []
    assert not Path("out").exists()


@pytest.mark.usefixtures("here")
def test_files_go_up_without_what_lies_beside_them(hub: Hub, shelf: Shelf, tmp_path: Path) -> None:
    """Of a GGUF file's folder only the files that were written; a format that is only asked about uploads nothing."""
    assert shelf
    (tmp_path / "mine.txt").write_text("mine")
    quadapt("export", "q4", "-o", tmp_path / "a.gguf", "--ollama", "--push-to-hub", "me/gguf")
    about = hub.said[-1][1]
    assert (about["folder_path"], about["allow_patterns"]) == (tmp_path, ["a.gguf", "a.Modelfile"])
    quadapt("merge", "adapter", "-o", tmp_path / "merged", "--push-to-hub", "me/merged")
    assert hub.said[-1][1]["folder_path"] == tmp_path / "merged"
    said = give("export", "q4", "--format", "?", "--push-to-hub", "me/gguf", code=2)
    assert "writes nothing that could be uploaded" in said.error


@pytest.mark.usefixtures("away")
def test_a_dry_run_uploads_nothing(hub: Hub) -> None:
    quadapt(*QUANTIZE, "--dry-run", "--push-to-hub", "me/small")
    assert hub.said == []
    assert not Path("out").exists()
