"""Every width is computed alike on every device, and no kernel computes with a width that it would get wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import nearest_numpy
from torch import Tensor

from quadapt.errors import ConfigError, ShapeError
from quadapt.kernels.fake_reference import Grid
from quadapt.quant.format import Format, normal_levels
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.widths import check_width

pytest.importorskip("triton", reason="needs triton, which has no wheel for this platform")

INTEGERS, TABLES = (2, 3, 4, 5, 6, 8), (2, 3, 4, 8)
DEVICES = ("reference", "cpu", "cuda")
MODULES = (
    *("quadapt.kernels", "quadapt.kernels.fake", "quadapt.kernels.entropy"),
    *("quadapt.kernels.product_cpu", "quadapt.kernels.product_cuda"),
    *(f"quadapt.kernels.{family}{device}" for family in ("", "fake_", "entropy_") for device in DEVICES),
)

PARTS = ("check_codes", "check_width", "codes_of_lane", "decode16", "launch", "multiply_row", "word_codes", "words_of")
"""What kernels are made of, and no kernel by itself."""


def parameters(kernel: Callable[..., Any]) -> set[str]:
    """Names of what a kernel takes; of an operator of torch's, what the function takes that it was made of."""
    return set(inspect.signature(getattr(kernel, "_init_fn", kernel)).parameters)


def kernels() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function that is told a width, by its name, whatever the module it can be called from."""
    for module in MODULES:
        for name, each in vars(import_module(module)).items():
            public = callable(each) and not inspect.isclass(each) and not name.startswith("_")
            if public and name not in PARTS and {"bits", "grid"} & parameters(each):
                yield f"{module.removeprefix('quadapt.')}.{name}", each


KERNELS = dict(kernels())


def called(kernel: Callable[..., Any], bits: int, *, base_bits: int | None = None, levels: Tensor | None = None) -> Any:
    """Call a kernel on one group of 16 codes of `bits`, all zero."""
    names = parameters(kernel)
    base_bits = bits if base_bits is None else base_bits
    zeros, ones = torch.zeros(2, 16), torch.ones(2, 1)
    packed = torch.zeros(2, max(1, 2 * base_bits), dtype=torch.uint8)
    values = {
        "codes": torch.zeros(2, 16, dtype=torch.uint8),
        "weight": zeros,
        "x": zeros,
        "upper": torch.eye(16),
        "packed": packed,
        "base": packed,
        "A": None,
        "B": None,
        "G": zeros.clone(),
        "scales": [ones] if "x" in names else ones[:, 0] if "upper" in names else ones,
        "offsets": [] if "x" in names else ones if "grid" in names else None,
        "levels": levels,
        "bits": bits,
        "grid": Grid(bits, base_bits, 16, 16),
        "group_size": 16,
        "columns": 16,
        "slack": None,
        "dense": None,
        "dtype": torch.float32,
    }
    return kernel(**{name: values[name] for name in names})


def test_all_of_them_are_here() -> None:
    plain = ("dequantize", "nearest_codes", "group_error", "compensate")
    wanted = {
        *("kernels.pack", "kernels.unpack", "kernels.dequantize", "kernels.product", "kernels.product_cuda.product"),
        *("kernels.product_cpu.product",),
        *(f"kernels.{device}.{name}" for device in DEVICES for name in plain),
        *(f"kernels.fake_{device}.{name}" for device in DEVICES for name in ("quantize", "gradients")),
        *(f"kernels.entropy_{device}.group_crowding" for device in DEVICES),
        *("kernels.fake.fake_quantize", "kernels.fake.fake_gradients"),
        *("kernels.entropy.group_crowding", "kernels.entropy.group_entropy"),
    }
    assert wanted <= set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_another_width_is_refused(name: str) -> None:
    kernel = KERNELS[name]
    takes = parameters(kernel)
    for bits in range(-2, 34):
        if bits in INTEGERS:
            called(kernel, bits)
        else:
            with pytest.raises(ConfigError, match=rf"bits={bits} is not supported .*Use 2, 3, 4, 5, 6 or 8"):
                called(kernel, bits)
        if "grid" in takes and bits not in INTEGERS:
            with pytest.raises(ConfigError, match=f"bits={bits} is not supported"):
                called(kernel, 4, base_bits=bits)
        if "levels" in takes:
            table = torch.linspace(-1, 1, 2 ** min(max(bits, 0), 10))
            if bits in TABLES:
                called(kernel, bits, levels=table)
            else:
                with pytest.raises(ConfigError, match=rf"bits={bits} .*Use 2, 3, 4 or 8, or integers"):
                    called(kernel, bits, levels=table)


@pytest.mark.parametrize("name", [name for name in KERNELS if "levels" in parameters(KERNELS[name])])
def test_a_table_of_another_size_is_refused(name: str) -> None:
    for count in (1, 4, 15, 17, 256):
        with pytest.raises(ShapeError, match=f"a table of {count} levels does not fit codes of 4 bits. Give 16 levels"):
            called(KERNELS[name], 4, levels=torch.linspace(-1, 1, count))


def test_only_whole_numbers_are_widths() -> None:
    for bits in (4.0, True, "4", None):
        with pytest.raises(ConfigError, match=r"Use 2, 3, 4, 5, 6 or 8"):
            check_width("int", bits)  # type: ignore[arg-type]


def test_no_other_quantiles_are_computed() -> None:
    for bits in (-1, 0, 1, 5, 6, 7, 16):
        with pytest.raises(ConfigError, match=f"bits={bits} is not supported for levels='nf'"):
            normal_levels(bits)


HELD = {"none": ("absent",), "integer": ("integer",), "float": ("fp16", "fp32", "double")}


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Integers of any width and group, in any storage; rows that end within a byte, a word and a group."""
    zero = draw(st.sampled_from(sorted(HELD)))
    group_size = draw(st.sampled_from([16, 32, 48, 256, -1]))
    scales = draw(st.sampled_from(["fp16", "fp32", "double", "linear8-256-fp32", "linear3-16-fp16"]))
    storage = Storage(scales=scales, offsets=draw(st.sampled_from(HELD[zero])))
    format = Format(bits=draw(st.sampled_from(INTEGERS)), group_size=group_size, zero=zero)
    return Layout(format=format, storage=storage, out=draw(st.integers(1, 5)), columns=draw(st.integers(1, 90)))


