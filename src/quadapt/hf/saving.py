"""Writing folders of models: transformers' files, and `quadapt.json` with the digests of all of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from quadapt.hf.card import CARD, quantized_card
from quadapt.hf.config import QuadaptConfig
from quadapt.hf.ending import set_ends
from quadapt.hf.kinds import kind_of_model
from quadapt.hf.notes import NOTE
from quadapt.hf.quantizer import base_config
from quadapt.hf.verify import digests_of
from quadapt.hf.workspace import write_json
from quadapt.model.quantize import quantized_layers


def save_quantized(model: nn.Module, tokenizer: Any, folder: Path, note: Mapping[str, Any]) -> None:
    """Write a quantized model: transformers' files, tokenizer, model card, and `quadapt.json` with all digests.

    The folder should be one in the making, see `Workspace`.
    """
    config = base_config(model)
    set_ends(model, tokenizer)
    model.save_pretrained(folder, max_shard_size="4GB")  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    copy_processor(model, folder)
    layers = {name: layer.quant_weight.digest() for name, layer in quantized_layers(model).items()}
    write_note(folder, note, config, layers)
    kind = kind_of_model(model)
    (folder / CARD).write_text(quantized_card(config, note, None if kind is None else kind.name), encoding="utf-8")


def copy_processor(model: Any, folder: Path) -> None:
    """Copy how pictures and sound are prepared, where a model that takes them came with its folder."""
    source = Path(model.config.name_or_path or ".")
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        if model.config.get_text_config() is not model.config and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_note(
    folder: Path, note: Mapping[str, Any], config: QuadaptConfig | None = None, layers: Mapping[str, str] | None = None
) -> None:
    """Write `quadapt.json`, with digests of all else that is in the folder by now; see :func:`digests_of`."""
    write_json(folder / NOTE, {**note, "digests": digests_of(folder, note, config, layers)})
