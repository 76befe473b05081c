"""The folders that hold models and adapters: what each is, and where an adapter's base lies.

Beside what transformers and PEFT write stands `quadapt.json`: what the folder is, where its base is, how it was made,
what it measured, and the digests that `inspect --verify` checks.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from quadapt.errors import CheckpointError
from quadapt.hf.checkpoint import weight_files
from quadapt.hf.imported import importer_of, one_file
from quadapt.hf.notes import NOTE
from quadapt.hf.reading import read_json, read_note, reason_of
from quadapt.importers import Importer

Kind = Literal["model", "quantized", "adapter"]


@dataclass(frozen=True)
class Folder:
    """A folder (or hub name) that holds a model or an adapter."""

    name: str
    """The path or hub name of the folder, as it was given; of a file that is a whole checkpoint, the file's."""

    kind: Kind
    """model: dense. quantized: by quadapt, merged or not, or by others (`importer`). adapter: over a base that lies
    elsewhere."""

    note: Mapping[str, Any]
    """The content of `quadapt.json`; empty if there is no such file."""

    importer: Importer | None = None
    """What reads a model that others have quantized; None for all that quadapt has written, and for dense models."""

    @property
    def path(self) -> Path:
        """The name of the folder as a path."""
        return Path(self.name)


def open_folder(name: str) -> Folder:
    """Look at a folder without loading it.

    Raises:
        CheckpointError: It does not exist, holds no model, or has a damaged file.
    """
    path = Path(os.path.expanduser(name))
    try:
        there = path.exists()
    except OSError as error:
        raise CheckpointError(f"{name!r} cannot be read ({reason_of(error)})") from error
    if not there:
        path = _from_hub(name)
    file = one_file(path)
    if file is not None:
        return Folder(str(file), "quantized", {}, importer_of(file))
    if path.is_file():
        raise CheckpointError(f"{name!r} is a file. Give the folder that holds config.json or adapter_config.json")
    adapter, model = (path / "adapter_config.json").exists(), (path / "config.json").exists()
    if not adapter and not model:
        partial = path.parent / f"{path.name}.partial"
        hint = f" An unfinished run lies in {str(partial)!r}: give its command again" if partial.exists() else ""
        raise CheckpointError(
            f"{name!r} has neither config.json nor adapter_config.json: it is not a model folder.{hint}"
        )
    _check_files(path)
    note = read_note(path / NOTE) if (path / NOTE).exists() else {}
    about = read_json(path / "config.json").get("quantization_config") if model and not adapter else None
    if about is not None and not isinstance(about, dict):
        raise CheckpointError(f"{path / 'config.json'}: is damaged (quantization_config is no object). Copy it again")
    if adapter:
        return Folder(str(path), "adapter", note)
    if about is not None and about.get("quant_method") == "quadapt":
        return Folder(str(path), "quantized", note)
    importer = importer_of(path)
    return Folder(str(path), "model" if importer is None else "quantized", note, importer)


def _from_hub(name: str) -> Path:
    """The folder to which a model of the hub is, or gets, downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    hint = near(Path(name))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name!r} does not exist.{hint}")
    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md"]  # that has the license
        path = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(path.glob("*.safetensors")):  # older models have pickles alone
            path = Path(snapshot_download(name, allow_patterns=[*wanted, "pytorch_model*.bin", "adapter_model.bin"]))
        return path
    except (OSError, ValueError, HFValidationError) as error:
        reason = type(error).__name__
        raise CheckpointError(f"{name!r} is neither a folder here nor a model on the hub ({reason}).{hint}") from error


def near(path: Path) -> str:
    """What may have been meant by a path that does not exist."""
    beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside)
    return f" Did you mean {str(path.parent / near[0])!r}?" if near else ""


def _check_files(path: Path) -> None:
    """Raise CheckpointError if a weight file is truncated, or a shard of the index is missing."""
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: is damaged or truncated ({reason_of(error)}). Copy it again from its source"
            ) from error
    for index in path.glob("*.index.json"):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise CheckpointError(f"{index}: is damaged (weight_map names no files). Copy it again from its source")
        for shard in sorted(set(shards.values())):
            if Path(shard).name != shard or "\0" in shard:
                raise CheckpointError(f"{index}: names {shard!r}, which is no file of this folder. It is damaged")
            if not (path / shard).exists():
                raise CheckpointError(f"{path}: {shard} is missing, though the index names it. Copy it from its source")
    if (path / "config.json").exists() and not (path / "adapter_config.json").exists() and not weight_files(path):
        raise CheckpointError(
            f"{str(path)!r} has no weights (model.safetensors or pytorch_model.bin). Copy them from the model's source"
        )


def find_base(folder: Folder, given: str | None = None) -> str:
    """Find an adapter's base: where told, or beside the adapter as recorded, or where it was when the adapter was made.

    Raises:
        CheckpointError: None of these exists.
    """
    if given:
        return open_folder(given).name
    base = folder.note.get("base", {})
    tried = []
    for candidate in (folder.path / base["relative"] if base.get("relative") else None, base.get("absolute")):
        if candidate and Path(candidate).exists():
            return os.path.normpath(candidate)
        if candidate:
            tried.append(str(candidate))
    named = base.get("hub") or read_json(folder.path / "adapter_config.json").get("base_model_name_or_path")
    if named is not None and not isinstance(named, str):
        raise CheckpointError(
            f"{folder.name}: base_model_name_or_path in adapter_config.json is no text. It is damaged"
        )
    if not named and not tried:
        raise CheckpointError(
            f"{folder.name}: names no base, since its base was quantized in memory. Save that one too "
            "(model.unload().save_pretrained(FOLDER)), and say where it is with --base (base= in Python)"
        )
    if named and (Path(named).exists() or (not tried and named.count("/") <= 1 and not named.startswith("/"))):
        return str(named)
    raise CheckpointError(
        f"{folder.name}: its base is neither at {' nor at '.join(repr(item) for item in [*tried, named] if item)}. "
        "Say where it is with --base"
    )
