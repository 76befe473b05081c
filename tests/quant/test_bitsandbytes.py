"""QLoRA's format beside bitsandbytes itself: the same codes, the same weights, the same layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quadapt.kernels import pack
from quadapt.methods import method_named
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.format import Format, normal_levels
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

bnb = pytest.importorskip("bitsandbytes")
from bitsandbytes import functional  # noqa: E402 - only where it is installed

SHAPES = [(64, 64), (48, 256), (257, 128), (2, 64), (100, 1024)]


def qlora(weight: Tensor) -> QuantWeight:
    method = method_named("qlora")
    layout = Layout(format=method.format, storage=method.storage, out=weight.shape[0], columns=weight.shape[1])
    return method.rounding(weight, layout, {})


def theirs(weight: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Codes and weights of bitsandbytes, and its state."""
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed = packed.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: weight.numel()].view(weight.shape)
    return codes, functional.dequantize_4bit(packed[:, None], state), state


def distance_from_midpoints(weight: Tensor, at: Tensor) -> Tensor:
    """How far the weights at some places lie from the nearest threshold, in units of their group's largest weight."""
    unit = weight / weight.abs().unflatten(1, (-1, 64)).amax(-1).repeat_interleave(64, 1)
    levels = torch.tensor(normal_levels(4))
    return (unit[at][:, None] - (levels[1:] + levels[:-1]) / 2).abs().amin(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_codes_are_the_same_but_for_ties(shape: tuple[int, int], std: float) -> None:
    weight = std * torch.randn(shape)
    differing = qlora(weight).codes() != theirs(weight)[0]
    assert int(differing.sum()) <= 3
    assert bool((distance_from_midpoints(weight, differing) < 1e-6).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_scales_are_the_same_but_for_ties(shape: tuple[int, int], std: float) -> None:
    weight = std * torch.randn(shape)
    ours, (_, _, state) = qlora(weight), theirs(weight)
    differing = (ours.tensors["scales"].flatten().int() - state.absmax.flatten().int()).abs()
    assert int(differing.max()) <= 1
    assert int(differing.sum()) <= 3
    exact = weight.abs().unflatten(1, (-1, 64)).amax(-1).flatten() - state.offset
    unit = exact / state.state2.absmax.repeat_interleave(256)[: len(exact)]
    middles = (state.state2.code[1:] + state.state2.code[:-1]) / 2
    away = (unit[differing > 0][:, None] - middles).abs().amin(1)
    assert bool((away < 1e-5).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_weights_are_the_same_where_codes_are(shape: tuple[int, int], std: float) -> None:
    weight = std * torch.randn(shape)
    codes, dense, state = theirs(weight)
    ours = qlora(weight)
    same_scales = (ours.tensors["scales"].flatten() == state.absmax.flatten()).view(shape[0], -1)
    same = (ours.codes() == codes) & same_scales.repeat_interleave(64, 1)
    assert float(same.float().mean()) > 0.9
    torch.testing.assert_close(ours.dequantize()[same], dense[same], rtol=1e-6, atol=1e-6 * std)


def held(weight: Tensor) -> QuantWeight:
    """bitsandbytes' own tensors in our stored form."""
    codes, _, state = theirs(weight)
    kept = {
        "weight": pack(codes, 4),
        "scales": state.absmax.view(weight.shape[0], -1),
        "scales_absmax": state.state2.absmax[:, None].view(torch.uint8),
        "scales_mean": state.offset.view(1, 1).view(torch.uint8),
    }
    return QuantWeight(qlora(weight).layout, kept)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_stored_form_holds_what_bitsandbytes_made(shape: tuple[int, int]) -> None:
    weight = 0.02 * torch.randn(shape)
    torch.testing.assert_close(held(weight).dequantize(), theirs(weight)[1], rtol=1e-6, atol=1e-8)


def test_second_level_constants_are_the_same() -> None:
    weight = 0.02 * torch.randn(100, 1024)
    ours, want = qlora(weight), held(weight)
    for name in ("scales_absmax", "scales_mean"):
        mine, theirs_ = (each.tensors[name].contiguous().view(torch.float32) for each in (ours, want))
        torch.testing.assert_close(mine, theirs_, rtol=1e-6, atol=0)


def test_the_bytes_are_as_many() -> None:
    weight = torch.randn(64, 1024)
    ours, (codes, _, state) = qlora(weight), theirs(weight)
    constants = state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    assert ours.nbytes == codes.numel() // 2 + constants


def test_without_double_quantization_weights_are_the_same_too() -> None:
    weight = torch.randn(64, 256)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    format = Format(levels="nf", bits=4, group_size=64)
    layout = Layout(format=format, storage=Storage(scales="fp32", offsets="absent"), out=64, columns=256)
    found = Nearest()(weight, layout).dequantize()
    missed = (found - functional.dequantize_4bit(packed, state)).abs() > 1e-6
    assert int(missed.sum()) <= 3
    assert bool((distance_from_midpoints(weight, missed) < 1e-6).all())


@pytest.mark.parametrize(("levels", "kind"), [("fp4", "fp4"), ("nf-qlora", "nf4")])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_to_its_own_tables_gives_its_own_weights(shape: tuple[int, int], levels: str, kind: str) -> None:
    weight = 0.02 * torch.randn(shape)
    weight[0, :64] = 0
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    format = Format(levels=levels, bits=4, group_size=64)
    layout = Layout(format=format, storage=Storage(scales="fp32", offsets="absent"), out=shape[0], columns=shape[1])
    differing = Nearest()(weight, layout).dequantize() != functional.dequantize_4bit(packed, state)
    assert int(differing.sum()) <= 3
    unit = weight / weight.abs().unflatten(1, (-1, 64)).amax(-1).repeat_interleave(64, 1)
    table = format.table(weight)
    assert bool(((unit[differing][:, None] - (table[1:] + table[:-1]) / 2).abs().amin(1) < 1e-6).all())


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_computes_what_linear4bit_does(bias: bool) -> None:
    dense = torch.nn.Linear(128, 96, bias=bias)
    layer = bnb.nn.Linear4bit(128, 96, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu")  # quantizes
    x = torch.randn(5, 128)
    same = QuantLinear.of(held(dense.weight.detach()), dense.bias)
    torch.testing.assert_close(same(x), layer(x), rtol=1e-5, atol=1e-6)
    ours = QuantLinear.of(qlora(dense.weight.detach()), dense.bias)
    between, away = float((ours(x) - layer(x)).norm()), float((dense(x) - layer(x)).norm())
    assert between < 0.02 * away  # a tie or two apart, where the dense layer is a quantization error apart
