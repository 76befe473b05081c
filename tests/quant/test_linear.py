"""Scales as evenly spaced codes, as in LQ-LoRA: what the paper's equations give, in no more bytes than its formula."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import lq_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.kernels import unpack
from quadapt.quant.format import Format, normal_levels
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest, ScaleUnderflow
from quadapt.quant.storage import LINEAR, STORAGES, Linear, Storage
from quadapt.quant.weight import Layout, QuantWeight

KINDS = [
    Linear(bits, block, constant).name
    for bits, block, constant in itertools.product((2, 3, 4, 8), (16, 64, 256), ("fp16", "fp32"))
]
NF4 = Format(levels="nf", bits=4, group_size=64)


def stored(kind: str) -> Storage:
    return Storage(scales=kind, offsets="absent")


def through(values: Tensor, kind: str) -> Tensor:
    return STORAGES[kind].through(values, centre=True)


def layout(format: Format, kind: str, out: int = 40, columns: int = 144) -> Layout:
    return Layout(format=format, storage=stored(kind), out=out, columns=columns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 9), (1, 1), (7, 5), (16, 16)])
def test_scales_are_those_of_the_papers_equations(kind: str, shape: tuple[int, int]) -> None:
    linear, values = STORAGES[kind], torch.rand(shape) + 0.01
    assert linear is not None
    constant = {"fp16": np.float16, "fp32": np.float32}[linear.constant]
    _, want, constants, offset = lq_numpy.scales(
        values.double().numpy(), bits=linear.bits, block=linear.block, constant=constant
    )
    kept = STORAGES[kind].encode(values, centre=True)
    held = kept["_largest"].view({"fp16": torch.float16, "fp32": torch.float32}[linear.constant]).flatten()
    np.testing.assert_allclose(held.numpy(), constants, rtol=1e-3 if linear.constant == "fp16" else 1e-6)
    assert float(kept["_smallest"].view(torch.float32)) == pytest.approx(offset)
    found = through(values, kind).double().numpy()
    step = np.repeat(constants, linear.block)[: values.numel()].reshape(shape) / (2**linear.bits - 1)
    away = np.abs(found - want)
    assert (away <= 1.001 * step + 1e-6).all()  # float32 may fall on the other side of a threshold, rarely
    assert (away > 1e-3 * step + 1e-6).mean() < 0.02


@given(
    values=arrays(
        np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.floats(0.0009765625, 100, width=32)
    ),
    kind=st.sampled_from(KINDS),
)
def test_stored_scales_are_positive_ordered_and_near(values: np.ndarray, kind: str) -> None:
    linear, flat = STORAGES[kind], torch.from_numpy(values).flatten()
    assert linear is not None
    found = through(torch.from_numpy(values), kind).flatten()
    assert bool((found >= flat.min()).all())
    for start in range(0, len(flat), linear.block):
        mine, theirs = flat[start : start + linear.block], found[start : start + linear.block]
        assert bool((theirs[mine.argsort()].diff() >= 0).all())
        step = float((mine - flat.min()).max()) / (2**linear.bits - 1)
        slack = 1e-3 * float(mine.max()) if linear.constant == "fp16" else 1e-6 * float(mine.max())
        assert float((mine - theirs).abs().max()) <= step / 2 + slack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_constant_that_fp16_rounds_down_leaves_the_largest_scale_on_top(bits: int) -> None:
    """1.4 times the smallest float16 is stored as that, and 1.4 times the top code does not fit."""
    kind, smallest, top = f"linear{bits}-16-fp16", 1e-5, 2**bits - 1
    values = smallest + 2.0**-24 * torch.tensor([[0.0, 1.4, 1.2, 1.01], [0.0, 1.3, 0.0, 1.45]])
    kept = STORAGES[kind].encode(values, centre=False)
    codes = unpack(kept[""], bits, values.numel())[0].tolist()
    assert codes == [0, top, top, top, 0, top, 0, top]
    found = through(values, kind)
    assert float((found - values).abs().max()) < 0.5 * 2.0**-24


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scales_divide_by_nothing(kind: str) -> None:
    equal = torch.full((3, 4), 0.25)
    assert torch.equal(through(equal, kind), equal)
    few = torch.cat([torch.full((16, 16), 0.5), torch.full((16, 16), 0.75)])  # blocks without extent, not all alike
    assert torch.equal(through(few, kind), few)


def test_eight_bits_are_as_good_as_double_quantization() -> None:
    """Against bitsandbytes' form: scales of a Gaussian matrix differ by under one percent."""
    scales = torch.randn(512, 64, 64).abs().amax(-1)
    for kind in (LINEAR, "double"):
        values = STORAGES[kind].encode(scales, centre=True)
        found = STORAGES[kind].decode(values, (512, 64))
        assert float(((found - scales).abs() / scales).max()) < 0.01


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["linear3-16-fp16", "linear8-256-fp32"])
def test_weights_are_the_nearest_levels_of_the_stored_scales(bits: int, kind: str) -> None:
    weight = 0.02 * torch.randn(12, 64)
    found = Nearest()(weight, layout(Format(levels="nf", bits=bits, group_size=32), kind, 12, 64))
    want = lq_numpy.nearest(weight.double().numpy(), found.scales.double().numpy(), normal_levels(bits), 32)
    different = np.abs(found.dequantize().double().numpy() - want) > 1e-6
    assert different.mean() < 0.005  # a tie within float32's rounding


