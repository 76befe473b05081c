"""How scales and offsets are held: what goes in comes out, and every byte is counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import double_quant_numpy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quadapt.errors import ConfigError, ShapeError
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import STORAGES, Storage, dynamic_map
from quadapt.quant.weight import Layout, QuantWeight

KINDS = ("fp16", "fp32", "integer", "double")


def through(values: Tensor, kind: str, *, centre: bool = True) -> Tensor:
    return STORAGES[kind].through(values, centre=centre)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(
    values=arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.floats(-6e4, 6e4, width=32))
)
def test_floats_are_rounded_once(dtype: torch.dtype, values: np.ndarray) -> None:
    given_ = torch.from_numpy(values).to(dtype)
    np.testing.assert_array_equal(through(given_, "fp16").numpy(), values.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(through(given_, "fp32").numpy(), values)


@pytest.mark.parametrize("kind", ["fp16", "fp32"])
def test_what_has_been_stored_once_stays(kind: str) -> None:
    once = through(torch.randn(7, 5), kind)
    assert torch.equal(through(once, kind), once)


def test_zero_points_are_whole_bytes() -> None:
    points = torch.tensor([[0.0, 1.0, 15.0], [128.0, 254.0, 255.0]])
    stored = STORAGES["integer"].encode(points, centre=False)
    assert stored[""].dtype == torch.uint8
    assert torch.equal(STORAGES["integer"].decode(stored, (2, 3)), points)


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_stored_is_bytes_of_the_announced_shape(kind: str) -> None:
    for out, groups in ((1, 1), (3, 5), (40, 16)):
        stored = STORAGES[kind].encode(torch.rand(out, groups).mul(200).round(), centre=True)
        shapes = {suffix: tuple(tensor.shape) for suffix, tensor in stored.items()}
        assert shapes == STORAGES[kind].shapes(out, groups)
        assert {tensor.dtype for tensor in stored.values()} == {torch.uint8}
        assert tuple(stored) == STORAGES[kind].suffixes


def test_a_cast_of_all_floats_changes_nothing() -> None:
    """Mixed precision turns float parameters into bfloat16; none of these is one."""
    for kind in KINDS:
        stored = STORAGES[kind].encode(torch.ones(2, 2), centre=True)
        assert not any(tensor.is_floating_point() for tensor in stored.values())


def test_bytes_that_start_at_any_address_are_read() -> None:
    scales = torch.randn(3, 5)
    stored = STORAGES["fp32"].encode(scales, centre=True)[""]
    buffer = torch.zeros(stored.numel() + 1, dtype=torch.uint8)
    buffer[1:] = stored.flatten()
    unaligned = buffer[1:].view(stored.shape)
    assert unaligned.storage_offset() % 4
    assert torch.equal(STORAGES["fp32"].decode({"": unaligned}, (3, 5)), scales)


# --- double quantization ----------------------------------------------------------------------------------------------


def test_the_dynamic_map_is_that_of_bitsandbytes() -> None:
    from bitsandbytes.functional import create_dynamic_map

    assert torch.equal(dynamic_map(device=torch.device("cpu")), create_dynamic_map(signed=True))
    np.testing.assert_allclose(
        dynamic_map(device=torch.device("cpu")).numpy(), double_quant_numpy.dynamic_map(), rtol=1e-6
    )
    assert float(dynamic_map(device=torch.device("cpu")).min()) == pytest.approx(-0.99297, abs=1e-5)
    assert float(dynamic_map(device=torch.device("cpu")).max()) == 1.0


@pytest.mark.parametrize("centre", [True, False])
def test_double_quantization_is_the_papers(centre: bool) -> None:
    values = 0.02 + 0.005 * torch.randn(30, 20)
    stored = STORAGES["double"].encode(values, centre=centre)
    codes, constants, mean = double_quant_numpy.encode(values.double().numpy(), centre=centre)
    differing = (stored[""].numpy() != codes).mean()
    assert differing < 0.01  # only where a value lies within float32's rounding of a threshold
    want = double_quant_numpy.decode(stored[""].numpy(), constants, mean)
    np.testing.assert_allclose(STORAGES["double"].decode(stored, (30, 20)).numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("shape", [(64, 4), (40, 17), (5, 3)])
def test_double_quantization_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    scales = torch.rand(shape) + 0.5
    codes, state = quantize_blockwise(scales - scales.mean(), blocksize=256)
    want = dequantize_blockwise(codes, state) + scales.mean()
    found = STORAGES["double"].encode(scales, centre=True)
    differing = (found[""] != codes).nonzero()
    assert len(differing) <= 2  # ties
    torch.testing.assert_close(
        STORAGES["double"].decode(found, shape), want, rtol=0, atol=2e-3 if len(differing) else 1e-7
    )


def test_double_quantized_offsets_keep_zero() -> None:
    offsets = torch.randn(20, 20)
    offsets[3, 4] = 0
    assert float(through(offsets, "double", centre=False)[3, 4]) == 0.0


def test_double_quantization_of_equal_values_and_of_zeros_divides_by_nothing() -> None:
    assert torch.equal(through(torch.full((3, 4), 0.25), "double"), torch.full((3, 4), 0.25))
    assert torch.equal(through(torch.zeros(30, 20), "double", centre=False), torch.zeros(30, 20))


def test_the_error_of_double_quantization_is_half_a_gap_of_the_map() -> None:
    values = torch.rand(16, 16)
    found = through(values, "double", centre=False)
    table = dynamic_map(device=torch.device("cpu"))
    gap = float((table[1:] - table[:-1]).max())
    assert float((found - values).abs().max()) <= gap / 2 * float(values.max()) * (1 + 1e-5)


# --- which storage serves which format, and what it costs -------------------------------------------------------------


LAYOUTS = [
    (Format(levels=levels, bits=bits, group_size=group, zero=zero), Storage(scales=scales, offsets=offsets))
    for levels, bits, group, zero, scales, offsets in [
        ("int", 2, 32, "float", "fp16", "fp16"),
        ("int", 3, 16, "integer", "fp16", "integer"),
        ("int", 4, 64, "none", "fp32", "absent"),
        ("int", 8, -1, "float", "fp32", "fp32"),
        ("int", 4, 32, "float", "fp16", "fp32"),
        ("nf", 4, 64, "none", "double", "absent"),
        ("nf", 3, 32, "float", "double", "double"),
        ("nf-sym", 2, 32, "float", "fp16", "double"),
    ]
]


@pytest.mark.parametrize(("format", "kept"), LAYOUTS, ids=lambda each: getattr(each, "name", ""))
@pytest.mark.parametrize("permuted", [False, True])
def test_bits_per_weight_are_the_bytes_in_the_file(
    format: Format, kept: Storage, permuted: bool, tmp_path: Path, quant_weight: Callable[..., QuantWeight]
) -> None:
    weight = quant_weight(format, 20, 75, storage=kept, permuted=permuted)
    path = tmp_path / "weight.safetensors"
    save_file(dict(weight.tensors), path)
    with safe_open(path, framework="pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 - not a dict
    assert 8 * sum(sizes.values()) / (20 * 75) == weight.layout.bits_per_weight
    assert sum(sizes.values()) == weight.nbytes


@pytest.mark.parametrize(
    ("format", "storage_", "bits"),
    [
        (Format(bits=4, group_size=32), Storage(), 5.0),
        (Format(bits=2, group_size=32), Storage(), 3.0),
        (Format(bits=4, group_size=128), Storage(), 4.25),
        (Format(bits=4, group_size=32, zero="integer"), Storage(offsets="integer"), 4.75),
        (Format(levels="nf", bits=4, group_size=64), Storage(scales="double", offsets="absent"), 4.126953125),
    ],
)
def test_bits_per_weight_of_the_papers_formats(format: Format, storage_: Storage, bits: float) -> None:
    layout = Layout(format=format, storage=storage_, out=4096, columns=4096)
    assert layout.bits_per_weight == pytest.approx(bits, abs=1e-5)  # one second-level mean a matrix comes on top


@pytest.mark.parametrize(("format", "kept"), LAYOUTS, ids=lambda each: getattr(each, "name", ""))
def test_a_weight_that_was_saved_and_loaded_is_the_same(
    format: Format, kept: Storage, tmp_path: Path, quant_weight: Callable[..., QuantWeight]
) -> None:
    weight = quant_weight(format, storage=kept)
    save_file(dict(weight.tensors), tmp_path / "weight.safetensors")
    again = QuantWeight(weight.layout, load_file(tmp_path / "weight.safetensors"))
    assert again.digest() == weight.digest()
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_the_digest_sees_every_bit(quant_weight: Callable[..., QuantWeight]) -> None:
    weight = quant_weight(Format(bits=4), 8, 64, permuted=True)
    digests = {weight.digest()}
    for name, tensor in weight.tensors.items():
        changed = tensor.clone()
        changed.view(torch.uint8).flatten()[0] ^= 1
        digests.add(QuantWeight(weight.layout, {**weight.tensors, name: changed}).digest())
    symmetric = Layout(format=Format(bits=4, zero="none"), storage=Storage(offsets="absent"), out=8, columns=64)
    other = QuantWeight(symmetric, {name: weight.tensors[name] for name in ("weight", "scales")})
    assert len(digests | {other.digest()}) == 6


def test_every_format_has_a_default_storage_that_holds_it() -> None:
    for levels, bits, zero in itertools.product(("int", "nf"), (2, 3, 4, 5, 6, 8), ("none", "integer", "float")):
        if levels == "int" or (zero != "integer" and bits not in (5, 6)):
            format = Format(levels=levels, bits=bits, zero=zero)
            default = Storage.default(format)
            default.check(format)
            assert default.scales == "fp16"


@pytest.mark.parametrize(
    ("zero", "offsets"),
    [
        ("none", "fp16"),
        ("none", "integer"),
        ("integer", "fp16"),
        ("integer", "absent"),
        ("float", "absent"),
        ("float", "integer"),
    ],
)
def test_a_storage_that_cannot_hold_the_zero_is_refused(zero: str, offsets: str) -> None:
    format, kept = Format(bits=4, zero=zero), Storage(offsets=offsets)
    with pytest.raises(ConfigError, match=f"offsets='{offsets}' cannot hold zero='{zero}'"):
        kept.check(format)
    with pytest.raises(ConfigError, match="cannot hold"):
        Nearest()(torch.randn(4, 32), Layout(format=format, storage=kept, out=4, columns=32))


@pytest.mark.parametrize(
    "settings", [{"scales": "bf16"}, {"scales": "absent"}, {"offsets": "bf16"}, {"offsets": "int8"}]
)
def test_unknown_kinds_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="is unknown"):
        Storage(**settings)


# --- the weight -------------------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_refused(quant_weight: Callable[..., QuantWeight]) -> None:
    weight = quant_weight(Format(bits=4), 8, 64)
    for name in weight.tensors:
        with pytest.raises(ShapeError, match="do not fit int4-g32"):
            QuantWeight(weight.layout, {**weight.tensors, name: weight.tensors[name][:-1]})
        with pytest.raises(ShapeError, match="do not fit"):
            QuantWeight(weight.layout, {key: value for key, value in weight.tensors.items() if key != name})


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_a_weight_without_rows_or_columns_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match="Skip the layer"):
        Layout(format=Format(bits=4), storage=Storage(), out=shape[0], columns=shape[1])


def test_offsets_are_what_the_zero_implies(quant_weight: Callable[..., QuantWeight]) -> None:
    symmetric = quant_weight(Format(bits=4, zero="none"))
    assert torch.equal(symmetric.offsets, -8 * symmetric.scales)
    points = quant_weight(Format(bits=4, zero="integer"))
    assert torch.equal(points.offsets, -points.scales * points.tensors["offsets"].float())
    assert quant_weight(Format(levels="nf", bits=4)).offsets is None


def test_a_permuted_weight_has_its_columns_in_the_layers_order(quant_weight: Callable[..., QuantWeight]) -> None:
    """`W[o, i] = scales[o, g] * levels[codes[o, i]] + offsets[o, g]` with `g = perm[i] // group_size`."""
    plain, weight = quant_weight(Format(bits=4)), quant_weight(Format(bits=4), permuted=True)
    perm = weight.tensors["perm"].tolist()
    assert perm != sorted(perm)
    dense, codes, scales, offsets = weight.dequantize(), weight.codes(), weight.scales, weight.offsets
    for i, at in enumerate(perm):
        assert torch.equal(codes[:, i], plain.codes()[:, at])
        assert torch.equal(dense[:, i], codes[:, i] * scales[:, at // 32] + offsets[:, at // 32])
    x = torch.randn(3, 80)
    assert torch.equal(weight.layer_order(weight.stored_order(x)), x)


def test_other_offsets_leave_codes_and_scales_alone(quant_weight: Callable[..., QuantWeight]) -> None:
    formats = [Format(bits=4, zero=zero) for zero in ("float", "none", "integer")]
    for format in (*formats, Format(levels="nf", bits=4)):
        weight, offsets = quant_weight(format), torch.randn(24, 3)
        for kind, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
            moved = weight.with_offsets(offsets, kind)
            assert torch.equal(moved.codes(), weight.codes())
            assert torch.equal(moved.scales, weight.scales)
            assert torch.equal(moved.offsets, offsets.to(dtype).float())
            assert (moved.format.zero, moved.layout.storage.offsets) == ("float", kind)
            moved.layout.storage.check(moved.format)
