"""What a command has written goes to the hub, once it is whole (`--push-to-hub`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from quadapt.config import Published
from quadapt.errors import ConfigError
from quadapt.report.ui import UI

Config = TypeVar("Config", bound=Published)
More = ParamSpec("More")


def publishes(
    job: Callable[Concatenate[Config, UI, More], dict[str, Any]],
) -> Callable[Concatenate[Config, UI, More], dict[str, Any]]:
    """Let a command's output go to the hub if that is asked for: checked before its work, done after it.

    The result of the command then has `pushed_to_hub`, the address of what was uploaded.
    """

    @wraps(job)
    def work(config: Config, ui: UI, /, *more: More.args, **named: More.kwargs) -> dict[str, Any]:
        if config.push_to_hub is None or getattr(config, "dry_run", False):
            return job(config, ui, *more, **named)
        _check(config.push_to_hub)
        result = job(config, ui, *more, **named)
        address = _pushed(config.push_to_hub, config.written(), private=config.private, ui=ui)
        return {**result, "pushed_to_hub": address}

    return work


def _check(repository: str) -> None:
    """Raise ConfigError if nothing could be uploaded: no token, a wrong one, a name that is none, no network."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub={repository!r} is no name of a repository ({error}). Use OWNER/NAME") from None
    if get_token() is None:
        raise ConfigError(
            f"push_to_hub={repository!r} needs a token of the hub, and there is none. Log in (hf auth login), or set "
            "HF_TOKEN"
        )
    try:
        HfApi().whoami()
    except (OSError, HTTPError) as error:
        raise ConfigError(
            f"push_to_hub={repository!r}: the hub does not say who you are ({_reason(error)}). Log in again (hf auth "
            "login), or leave it out and upload later (hf upload)"
        ) from error


def _pushed(repository: str, files: list[Path], *, private: bool, ui: UI) -> str:
    """Upload a folder, or files that lie beside each other; the address of the repository.

    Raises:
        ConfigError: It did not work. What was written is there, and the message says how to upload it by hand.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    first = files[0]
    folder, names = (first, None) if first.is_dir() else (first.parent, [file.name for file in files])
    ui.say(f"uploading {', '.join(map(str, files))} to {repository}")
    try:
        api = HfApi()
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, allow_patterns=names, commit_message="Upload with quadapt"
        )
    except (OSError, HTTPError, ValueError) as error:
        raise ConfigError(
            f"push_to_hub={repository!r}: {first} is written and whole, but could not be uploaded ({_reason(error)}). "
            f"Upload it by hand: hf upload {repository} {first}"
        ) from error
    ui.show(f"uploaded to {made}")
    return str(made)


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
