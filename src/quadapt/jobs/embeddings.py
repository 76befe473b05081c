"""What commands do about `--embeddings`: round before all else, say so, and note it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quadapt.config import Grid
from quadapt.hf.kinds import kind_of_model
from quadapt.hf.loading import load_model, load_processor
from quadapt.hf.saving import copy_processor
from quadapt.model.embeddings import round_embeddings
from quadapt.model.quantize import bits_of
from quadapt.model.select import select
from quadapt.quant.weight import hash_tensor
from quadapt.report.ui import UI


@dataclass(frozen=True)
class Rounded:
    """What was rounded before a model was quantized or trained."""

    made: Mapping[str, Any] = field(default_factory=dict)
    """What the folder's config and report say about it, under `embeddings`; empty if nothing was rounded."""

    digest: str = ""
    """SHA-256 of the rounded matrices, which tells a base from one whose embeddings are others; empty if none was."""


def rounded_embeddings(model: Any, config: Grid, chosen: Mapping[str, nn.Linear], ui: UI | None = None) -> Rounded:
    """Round embedding and head of a dense model in place, if the settings ask for it.

    Args:
        model: Of transformers.
        config: The settings, of which `embeddings` and `dtype` count.
        chosen: The layers that will be quantized, by name.
        ui: Where it is said.

    Raises:
        ConfigError: They do not fit the type, or their dtype does not hold its values.
    """
    if config.embeddings == "float":
        return Rounded()
    wanted = config.dtype  # type: ignore[attr-defined]
    dtype = None if wanted == "auto" else getattr(torch, wanted)
    layouts = round_embeddings(model, config.embeddings, chosen, dtype)
    bits, state = bits_of(list(layouts.values())), hashlib.sha256(config.embeddings.encode())
    for name in layouts:
        state.update(name.encode())
        hash_tensor(state, model.get_submodule(name).weight)
    if ui is not None:
        ui.show(f"{', '.join(layouts)}: rounded to {config.embeddings}, {bits:g} bits a weight in a GGUF file")
    made = {"kind": config.embeddings, "layers": list(layouts), "bits_per_weight": bits}
    return Rounded({"embeddings": made}, state.hexdigest())


def dense_base(path: Path, config: Any, ui: UI, *, source: Path | None = None) -> None:
    """Write a dense model whose embeddings are rounded, or that has a new head: the base of a method over dense ones.

    Args:
        path: The folder that is filled.
        config: The settings, of which the model, `embeddings`, `skip` and `dtype` count.
        ui: Where it is said.
        source: What is taken in the place of the settings' model: that model, tuned first.
    """
    kept = "float32" if config.dtype == "float32" else "auto"
    name, head = (config.model, config.head) if source is None else (str(source), None)
    model: Any = load_model(name, dtype=kept, trust_remote_code=config.trust_remote_code, head=head)
    rounded_embeddings(model, config, select(model, skip=config.skip, part=config.part).chosen, ui)
    write_dense(
        model, load_processor(config.model, kind_of_model(model), trust_remote_code=config.trust_remote_code), path
    )


def write_dense(model: Any, tokenizer: Any, path: Path) -> None:
    """Write a dense model that was made of another one, with all that belongs to it, into a folder that exists."""
    model.save_pretrained(path, max_shard_size="4GB")
    tokenizer.save_pretrained(path)
    copy_processor(model, path)
