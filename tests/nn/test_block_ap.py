"""Block-AP: its gradients, what training does to a block, and that the product is what was trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quadapt.calibrate import BlockWalk
from quadapt.data import calibration_batches, read
from quadapt.demo.stories import rows, stories, write_jsonl
from quadapt.errors import CalibrationError, ConfigError
from quadapt.hf.loading import load_model, load_tokenizer
from quadapt.model.layer import Quantization
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import find_blocks, select
from quadapt.nn.block_ap import BlockAP, BlockAPLinear, Example, step
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout

Make = Callable[..., Any]
ZEROS = {"none": "absent", "integer": "integer", "float": "fp16"}


def layout(out: int, columns: int, bits: int = 2, zero: str = "float", **storage: Any) -> Layout:
    held = Storage(**{"offsets": ZEROS[zero], **storage})
    return Layout(format=Format(bits=bits, group_size=32, zero=zero), storage=held, out=out, columns=columns)


def linear(out: int = 12, columns: int = 80, **settings: Any) -> nn.Linear:
    layer = nn.Linear(columns, out, **settings)
    layer.weight.data *= 2
    return layer


def moved(layer: BlockAPLinear) -> BlockAPLinear:
    """Somewhere on the way: weights, scales and offsets all changed, some weights clipped."""
    with torch.no_grad():
        layer.source += 0.05 * torch.randn_like(layer.source)
        for parameter in layer.trained.values():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def test_a_step_moves_what_block_ap_trains_and_nothing_else() -> None:
    """As AdamW written out has it for a first step: each number by its rate, against the sign of its gradient."""
    layer = moved(BlockAPLinear(linear(), layout(12, 80)))
    block = nn.Sequential(nn.LayerNorm(80), layer)
    example = Example((torch.randn(2, 5, 80),), {}, torch.randn(2, 5, 12))
    before = {name: each.detach().clone() for name, each in block.named_parameters()}
    loss = nn.functional.mse_loss(block(*example.args), example.target)
    trained = {name: each for name, each in block.named_parameters() if name.startswith(("1.source", "1.trained"))}
    slopes = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    how = BlockAP(learning_rate=0.01, weight_learning_rate=0.005)
    rates = dict.fromkeys(trained, 0.01) | {"1.source": 0.005 * float(layer.source.square().mean().sqrt())}
    step(block, example, how.optimizer([layer]))
    for name, each in block.named_parameters():
        assert each.grad is None
        change = 0 if name not in trained else -rates[name] * slopes[name] / (slopes[name].abs() + 1e-8)
        torch.testing.assert_close(each.detach(), before[name] + change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_gradients_are_those_of_the_paper(bits: int) -> None:
    """In range: 1 for the weight, round(v) - v for the scale, 0 for the shift; beyond: 0, the bound, 1. Then the chain
    rule of s = s0 exp(rho) and b = b0 + s0 shift (float64, NumPy, weight by weight)."""
    layer = moved(BlockAPLinear(linear(), layout(12, 80, bits, scales="fp32", offsets="fp32")))
    x = torch.randn(7, 80)
    dy = torch.randn(7, 12)
    layer(x).backward(dy - layer.bias.detach() * 0)

    half, top = 2 ** (bits - 1), 2**bits - 1
    G = dy.double().numpy().T @ x.double().numpy()
    s0, b0 = layer.start.double().numpy()
    rho, shift = (layer.trained[name].detach().double().numpy() for name in ("rho", "shift"))
    W = layer.source.detach().double().numpy()
    want = {name: np.zeros_like(value) for name, value in (("W", W), ("rho", rho), ("shift", shift))}
    clipped = 0
    for o in range(12):
        for i in range(80):
            g = i // 32
            s, b = s0[o, g] * math.exp(rho[o, g]), b0[o, g] + s0[o, g] * shift[o, g]
            v = (W[o, i] - (b - half * s)) / s  # unsigned code, before rounding
            code = round(v)
            inside = 0 <= code <= top
            clipped += not inside
            signed = min(max(code, 0), top) - half
            want["W"][o, i] = G[o, i] * inside
            want["rho"][o, g] += G[o, i] * s * (signed - (v - half) * inside)
            want["shift"][o, g] += G[o, i] * s0[o, g] * (not inside)
    assert clipped > 5
    found = {"W": layer.source.grad, **{name: layer.trained[name].grad for name in ("rho", "shift")}}
    for name, gradient in found.items():
        assert gradient is not None
        np.testing.assert_allclose(gradient.numpy(), want[name], rtol=2e-4, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zero", list(ZEROS))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_product_is_what_was_trained_bit_for_bit(bits: int, zero: str, dtype: torch.dtype) -> None:
    dense = linear().to(dtype)
    layer = moved(BlockAPLinear(dense, layout(12, 80, bits, zero)))
    weight = layer.quantized()
    assert weight.layout == layout(12, 80, bits, zero)
    merged = QuantLinear.of(weight, dense.bias)
    x = torch.randn(20, 80, dtype=dtype)
    torch.testing.assert_close(merged(x), layer(x), rtol=0, atol=0)
    with torch.no_grad():  # few tokens are multiplied with the codes, by both
        torch.testing.assert_close(merged(x[:5]), layer(x[:5]), rtol=0, atol=0)


@pytest.mark.parametrize("range_", ["minmax", "mse"])
@pytest.mark.parametrize("zero", list(ZEROS))
def test_it_starts_from_nearest_rounding(zero: str, range_: str) -> None:
    dense = linear()
    first = BlockAPLinear(dense, layout(12, 80, 3, zero), range_).quantized()
    want = Nearest(range=range_)(dense.weight.detach(), layout(12, 80, 3, zero))
    torch.testing.assert_close(first.scales, want.scales, rtol=1e-3, atol=0)
    torch.testing.assert_close(first.offsets, want.offsets, rtol=0, atol=1e-3)  # a shift is added, and taken away again
    assert (first.codes() != want.codes()).float().mean() < 0.01


def random_ids(sequences: int = 24) -> list[torch.Tensor]:
    return list(torch.randint(3, 96, (sequences, 24), generator=torch.Generator().manual_seed(5)).split(4))


def walk(model: nn.Module, ids: list[torch.Tensor], size: int) -> tuple[BlockWalk, str, nn.Module]:
    blocks = find_blocks(model)
    name, block = next(iter(blocks.items()))
    found = BlockWalk(model, blocks, ids, size=size)
    found.advance_dense(name)
    return found, name, block


def test_examples_are_what_a_block_gets_and_gives(tiny_llama: Make) -> None:
    found, _name, block = walk(tiny_llama(), random_ids(6), 3)
    examples = found.examples()  # batches of 4 and 2: 3, 1, 2
    assert [len(each.args[0]) for each in examples] == [3, 1, 2]
    for each in examples:
        with torch.no_grad():
            output = block(*each.args, **each.kwargs)
        output = output if isinstance(output, torch.Tensor) else output[0]
        torch.testing.assert_close(output, each.target, rtol=1e-5, atol=1e-5)


def fitted(
    model: nn.Module, rounding: BlockAP, ids: list[torch.Tensor] | None = None
) -> tuple[list[BlockAPLinear], tuple[float, float]]:
    found, name, block = walk(model, ids or random_ids(), rounding.batch_size)
    layers = {}
    for each in [each for each in select(model).chosen if each.startswith(f"{name}.")]:
        dense = model.get_submodule(each)
        layers[each] = BlockAPLinear(dense, layout(dense.out_features, dense.in_features))
        model.set_submodule(each, layers[each])
    return list(layers.values()), rounding.fit(block, list(layers.values()), found.examples())


def test_training_lowers_the_error_of_a_real_block(tmp_path: Any) -> None:
    """Random weights on random tokens leave nothing to learn: this is the embedded model on its stories."""
    folder = str(files("quadapt") / "demo" / "model")
    write_jsonl(tmp_path / "stories.jsonl", rows(stories(0, 120, "train")))
    text = read(str(tmp_path / "stories.jsonl"))
    ids = calibration_batches(text, load_tokenizer(folder), length=64, sequences=24).batches
    _, (before, after) = fitted(load_model(folder, dtype="float32"), BlockAP(epochs=4), ids=ids)
    assert after < 0.8 * before


def test_the_best_state_is_kept_if_training_only_harms(tiny_llama: Make) -> None:
    model = tiny_llama()
    wild = BlockAP(epochs=1, learning_rate=5.0, weight_learning_rate=5.0)
    layers, (before, after) = fitted(model, wild)
    assert after == before
    for layer in layers:
        assert all(not bool(parameter.any()) for parameter in layer.trained.values())


def test_nothing_but_its_own_parameters_gets_gradients(tiny_llama: Make) -> None:
    model = tiny_llama().requires_grad_(True)
    norms = {name: parameter.clone() for name, parameter in model.named_parameters() if "norm" in name}
    fitted(model, BlockAP(epochs=1))
    named = dict(model.named_parameters())
    assert norms
    for name, before in norms.items():
        assert named[name].grad is None
        assert torch.equal(named[name], before)


@pytest.mark.parametrize("rounding", [BlockAP(range="mse"), GPTQ(range="mse")], ids=["block-ap", "gptq"])
def test_a_whole_model_is_better_than_nearest(rounding: Any, tiny_llama: Make) -> None:
    ids = torch.randint(3, 96, (48, 32), generator=torch.Generator().manual_seed(6))
    errors = {}
    for name, each in (("nearest", Nearest(range="mse")), ("calibrated", rounding)):
        model = tiny_llama(initializer_range=0.1)
        with torch.no_grad():
            want = model(ids[:8]).logits
        plan = Quantization(format=Format(bits=2, group_size=32), storage=Storage(), rounding=each)
        report = quantize_model(model, select(model).chosen, plan, batches=list(ids[8:].split(8))).rows
        with torch.no_grad():
            errors[name] = float((model(ids[:8]).logits - want).norm() / want.norm())
        assert len(quantized_layers(model)) == 14
        if name == "calibrated" and isinstance(rounding, BlockAP):
            assert all(row.block_error and row.block_error[1] <= row.block_error[0] for row in report)
    assert errors["calibrated"] < errors["nearest"]


def test_interrupted_and_gone_on_with_it_gives_the_same(tiny_llama: Make, tmp_path: Any) -> None:
    from quadapt.hf.blocks import BlockFiles

    ids = list(torch.randint(3, 96, (12, 24), generator=torch.Generator().manual_seed(5)).split(4))
    plan = Quantization(format=Format(bits=3, group_size=32), storage=Storage(), rounding=BlockAP(epochs=1))

    def digests(keeper: Any) -> list[str]:
        model = tiny_llama()
        quantize_model(model, select(model).chosen, plan, batches=ids, keeper=keeper)
        return [layer.quant_weight.digest() for layer in quantized_layers(model).values()]

    whole = digests(BlockFiles(tmp_path / "blocks"))
    (tmp_path / "blocks" / "model.layers.1.safetensors").unlink()
    assert digests(BlockFiles(tmp_path / "blocks")) == whole


def test_what_it_cannot_do_is_said() -> None:
    nf = Format(levels="nf", bits=4, group_size=32)
    with pytest.raises(ConfigError, match="levels='nf': block-ap trains even steps"):
        BlockAP().check(Layout(format=nf, storage=Storage.default(nf), out=4, columns=64))
    with pytest.raises(ConfigError, match="block-ap cannot hold scales as double"):
        BlockAP().check(layout(4, 64, scales="double", offsets="double"))
    with pytest.raises(ConfigError, match="epochs and batch_size must be 1 or more"):
        BlockAP(epochs=0).check(layout(4, 64))
    example = Example((torch.zeros(2, 3, 8),), {}, torch.zeros(2, 3, 8))
    with pytest.raises(CalibrationError, match="at least 4 calibration sequences"):
        BlockAP().fit(nn.Identity(), [], [example])
