"""What became of each layer's weights and codes, from the folders of a model before and after."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quadapt.errors import QuadaptError
from quadapt.hf.loading import load_model
from quadapt.model.quantize import quantized_layers
from quadapt.quant.rounding import Nearest
from quadapt.quant.weight import QuantWeight

_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Where in a model a layer stands, for charts of layer by kind."""

    block: int
    """The number of the block; -1 for a layer outside of all blocks."""

    kind: str
    """The rest of the name: what the layer is in every block."""

    @classmethod
    def of(cls, name: str) -> Place:
        """The place of a layer by its full name, `model.layers.3.mlp.up_proj`."""
        found = _BLOCK.search(name)
        return cls(-1, name) if found is None else cls(int(found[1]), name[found.end() :])


@torch.no_grad()
def weights_of(dense: str, model: str, base: str | None = None, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Compare a quantized model with the dense one that it was made of, layer by layer.

    Args:
        dense: Folder or hub name of the dense model that was given.
        model: Folder of the quantized model: merged, or the base of an adapter.
        base: Folder of the quantized base from before training; None if there is none.
        trust_remote_code: Run code that comes with the model.

    Returns:
        `layers`: for each layer its `name`, `block`, `kind`, true `bits` per weight, and relative errors (the norm of
        the difference from the dense matrix over the norm of that matrix): `error` of the model, `base_error` of the
        base, or None. `codes`: for each width the counts of codes `before` and `after`, and what `before` is: the
        `base`, or the dense matrix rounded to the `nearest` codes of the same grid.
    """
    code = trust_remote_code
    first = load_model(dense, trust_remote_code=code)
    after = quantized_layers(load_model(model, trust_remote_code=code))
    begun = {} if base is None else quantized_layers(load_model(base, trust_remote_code=code))
    layers: list[dict[str, Any]] = []
    codes: dict[int, dict[str, Any]] = {}
    for name, layer in after.items():
        weight, place = layer.quant_weight, Place.of(name)
        W = first.get_submodule(name).get_parameter("weight").float()
        start = begun[name].quant_weight if name in begun else None
        layers.append(
            {
                "name": name,
                "block": place.block,
                "kind": place.kind,
                "bits": weight.layout.bits_per_weight,
                "error": _error(weight, W),
                "base_error": None if start is None else _error(start, W),
            }
        )
        _count(codes, weight, start, W)
    return {"layers": layers, "codes": {str(bits): codes[bits] for bits in sorted(codes)}}


def _error(weight: QuantWeight, dense: Tensor) -> float:
    return float((weight.dequantize() - dense).norm() / dense.norm().clamp(min=1e-30))


def _count(codes: dict[int, dict[str, Any]], weight: QuantWeight, start: QuantWeight | None, dense: Tensor) -> None:
    """Add a layer's codes to the counts of its width."""
    bits = weight.format.bits
    before = "base"
    if start is None or start.format.bits != bits:  # it trains over dense matrices, or over codes in fixed point
        before = "nearest"
        try:
            start = Nearest()(dense, weight.layout, {})
        except QuadaptError:  # a grid that needs more than the matrix
            start = None
    found = codes.setdefault(
        bits, {"before": [0] * 2**bits, "after": [0] * 2**bits, "before_is": before, "changed": 0, "weights": 0}
    )
    now = weight.codes().flatten()
    _add(found["after"], now)
    found["weights"] += now.numel()
    if start is None:
        found["before"] = None
    elif found["before"] is not None:
        was = start.codes().flatten()
        _add(found["before"], was)
        found["changed"] += int((was != now).sum())


def _add(counts: list[int], codes: Tensor) -> None:
    for code, count in enumerate(torch.bincount(codes.long(), minlength=len(counts)).tolist()):
        counts[code] += count


def gguf_bits(path: Path) -> float:
    """True bits per weight of the matrices in the blocks of a GGUF file; embedding and head do not count."""
    import gguf

    found = [
        tensor
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name.startswith("blk.")
        and tensor.name.endswith(".weight")
        and sum(size > 1 for size in tensor.shape) > 1
    ]
    return 8 * sum(int(tensor.n_bytes) for tensor in found) / sum(int(tensor.n_elements) for tensor in found)
