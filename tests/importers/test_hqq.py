"""HQQ folders: the numbers of the file, the logits of the matrices that they mean, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.hqq_pack_numpy import quantized, read, write
from torch import Tensor, nn

import quadapt
from quadapt.errors import CheckpointError, ShapeError
from quadapt.importers.hqq import HQQ
from quadapt.model.quantize import quantized_layers

ABOUT = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}, "skip_modules": ["lm_head"]}


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 32), (4, 32), (8, 32)])
def test_weights_are_those_of_the_file_and_so_are_logits(
    bits: int, group: int, tmp_path: Path, foreign: Callable[..., nn.Module]
) -> None:
    def pack(name: str, W: np.ndarray) -> Any:
        if name == "lm_head":
            return None
        parts = write(quantized(W, bits, group), bits, W.shape)
        return parts, read(parts)

    dense = foreign(tmp_path / "hqq", pack, ABOUT)
    model, _ = quadapt.load(str(tmp_path / "hqq"), dtype="float32")
    layers = quantized_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.quant_weight.dequantize(), dense.get_submodule(name).weight), name
        assert layer.layout.format.name == f"int{bits}-g{group}"
        assert (layer.layout.storage.scales, layer.layout.storage.offsets) == ("fp16", "fp32")
    ids = torch.arange(40).view(2, 20)
    assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_those_of_the_library(bits: int, dtype: torch.dtype) -> None:
    core = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    settings = core.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    theirs = core.HQQLinear(nn.Linear(256, 24, bias=False), settings, compute_dtype=dtype, device="cpu")
    parts = theirs.state_dict()
    exact = {name: parts[name].float() for name in ("scale", "zero")} | {"compute_dtype": torch.float32}
    layout = HQQ.of({}).layout(parts, 24, 256)
    found = HQQ.of({}).weight(parts, layout)
    assert torch.equal(found.dequantize(), core.Quantizer.dequantize(theirs.W_q.data, theirs.meta | exact))
    torch.testing.assert_close(found.dequantize(dtype), theirs.dequantize())


def layer() -> dict[str, Tensor]:
    parts = write(quantized(np.random.default_rng(0).normal(size=(16, 128)), 4, 64), 4, (16, 128))
    return {name: torch.from_numpy(each) for name, each in parts.items()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axis": torch.tensor(0)}, r"axis: is 0, and groups along the inputs \(1\) are read. Give the dense"),
        ({"nbits": torch.tensor(1)}, "nbits: is 1, and 2, 3, 4 and 8 are read. Give the dense"),
        ({"group_size": torch.tensor(96)}, "rows of 128 inputs and groups of 96, so that groups cross rows"),
        ({"group_size": torch.tensor(32)}, "W_q: is uint8 16 x 64, where uint8 32 x 32 belongs"),
        ({"shape": torch.tensor([128, 16])}, r"shape: is \[128, 16\], and the model has 16 x 128"),
        (
            {"scale": torch.ones(32, 1).double()},
            "scale: is float64 32 x 1, where float16 or bfloat16 or float32 32 x 1",
        ),
        ({"nbits": torch.ones(2)}, "nbits: has 2 numbers, where one belongs"),
    ],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Tensor], words: str) -> None:
    with pytest.raises((CheckpointError, ShapeError), match=words):
        HQQ.of({}).layout(layer() | changes, 16, 128)
