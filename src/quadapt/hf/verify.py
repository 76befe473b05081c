"""Digests of what was written, and the check that it is still that.

They cover all that decides what a model says: each tensor, the configs, the tokenizer, and `quadapt.json` itself, so
that a certificate holds for this model with these figures or for none. They stand in `quadapt.json` under `digests`:

* `layers`, `tensors`: SHA-256 of each quantized layer and of each other tensor;
* `files`: of each file that transformers or PEFT read, JSON by its content (layout and order of keys do not count);
* `note`: of each entry of `quadapt.json`;
* `seal`: over all these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from quadapt.errors import CheckpointError, QuadaptError
from quadapt.hf.config import QuadaptConfig
from quadapt.model.quantize import fingerprint_of_digests
from quadapt.quant.weight import Layout, QuantWeight, hash_tensor

FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.jinja",
    "vocab*",
    "merges.txt",
    "*.model",
    "*processor_config.json",
    "*.py",
)
"""Names of files beside the weights that decide what a model says."""

LATER = {
    "files": "the configs and the tokenizer",
    "note": "the certificate and the other figures of quadapt.json",
}
"""What earlier versions wrote no digests of."""


def digests_of(
    folder: Path, note: Mapping[str, Any], config: QuadaptConfig | None = None, layers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Digests of a folder in which all but `quadapt.json` is written, and of what is to stand there.

    Args:
        folder: The folder of a quantized model, or of an adapter.
        note: The content of `quadapt.json`, but for the digests.
        config: The quantization config of the model; None for an adapter.
        layers: The digests of the model's layers, as they are in memory.
    """
    inside = set(_owners(config))
    found: dict[str, Any] = {
        "layers": dict(layers or {}),
        "tensors": {name: _digest(tensor) for name, tensor in _tensors(folder) if name not in inside},
        "files": _files(folder),
        "note": _entries(note),
    }
    return {**found, "seal": _json_digest(found)}


def verify(folder: Path, note: Mapping[str, Any], config: QuadaptConfig | None = None) -> list[str]:
    """Check a folder against the digests from when it was written.

    Args:
        folder: The folder of a quantized model, or of an adapter.
        note: The content of the folder's `quadapt.json`.
        config: The quantization config of the model; None for an adapter.

    Returns:
        Names of the layers, tensors, files and entries of `quadapt.json` that differ, are missing or were added; empty
        if all is as it was.

    Raises:
        CheckpointError: There are no digests.
    """
    digests = note.get("digests")
    if not digests:
        raise CheckpointError(
            f"{folder}: quadapt.json has no digests, so nothing can be verified: it was saved from memory, or by an "
            "earlier version"
        )
    seen = _seen(folder, config)
    wanted = {**digests.get("layers", {}), **digests.get("tensors", {})}
    if config is not None:
        wanted["fingerprint"] = config.fingerprint
        seen["fingerprint"] = fingerprint_of_digests(digests.get("layers", {}), config.besides)
    if "seal" in digests:
        wanted |= digests.get("files", {}) | {_entry(name): value for name, value in digests.get("note", {}).items()}
        wanted[_entry("digests")] = digests["seal"]
        seen |= _files(folder) | {_entry(name): value for name, value in _entries(note).items()}
        seen[_entry("digests")] = _json_digest({name: value for name, value in digests.items() if name != "seal"})
    return [name for name in {**wanted, **seen} if wanted.get(name) != seen.get(name)]


def unverified(note: Mapping[str, Any]) -> list[str]:
    """What a folder has no digests of, since an earlier version wrote it."""
    return [] if "seal" in note.get("digests", {}) else list(LATER.values())


def _seen(folder: Path, config: QuadaptConfig | None) -> dict[str, str]:
    """Digest of each layer and each other tensor that the weight files hold now."""
    owners = _owners(config)
    weights: dict[str, dict[str, Tensor]] = {}
    seen: dict[str, str] = {}
    for name, tensor in _tensors(folder):
        if name in owners and config is not None:
            weights.setdefault(owners[name], {})[name.rpartition(".")[2]] = tensor
        else:
            seen[name] = _digest(tensor)
    layouts = config.layouts if config is not None else {}
    return seen | {name: _layer_digest(layouts[name], parts) for name, parts in weights.items()}


def _owners(config: QuadaptConfig | None) -> dict[str, str]:
    """The quantized layer that each of their tensors belongs to."""
    layouts = config.layouts if config is not None else {}
    return {f"{name}.{part}": name for name, layout in layouts.items() for part in layout.shapes}


def _layer_digest(layout: Layout, parts: Mapping[str, Any]) -> str:
    try:
        return QuantWeight(layout, {name: parts[name] for name in layout.shapes}).digest()
    except (KeyError, QuadaptError):
        return "damaged"


def _digest(tensor: Tensor) -> str:
    state = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    hash_tensor(state, tensor)
    return state.hexdigest()


def _files(folder: Path) -> dict[str, str]:
    paths = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.name: _file_digest(path) for path in sorted(paths)}


def _file_digest(path: Path) -> str:
    content = path.read_bytes()
    try:
        return _json_digest(json.loads(content))
    except (ValueError, RecursionError):
        return hashlib.sha256(content).hexdigest()


def _entries(note: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each entry of `quadapt.json`."""
    return {name: _json_digest(value) for name, value in note.items() if name != "digests"}


def _entry(name: str) -> str:
    return f"{name} (in quadapt.json)"


def _json_digest(value: Any) -> str:
    """SHA-256 of a value as JSON gives it back, where tuples are lists and keys are text."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the weight files of a folder, mapped, one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)
