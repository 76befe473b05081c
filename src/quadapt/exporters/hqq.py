"""HQQ's folders, as hqq itself loads them: codes and scales as they are, offsets as zero-points.

    W[o, i] = (code[o, i] - zero[o, g]) * scale[o, g],    g = i // group_size

Codes are those of the matrix `[out * groups, group_size]`, whose rows are cut into as many parts as a byte holds codes
(or an int32 word ten codes of 3 bits): the first part lies in the highest bits. Offsets of floats become zero-points of
float32, `-offset / scale`, each rounded once. hqq computes in the dtype that it is told as it loads.

hqq reads one file, `qmodel.pt`, a dictionary for each module. It also knows safetensors, in which it puts whatever is
no tensor into one; that is what transformers and quadapt read.

Source: `BitPack`, `HQQLinear.state_dict` and `BaseHQQModel.from_quantized` in hqq's code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from quadapt.errors import ExportError
from quadapt.exporters import affine
from quadapt.exporters.codes import DType, Writer
from quadapt.quant.weight import Layout, QuantWeight

_PACKED = {
    2: ("2bit_u8", torch.uint8, 4),
    3: ("3bit_32", torch.int32, 10),
    4: ("4bit_u8", torch.uint8, 2),
    8: ("8bit_u8", torch.uint8, 1),
}
"""For each width the name of the packing, what codes are packed into, and how many of them."""

_TENSORS = ("W_q", "scale", "zero", "bias")

FILE = "qmodel.pt"
"""The name of the file that hqq loads."""


def why_not_layout(layout: Layout) -> str:
    """Why the format cannot hold weights of a layout, whatever their numbers; an empty string if it can."""
    why = affine.why_not_layout(layout, "hqq", bits=tuple(_PACKED), sizes=None)
    if why:
        return why
    size, many = affine.size_of(layout, None), _PACKED[layout.format.bits][2]
    rows = layout.out * layout.columns // size
    if rows % many and layout.format.bits != 3:  # which are filled up
        return (
            f"{rows} groups of {layout.format.bits} bits fill no whole rows of bytes, as hqq has it. Skip the layer "
            "(--skip) when you quantize, or use --format gguf or mlx"
        )
    return ""


class HQQWriter(Writer):
    """Writes for hqq.

    Args:
        dtype: Of scales and of all that is not quantized.
        weights: qmodel: the file that hqq loads. safetensors: the form that transformers and quadapt read.
    """

    name: ClassVar[str] = "hqq"

    def __init__(self, dtype: DType = "float16", weights: Literal["qmodel", "safetensors"] = "qmodel") -> None:
        super().__init__(dtype)
        self.weights = weights

    def why_not(self, weight: QuantWeight) -> str:
        return why_not_layout(weight.layout) or affine.why_not_in_steps(weight, self.floats)

    def check_model(self, model: Any) -> None:
        affine.refuse_linear_form(model, "hqq")

    def parts(self, weight: QuantWeight) -> dict[str, Tensor]:
        layout, bits = weight.layout, weight.format.bits
        size, (packing, kind, _) = affine.size_of(layout, None), _PACKED[bits]
        scales, zeros = (
            affine.by_size(each, layout, size).reshape(-1, 1) for each in (weight.scales, affine.zero_points(weight))
        )
        said = {
            "nbits": bits,
            "group_size": size,
            "axis": 1,
            "shape": (layout.out, layout.columns),
            "packing": packing,
            "unpack_view_dtype": str(kind),
            "compute_dtype": str(self.floats),
            **dict.fromkeys(("channel_wise", "encoded_state_dict", "stores_quant_config"), True),
            **dict.fromkeys(("view_as_float", "quant_scale", "quant_zero"), False),
            **dict.fromkeys(("offload_meta", "optimize", "round_zero"), False),
        }
        return {
            "W_q": _packed(weight.codes().view(-1, size), bits),
            "scale": scales.to(self.floats),
            "zero": zeros.to(torch.float32 if weight.format.zero == "float" else self.floats),
            **{name: _encoded(value) for name, value in said.items()},
        }

    def about(self, layers: Mapping[str, QuantWeight], plain: Sequence[str]) -> dict[str, Any]:
        grids = Counter((each.format.bits, affine.size_of(each.layout, None)) for each in layers.values())
        (bits, size), _ = grids.most_common(1)[0]
        params = {"nbits": bits, "channel_wise": True, "group_size": size, "optimize": False, "round_zero": False}
        params |= {"axis": 1, "view_as_float": False}
        return {
            "quant_method": "hqq",
            "quant_config": {
                "weight_quant_params": params,
                **dict.fromkeys(("scale_quant_params", "zero_quant_params"), None),
            },
            "skip_modules": list(plain),
        }

    def notes(self, model: Any) -> list[str]:
        if self.weights == "safetensors":
            return [
                "transformers 5.23 loads such folders with random weights, and only warns. hqq reads --weights qmodel"
            ]
        return [f"hqq rounds scales and zero-points to its compute_dtype. Load with compute_dtype=torch.{self.dtype}"]

    def _save(self, model: nn.Module, tensors: Mapping[str, Tensor], header: dict[str, str], folder: Path) -> None:
        if self.weights == "safetensors":
            super()._save(model, tensors, header, folder)
            return
        found = _by_module(model, tensors)
        for values in found.values():
            if "W_q" in values:
                del values["encoded_state_dict"]
                values |= {leaf: _decoded(each) for leaf, each in values.items() if leaf not in _TENSORS}
        torch.save(found, folder / FILE)


def _by_module(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """All tensors by the names of their modules, which hqq knows them by; a head that is tied has its own, too.

    Raises:
        ExportError: One belongs to no module that has no others in it, and hqq would leave it out.
    """
    modules, found = dict(model.named_modules()), dict[str, dict[str, Any]]()
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module not in modules or next(modules[module].children(), None) is not None:
            raise ExportError(f"{name}: belongs to no module that hqq reads. Use --format mlx, torchao or hf")
        found.setdefault(module, {})[leaf] = tensor
    owners = {id(modules[name].weight): name for name in found if hasattr(modules[name], "weight")}
    for name, module in modules.items():
        owner = owners.get(id(getattr(module, "weight", None)))
        if owner is not None and name not in found:
            found[name] = dict(found[owner])
    return found


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes `[rows, group_size]`, uint8, as hqq packs them; rows of zeros fill the last words of 3 bits."""
    _, kind, many = _PACKED[bits]
    count = -(-len(codes) // many)
    filled = torch.nn.functional.pad(codes, (0, 0, 0, count * many - len(codes))).to(kind)
    found = torch.zeros_like(filled[:count])
    for at, part in enumerate(filled.split(count)):
        found |= part << bits * (many - 1 - at)
    return found


def _encoded(value: Any) -> Tensor:
    """What is no tensor as one, as hqq has it in safetensors."""
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, str):
        return torch.tensor([ord(each) for each in value], dtype=torch.uint8)
    return torch.tensor(value) if isinstance(value, tuple) else torch.tensor(value, dtype=torch.int32)


def _decoded(held: Tensor) -> Any:
    """What :func:`_encoded` has made a tensor of, as hqq has it in its own file."""
    if held.dtype == torch.uint8 and held.ndim == 1:
        text = "".join(map(chr, held.tolist()))
        return getattr(torch, text.removeprefix("torch.")) if text.startswith("torch.") else text
    if held.ndim:
        return torch.Size(held.tolist())
    return bool(held) if held.dtype == torch.uint8 else int(held)
