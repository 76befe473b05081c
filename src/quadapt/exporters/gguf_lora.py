"""llama.cpp's own form of an adapter: for LoRA over codes that cannot merge, served as base.gguf + adapter.gguf."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from quadapt.errors import ExportError
from quadapt.exporters.files import new_file
from quadapt.exporters.gguf_entries import Entry, Stack, stacked, write_tensors
from quadapt.exporters.gguf_metadata import family_of, namer, text_config
from quadapt.exporters.lora import Layers, adapted, adapter_report, as_lora, refuse_parts
from quadapt.exporters.report import ExportReport, TensorRow
from quadapt.model.quantize import quantized_layers

_ADVICE = "which a GGUF adapter cannot hold. Use --format lora"


def export_gguf_lora(model: nn.Module, path: str | Path, *, adapter_name: str = "default") -> ExportReport:
    """Write an adapter as a GGUF file, to be loaded together with the GGUF file of its base.

    Args:
        model: A PEFT model over quantized layers of one of the families in `gguf_families.py`.
        path: The file; one that is there is replaced when the new one is whole.
        adapter_name: Which adapter.

    Raises:
        ExportError: There is no such adapter, or it is more than a LoRA with one alpha over quantized layers.
    """
    layers, path = adapted(model, adapter_name), Path(path)
    base: Any = model.get_base_model()  # type: ignore[operator]
    refuse_parts(model, _ADVICE, with_base=True)
    alpha, family = alpha_of(model, adapter_name), family_of(base)
    entries = _entries(layers, adapter_name, base)
    write_lora(path, family.arch, alpha, entries)
    return adapter_report("gguf-lora", path, [entry.row for entry in entries], layers, adapter_name)


def write_lora(path: Path, arch: str, alpha: float, entries: Sequence[Entry | Stack]) -> None:
    """Write factors as an adapter of llama.cpp's.

    Args:
        path: The file; one that is there is replaced when the new one is whole.
        arch: The name of the base's architecture in GGUF files.
        alpha: The scaling times the rank; zero for a scaling of one.
        entries: The factors, named as the tensors that they are added to, with `.lora_a` and `.lora_b` at the end.
    """
    import gguf

    with new_file(path) as partial:
        writer = gguf.GGUFWriter(partial, arch)
        try:
            writer.add_type("adapter")
            writer.add_name(path.stem)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            write_tensors(writer, entries)
        finally:
            writer.close()


def _entries(layers: Layers, adapter_name: str, base: Any) -> list[Entry | Stack]:
    family, config, entries = family_of(base), text_config(base), []
    name_of = namer(family, config.num_hidden_layers)
    for name in layers:
        A, B = as_lora(name, layers, adapter_name)
        weight = f"{name}.weight"
        for suffix, factor, order in (("lora_a", A, None), ("lora_b", B, family.order(weight, config, len(B)))):
            row = TensorRow(
                name=f"{name_of(weight)}.{suffix}", type="F32", shape=tuple(factor.shape), nbytes=4 * factor.numel()
            )
            entries.append(Entry(row, factor, order))
    _refuse_some_of_a_stack(layers, base, name_of)
    return stacked(entries, "F32")


def _refuse_some_of_a_stack(layers: Layers, base: Any, name_of: Callable[[str], str]) -> None:
    """Raise ExportError if the adapter is over some of the experts whose matrices a file has in one tensor."""
    every = [name.removesuffix(".base_layer") for name in quantized_layers(base)]
    found, there = (Counter(name_of(f"{name}.weight") for name in names) for names in (layers, every))
    for name, count in found.items():
        if count != there[name]:
            raise ExportError(f"{name}: {count} of its {there[name]} matrices have an adapter, {_ADVICE}")


def alpha_of(model: nn.Module, adapter_name: str = "default") -> float:
    """The one alpha of an adapter that a GGUF file can hold.

    Raises:
        ExportError: There is no such adapter, or it is more than a LoRA with one alpha over quantized layers. What has
            trained besides is not looked at: it may go out with the base.
    """
    layers = adapted(model, adapter_name)
    for name, layer in layers.items():
        if layer.lora_bias[adapter_name]:
            raise ExportError(f"{name}: its lora_B has a bias (lora_bias), {_ADVICE}")
    ranks = {name: len(as_lora(name, layers, adapter_name)[0]) for name in layers}
    alphas = sorted({round(layer.scaling[adapter_name] * ranks[name], 6) for name, layer in layers.items()})
    if len(alphas) > 1:
        raise ExportError(f"adapter {adapter_name!r}: its layers have more than one alpha ({alphas}), {_ADVICE}")
    return alphas[0]
