"""An adapter held as nf8, with its base where it is: what LQ-LoRA calls model compression."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from torch import nn

from quadapt.errors import ExportError
from quadapt.exporters.files import new_folder
from quadapt.exporters.lora import Layers, adapted, as_lora, fit_rank, refuse_parts
from quadapt.exporters.report import ExportReport, TensorRow, size_of
from quadapt.model.quantize import bits_of


def export_nf8(model: nn.Module, folder: str | Path, *, adapter_name: str = "default") -> ExportReport:
    """Write an adapter with its factors as nf8. `quadapt.load`, eval and chat take the folder like any adapter.

    Args:
        model: A PEFT model over quantized layers.
        folder: Must not exist, or be empty.
        adapter_name: Which adapter.

    Raises:
        ExportError: The folder is taken, or the model has no such adapter, or it is no low-rank branch.
    """
    from quadapt.hf.adapter_config import KEY, identity_of
    from quadapt.hf.compressed import NF8_FILE, write_nf8
    from quadapt.nn.adapters import LoRA

    layers, path = check_nf8(model, adapter_name), Path(folder)
    factors = {name: as_lora(name, layers, adapter_name) for name in layers}
    known: Any = model.peft_config
    config = copy.copy(known[adapter_name])
    fingerprint = identity_of(config).get("base_fingerprint", "")
    config.auto_mapping = {KEY: {**LoRA().identity(), "base_fingerprint": fingerprint}}
    fit_rank(config, model, factors, adapter_name)
    with new_folder(path) as partial:
        sizes = write_nf8(partial / NF8_FILE, factors)
        config.save_pretrained(str(partial))
    layouts = [layer.quant.layout for layer in layers.values()]
    weights = sum(layout.out * layout.columns for layout in layouts)
    extra = 8 * sum(sizes.values()) / weights
    base = bits_of(layouts)
    rows = [TensorRow(name=name, type="NF8", shape=(), nbytes=size) for name, size in sizes.items()]
    return ExportReport(
        format="nf8",
        path=str(path),
        bytes=size_of(path),
        tensors=tuple(rows),
        bits_per_weight=extra,
        notes=(f"effective bits per weight: {base:.3f} for the base, {extra:.3f} for the adapter: {base + extra:.3f}",),
    )


def check_nf8(model: nn.Module, adapter_name: str = "default") -> Layers:
    """The quantized layers that carry an adapter, all of which the format can hold.

    Raises:
        ExportError: There are none, or their adapters merge, or more has trained than the format can hold.
    """
    layers = adapted(model, adapter_name)
    refuse_parts(model, "which nf8 cannot hold. Use --format lora", with_base=False)
    for name, layer in layers.items():
        if layer.lora_bias[adapter_name]:
            raise ExportError(f"{name}: its lora_B has a bias (lora_bias), which nf8 cannot hold. Use --format lora")
        if layer.adapters[adapter_name].exactness != "none":
            raise ExportError(f"{name}: the adapter merges into the codes, and then takes no bits at all. Merge it")
    return layers


def base_note(folder_note: Any, where: str, output: Path) -> dict[str, Any]:
    """`quadapt.json` of such a folder: where the base is, and what trained the adapter."""
    final = Path(where).resolve()
    base = {"relative": os.path.relpath(final, output.resolve()), "absolute": str(final), "hub": None}
    names = ("method", "recipe", "steps", "final_loss", "eval_loss", "settings", "prompt")
    kept = {name: folder_note.get(name) for name in names}
    return {"kind": "adapter", "adapter": {"kind": "lora"}, **kept, "base": base}
