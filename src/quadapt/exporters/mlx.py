"""MLX folders of mode affine, as mlx-lm loads them: codes, scales and offsets as they are.

    W[o, i] = scales[o, g] * code[o, i] + biases[o, g],    g = i // group_size

That is the stored form itself. Codes are a dense stream of bits in uint32 words, the least significant first: our rows
of bytes. MLX computes in the dtype of the scales, and rounds the product and the sum to it. Layers may differ in bits
and group size: shapes say it, and the folder names those that are unlike most.

mlx-lm has a model class of its own for each family, which reads the configuration as it was before transformers 5:
fields of rotary embeddings are written as they were then, too.

Source: `quantize` in MLX's documentation, `load_model` in mlx-lm's code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from quadapt.errors import ExportError
from quadapt.exporters import affine
from quadapt.exporters.codes import Writer
from quadapt.hf.stored_form import stacks_of
from quadapt.model.linear_form import turned
from quadapt.model.quantize import quantized_layers
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.quant.words import words

_BITS = (2, 3, 4, 5, 6, 8)

_SIZES = (32, 64, 128)

_STACKED = ("mixtral", "qwen2_moe", "olmoe")

FAMILIES = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "olmo2",
        "olmo3",
        "granite",
    ),
    *("stablelm", "starcoder2", "cohere", "smollm3", "gpt_neox", *_STACKED),
)
"""Families that have been run in mlx-lm beside transformers, by the name that configurations have for them."""

_NEOX = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
"""What configurations of GPT-NeoX called the fields of their rotary embedding."""

_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(.*)")


def why_not_layout(layout: Layout) -> str:
    """Why the format cannot hold weights of a layout, whatever their numbers; an empty string if it can."""
    return affine.why_not_layout(layout, "mlx", bits=_BITS, sizes=_SIZES)


class MLXWriter(Writer):
    """Writes for mlx-lm, and so for what is built on it."""

    name: ClassVar[str] = "mlx"

    def why_not(self, weight: QuantWeight) -> str:
        return why_not_layout(weight.layout) or affine.why_not_numbers(weight, self.floats)

    def why_not_together(self, layouts: Mapping[str, Layout]) -> str:
        first: dict[tuple[str, ...], str] = {}
        for name, layout in layouts.items():
            found = _EXPERT.fullmatch(name)
            other = first.setdefault(found.groups(), name) if found else name
            if _grid(layout) != _grid(layouts[other]):
                return (
                    f"{name}: is {layout.name}, and {other} {layouts[other].name}: mlx-lm stacks experts, which must "
                    "be alike. Use --format gguf or hf"
                )
        return ""

    def parts(self, weight: QuantWeight) -> dict[str, Tensor]:
        layout = weight.layout
        size = affine.size_of(layout, _SIZES)
        scales, biases = (
            affine.by_size(values, layout, size).to(self.floats).contiguous()
            for values in (weight.scales, affine.offsets_of(weight))
        )
        return {"weight": words(weight.packed).view(torch.uint32), "scales": scales, "biases": biases}

    def about(self, layers: Mapping[str, QuantWeight], plain: Sequence[str]) -> dict[str, Any]:
        grids = {name: _grid(weight.layout) for name, weight in layers.items()}
        common = Counter(grids.values()).most_common(1)[0][0]
        others = {name: _said(*grid) for name, grid in grids.items() if grid != common}
        return {**_said(*common), **others}

    def check_model(self, model: Any) -> None:
        kind, stacks = model.config.model_type, next(stacks_of(model), None)
        if turned(model):
            raise ExportError(
                f"{turned(model)[0]}: is a Conv1D in transformers, which mlx-lm transposes as it loads, packed codes "
                "too. Use --format gguf or hf"
            )
        if stacks is not None and kind not in FAMILIES:
            raise ExportError(
                f"{stacks.path}: experts of {kind} are stacked by mlx-lm in a way of their own, and those of "
                f"{', '.join(_STACKED)} are known. Use --format hf"
            )
        for name in quantized_layers(model):
            if name.endswith(".kv_b_proj"):
                raise ExportError(
                    f"{name}: is taken apart and quantized anew when mlx-lm loads it. Leave it dense when you quantize "
                    "(--skip kv_b_proj), or use --format hf"
                )

    def fields(self, config: Any, said: Mapping[str, Any]) -> dict[str, Any]:
        before = {name: getattr(config, name) for name in config.attribute_map if name not in said}
        before |= _rope_before(said.get("rope_parameters") or {})
        if said["model_type"] == "gpt_neox":
            before |= {new: before[old] for new, old in _NEOX.items() if old in before}
        return {"quantization": said["quantization_config"], **before}

    def notes(self, model: Any) -> list[str]:
        kind = model.config.model_type
        found = [
            f"MLX computes in the dtype of the scales: in {self.dtype} it rounds each weight as it takes it. --dtype "
            "float32 computes with the very weights"
        ]
        if kind not in FAMILIES:
            found.append(
                f"mlx-lm has a class of its own for each family, and {kind} has not been run there. Compare its "
                "answers before you serve it"
            )
        return found if self.dtype != "float32" else found[1:]


def _grid(layout: Layout) -> tuple[int, int]:
    """The group size and the bits of a layer, as MLX has them."""
    return affine.size_of(layout, _SIZES), layout.format.bits


def _said(size: int, bits: int) -> dict[str, Any]:
    """How a group size and a width are said in a folder."""
    return {"group_size": size, "bits": bits, "mode": "affine"}


def _rope_before(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of rotary embeddings as configurations had them before transformers 5."""
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    said = {name: full[name] for name in ("rope_theta", "partial_rotary_factor") if name in full}
    if "rope_theta" in local:
        said["rope_local_base_freq"] = local["rope_theta"]
    if full.get("rope_type", "default") != "default":
        said["rope_scaling"] = {name: value for name, value in full.items() if name not in said}
    return said
