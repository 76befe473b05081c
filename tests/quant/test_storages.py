"""What every storage promises; and that a new one is one class: scales as 6-bit codes in super-blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.kernels import pack, unpack
from quadapt.quant.autograd import quant_matmul
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import STORAGES, Storage, ValueStorage, register
from quadapt.quant.weight import Layout, QuantWeight, from_fields

SUPER = 8
"""Groups in a super-block."""


@dataclass(frozen=True)
class SuperBlocks(ValueStorage):
    """Scales as codes 0 to 63, and one float16 for each 8 of a row: `scale = code * unit`, as in GGML's Q4_K."""

    summary: ClassVar[str] = "a 6-bit code for each group, and a float16 for every 8"
    for_offsets: ClassVar[bool] = False
    suffixes: ClassVar[tuple[str, ...]] = ("", "_unit")

    @property
    def name(self) -> str:
        return "super6"

    def encode(self, values: Tensor, *, centre: bool) -> dict[str, Tensor]:
        blocks = torch.nn.functional.pad(values.float(), (0, -values.shape[1] % SUPER)).unflatten(1, (-1, SUPER))
        unit = (blocks.amax(-1) / 63).half()
        codes = (blocks / unit.float().clamp_min(1e-20)[..., None]).round().clamp(0, 63).flatten(1)
        codes = codes[:, : values.shape[1]].to(torch.uint8)
        return {"": pack(codes, 6), "_unit": unit.contiguous().view(torch.uint8)}

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        codes = unpack(tensors[""], 6, shape[1]).float()
        units = tensors["_unit"].contiguous().view(torch.float16).float()
        return codes * units.repeat_interleave(SUPER, 1)[:, : shape[1]]

    def shapes(self, out: int, groups: int) -> dict[str, tuple[int, int]]:
        return {"": (out, -(-groups * 6 // 8)), "_unit": (out, 2 * -(-groups // SUPER))}

    def fits_scales(self, least: float, most: float) -> bool:
        return most / 63 <= torch.finfo(torch.float16).max


@pytest.fixture
def super6(monkeypatch: pytest.MonkeyPatch) -> SuperBlocks:
    assert "super6" not in STORAGES
    monkeypatch.setattr(STORAGES, "_pieces", dict(STORAGES._pieces))
    return register(SuperBlocks())


def layout_of(bits: int = 4, columns: int = 400) -> Layout:
    format = Format(bits=bits, group_size=16, zero="none")
    return Layout(format=format, storage=Storage(scales="super6", offsets="absent"), out=24, columns=columns)


def dense_numpy(weight: QuantWeight) -> np.ndarray:
    """The matrix from the stored bytes, float64, with Python's own integers for the stream of bits."""
    layout, rows = weight.layout, []
    groups = layout.groups
    units = weight.tensors["scales_unit"].numpy().copy().view(np.float16).astype(np.float64)
    for row in range(layout.out):
        stream = int.from_bytes(weight.tensors["scales"][row].numpy().tobytes(), "little")
        scales = [(stream >> 6 * at & 63) * units[row, at // SUPER] for at in range(groups)]
        codes = weight.codes()[row].numpy().astype(np.float64)
        width = layout.format.group_size
        rows.append([scales[i // width] * (codes[i] - 2 ** (layout.format.bits - 1)) for i in range(layout.columns)])
    return np.array(rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [400, 72])
def test_a_storage_that_is_registered_quantizes_multiplies_and_comes_back(
    bits: int, columns: int, super6: SuperBlocks, tmp_path: Path
) -> None:
    layout = layout_of(bits, columns)
    dense = torch.randn(24, columns)
    weight = Nearest()(dense, layout)
    assert set(weight.tensors) == {"weight", "scales", "scales_unit"}
    want = dense_numpy(weight)
    np.testing.assert_allclose(weight.dequantize().numpy(), want, rtol=1e-6, atol=1e-7)
    error = float((weight.dequantize() - dense).norm() / dense.norm())
    assert error < {2: 0.55, 3: 0.25, 4: 0.12, 8: 0.03}[bits]
    x = torch.randn(3, columns, requires_grad=True)
    y = quant_matmul(x, weight)
    np.testing.assert_allclose(y.detach().numpy(), x.detach().double().numpy() @ want.T, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), np.broadcast_to(want.sum(0), (3, columns)), rtol=1e-4, atol=1e-4)

    save_file(dict(weight.tensors), tmp_path / "weight.safetensors")
    found = load_file(tmp_path / "weight.safetensors")
    assert 8 * sum(each.nbytes for each in found.values()) == layout.bits
    groups = layout.groups
    assert super6.total_bits(24, groups) == 24 * 8 * (math.ceil(6 * groups / 8) + 2 * math.ceil(groups / SUPER))
    again = QuantWeight(layout, found)
    assert again.digest() == weight.digest()
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert from_fields(Storage, {"scales": "super6", "offsets": "absent"}) == layout.storage


@pytest.mark.usefixtures("super6")
def test_it_is_refused_where_it_cannot_serve() -> None:
    with pytest.raises(ConfigError, match="offsets='super6' is unknown"):
        Storage(offsets="super6")
    with pytest.raises(ConfigError, match=r"scales='super7' is unknown\. Use .*super6"):
        Storage(scales="super7")
    with pytest.raises(ConfigError, match="needs them all at once"):
        GPTQ().check(layout_of())


@pytest.mark.usefixtures("super6")
def test_pairs_know_what_to_do_with_it() -> None:
    pair = Storage(scales="fp16", offsets="fp16").with_scales("super6")
    assert pair == Storage(scales="super6", offsets="fp16")
    assert Storage(scales="super6", offsets="fp16").widened() == Storage(scales="fp32", offsets="fp32")
    assert not pair.local
    assert (pair.floats, pair.of_scales.trained, pair.of_scales.is_float) == ("fp16", "fp16", False)


def test_without_it_the_name_is_unknown() -> None:
    with pytest.raises(ConfigError, match="scales='super6' is unknown"):
        Storage(scales="super6")


# --- the contract of all ----------------------------------------------------------------------------------------------


def numbers(storage: ValueStorage, out: int, groups: int) -> Tensor:
    """Numbers that the storage can hold."""
    values = torch.rand(out, groups).mul(15).round() if storage.zero == "integer" else torch.rand(out, groups) + 0.01
    values = values.repeat_interleave(storage.shared, 1)[:, :groups]
    return -values if storage.never_positive else values


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize(("out", "groups"), [(1, 1), (3, 5), (40, 17)])
def test_every_storage_keeps_its_promises(name: str, out: int, groups: int) -> None:
    storage = STORAGES[name]
    assert storage.name == name
    assert storage.for_scales or storage.for_offsets
    values = numbers(storage, out, groups)
    kept = storage.encode(values, centre=storage.for_scales)
    assert tuple(kept) == storage.suffixes == tuple(storage.shapes(out, groups))
    assert {suffix: tuple(each.shape) for suffix, each in kept.items()} == storage.shapes(out, groups)
    assert all(each.dtype == torch.uint8 for each in kept.values())
    assert storage.total_bits(out, groups) == 8 * sum(each.numel() for each in kept.values())
    if storage.implied:
        assert not kept
        return
    found = storage.decode(kept, (out, groups))
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (out, groups))
    torch.testing.assert_close(found, values, rtol=0.5, atol=0.5)
    if storage.together is not None:  # not all of the matrix, so rounding some rows says what is stored
        assert torch.equal(storage.rounded(values), found)
        assert torch.equal(storage.through(values[:1], centre=storage.for_scales), found[:1])
        run = values[:, : storage.together]
        assert torch.equal(storage.rounded(run), found[:, : storage.together])
    else:
        assert storage.rounded(values) is values
    if storage.trained == name:
        assert storage.above(values).abs().ge(values.abs() * (1 - 1 / 8)).all()
    if storage.is_float:
        assert torch.equal(kept[""].view(storage.dtype).float(), found)
        assert STORAGES[storage.trained] is storage


@pytest.mark.parametrize("name", STORAGES)
def test_rounding_is_straight_through(name: str) -> None:
    storage = STORAGES[name]
    values = (torch.rand(4, 6) + 1 / 3).requires_grad_()
    snapped = storage.snap(values)
    assert torch.equal(snapped, storage.rounded(values))
    (snapped * 2).sum().backward()
    sharing = [min(storage.shared, 6 - at // storage.shared * storage.shared) for at in range(6)]  # each counts for all
    assert torch.equal(values.grad, 2 * torch.tensor(sharing).expand(4, 6).float())


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_said_to_be_exact_in_a_dtype_is(name: str, dtype: torch.dtype) -> None:
    storage = STORAGES[name]
    if storage.implied or not storage.exact_in(dtype):
        return
    found = storage.through(numbers(storage, 40, 17), centre=storage.for_scales)
    assert torch.equal(found.to(dtype).float(), found)


def test_what_fp16_holds_well_is_what_it_changes_by_little() -> None:
    """`fits_scales` against the rounding itself: a 64th at most."""
    scales = (2.0 ** torch.linspace(-24, 17, 4000)).tolist()
    for scale in scales:
        stored = float(STORAGES["fp16"].through(torch.tensor([[scale]]), centre=True))
        if STORAGES["fp16"].fits_scales(scale, scale):
            assert abs(stored - scale) <= scale / 64
        assert STORAGES["fp32"].fits_scales(scale, scale)
        assert STORAGES["fp16"].fits_offsets(scale) == (scale <= 65504)
    assert not STORAGES["fp16"].fits_scales(1e-7, 1.0)
    assert STORAGES["linear8-256-fp16"].fits_scales(1e-7, 1.0)  # of which the largest alone is a float
