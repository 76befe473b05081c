"""Digests of what was written, and the check that the bytes are still those."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from quadapt.errors import CheckpointError, QuadaptError
from quadapt.hf.config import QuadaptConfig
from quadapt.quant.weight import Layout, QuantWeight, hash_tensor


def other_digests(folder: Path, config: QuadaptConfig) -> dict[str, str]:
    """SHA-256 of each tensor in a folder's weight files that does not belong to a quantized weight."""
    inside = {f"{name}.{part}" for name, layout in config.layouts.items() for part in layout.shapes}
    return {name: _digest(tensor) for name, tensor in _tensors(folder) if name not in inside}


def verify(folder: Path, digests: Mapping[str, Mapping[str, str]], config: QuadaptConfig) -> list[str]:
    """Check a quantized folder against the digests from when it was written.

    Args:
        folder: Of the model.
        digests: `layers` and `tensors` to SHA-256, from `quadapt.json`.
        config: Its quantization config.

    Returns:
        Names of the layers and tensors that differ or are missing; empty if all is as it was.

    Raises:
        CheckpointError: There are no digests.
    """
    if not digests:
        raise CheckpointError(f"{folder}: quadapt.json has no digests, so nothing can be verified")
    layouts = config.layouts
    owner = {f"{name}.{part}": name for name, layout in layouts.items() for part in layout.shapes}
    weights: dict[str, dict[str, Tensor]] = {}
    seen: dict[str, str] = {}
    for name, tensor in _tensors(folder):
        if name in owner:
            weights.setdefault(owner[name], {})[name.rpartition(".")[2]] = tensor
        else:
            seen[name] = _digest(tensor)
    seen |= {name: _layer_digest(layouts[name], parts) for name, parts in weights.items()}
    wanted = {**digests.get("layers", {}), **digests.get("tensors", {})}
    return [name for name in {**wanted, **seen} if wanted.get(name) != seen.get(name)]


def _layer_digest(layout: Layout, parts: Mapping[str, Any]) -> str:
    try:
        return QuantWeight(layout, {name: parts[name] for name in layout.shapes}).digest()
    except (KeyError, QuadaptError):
        return "damaged"


def _digest(tensor: Tensor) -> str:
    state = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    hash_tensor(state, tensor)
    return state.hexdigest()


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the weight files of a folder, mapped, one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)