@pytest.mark.parametrize(
    ("bits", "kind", "want"),
    [
        (4, "linear8-256-fp32", 4.126953125),
        (3, "linear8-256-fp32", 3.126953125),
        (8, "linear8-256-fp32", 8.126953125),
        (2, "linear2-256-fp16", 2 + 2 / 64 + 16 / (64 * 256)),
    ],
)
def test_bits_are_the_papers_and_one_offset(bits: int, kind: str, want: float) -> None:
    found = layout(Format(levels="nf", bits=bits, group_size=64), kind, 4096, 4096)
    assert found.bits == want * 4096 * 4096 + 32


def test_the_whole_grid_costs_what_the_formula_says() -> None:
    for kind, bits, group in itertools.product(KINDS, (2, 3, 4, 8), (16, 32, 64)):
        linear = STORAGES[kind]
        assert linear is not None
        found = layout(Format(levels="nf", bits=bits, group_size=group), kind, 1024, 2048)
        width = {"fp16": 16, "fp32": 32}[linear.constant]
        assert found.bits == 1024 * 2048 * lq_numpy.bits(bits, linear.bits, width, group, linear.block) + 32


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_is_stored_counted_and_read_again(kind: str, tmp_path: Path) -> None:
    weight = Nearest()(torch.randn(40, 144), layout(Format(levels="nf", bits=3, group_size=16), kind))
    save_file(dict(weight.tensors), tmp_path / "weight.safetensors")
    loaded = load_file(tmp_path / "weight.safetensors")
    assert 8 * sum(tensor.nbytes for tensor in loaded.values()) == weight.layout.bits
    fields = json.loads(json.dumps(asdict(weight.layout)))
    kept = Layout(**{**fields, "format": Format(**fields["format"]), "storage": Storage(**fields["storage"])})
    again = QuantWeight(kept, loaded)
    assert again.digest() == weight.digest()
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_digests_of_what_earlier_versions_wrote_stay(quant_weight: Callable[..., QuantWeight]) -> None:
    assert asdict(Storage()) == {"scales": "fp16", "offsets": "fp16"}
    fields = asdict(quant_weight(NF4).layout)
    assert set(fields) == {"format", "storage", "out", "columns", "permuted"}


def test_other_offsets_leave_linear_scales_alone() -> None:
    weight = Nearest()(torch.randn(40, 144), layout(NF4, "linear4-16-fp16"))
    moved = weight.with_offsets(torch.randn(40, weight.layout.groups), "fp16")
    assert torch.equal(moved.scales, weight.scales)
    assert torch.equal(moved.codes(), weight.codes())
    moved.layout.storage.check(moved.format)


@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_what_fp16_constants_cannot_hold_is_said(scale: float) -> None:
    weight = scale * torch.randn(16, 64)
    with pytest.raises(ScaleUnderflow, match="do not fit linear8-16-fp16"):
        Nearest()(weight, layout(NF4, "linear8-16-fp16", 16, 64))
    kept = Nearest()(weight, layout(NF4, "linear8-16-fp32", 16, 64))
    assert float((kept.dequantize() - weight).norm() / weight.norm()) < 0.12 if scale > 1 else True


@pytest.mark.parametrize(
    "name", ["linear", "linear5-16-fp16", "linear8-32-fp32", "linear8-16-bf16", "linear8-16-fp16 "]
)
def test_unknown_kinds_are_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match="linearB-N-F with B 2, 3, 4 or 8 bits"):
        Storage(scales=name)


def test_gptq_needs_all_scales_at_once() -> None:
    moments = {"second_moment": torch.eye(144, dtype=torch.float64)}
    with pytest.raises(ConfigError, match="needs them all at once"):
        GPTQ()(torch.randn(40, 144), layout(NF4, LINEAR), moments)
    found = GPTQ(static_groups=True)(torch.randn(40, 144), layout(NF4, LINEAR), moments)
    assert found.layout == layout(NF4, LINEAR)