def on(device: str, dense: Tensor, layout: Layout) -> tuple[QuantWeight, list[Tensor]]:
    """The weight that the kernels for a device make, and what they read it as."""
    with mock.patch("quadapt.kernels.dispatch.set_for", return_value=device):
        weight = Nearest()(dense, layout)
        return weight, [weight.dequantize(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]


@given(layout=layouts(), seed=st.integers(0, 2**31))
def test_codes_and_weights_are_the_same_bits_on_every_device(layout: Layout, seed: int) -> None:
    dense = torch.randn(layout.out, layout.columns, generator=torch.Generator().manual_seed(seed))
    weight, read = on("reference", dense, layout)
    for device in ("cpu", "cuda"):
        other, same = on(device, dense, layout)
        assert other.digest() == weight.digest()
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(same, read, strict=True))
    codes, width, top = weight.codes().numpy(), weight.format.width(layout.columns), 2**weight.format.bits - 1
    assert weight.tensors["weight"].shape[1] == -(-layout.columns * weight.format.bits // 8)
    scales, offsets = weight.scales.double().numpy(), weight.offsets.double().numpy()
    want = nearest_numpy.dequantize(codes, scales, offsets, width)
    np.testing.assert_allclose(read[2].numpy(), want, rtol=1e-6, atol=1e-6)
    exact = (dense.double().numpy() - np.repeat(offsets, width, 1)[:, : layout.columns]) / (
        np.repeat(scales, width, 1)[:, : layout.columns]
    )
    assert (np.abs(codes - np.clip(exact, 0, top)) <= 0.5 + 1e-4).all()
