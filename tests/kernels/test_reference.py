"""The kernels in plain torch against the formulas themselves, worked out weight by weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import nearest_numpy, pack_numpy, qa_lora_numpy
from reference.gptq_numpy import damped

from quadapt.kernels import reference
from quadapt.quant.format import normal_levels

BITS = (2, 3, 4, 5, 6, 8)
GRIDS = [*(("int", bits) for bits in BITS), *(("table", bits) for bits in (2, 3, 4, 8))]


def random_grid(rows: int, groups: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(rows, groups, dtype=dtype) + 0.1, torch.randn(rows, groups, dtype=dtype)


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)


@pytest.mark.parametrize(("levels", "bits"), GRIDS)
def test_dequantize_is_scale_times_level_plus_offset(bits: int, levels: str) -> None:
    codes, (scales, offsets) = random_codes(5, 41, bits), random_grid(5, 3)
    table = None if levels == "int" else torch.tensor(normal_levels(bits))
    found = reference.dequantize(reference.pack(codes, bits), scales, offsets, table, bits, 16, 41, torch.float64)
    values = None if table is None else table.double().tolist()
    want = nearest_numpy.dequantize(codes.numpy(), scales.numpy(), offsets.numpy(), 16, values)
    np.testing.assert_array_equal(found.numpy(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantize_rounds_once_from_float32(dtype: torch.dtype) -> None:
    codes, (scales, offsets) = random_codes(4, 64, 8), random_grid(4, 2, torch.float32)
    packed = reference.pack(codes, 8)
    narrow = reference.dequantize(packed, scales, offsets, None, 8, 32, 64, dtype)
    wide = reference.dequantize(packed, scales, offsets, None, 8, 32, 64, torch.float32)
    step_by_step = wide.to(dtype)
    assert torch.equal(narrow, step_by_step)
    twice = codes.to(dtype) * reference.expand(scales.to(dtype), 32, 64) + reference.expand(offsets.to(dtype), 32, 64)
    assert not torch.equal(narrow, twice)  # the input tells the two apart


@pytest.mark.parametrize(("levels", "bits"), GRIDS)
def test_encode_takes_the_nearest_level(bits: int, levels: str) -> None:
    weight, (scales, offsets) = 3 * torch.randn(6, 40, dtype=torch.float64), random_grid(6, 3)
    table = None if levels == "int" else torch.tensor(normal_levels(bits), dtype=torch.float64)
    packed = reference.nearest_codes(weight, scales, offsets, table, bits, 16)
    values = table.tolist() if table is not None else None
    s, o = scales.tolist(), offsets.tolist()
    want = [
        [
            nearest_numpy.nearest(float(weight[row, i]), s[row][i // 16], o[row][i // 16], bits, values)
            for i in range(40)
        ]
        for row in range(6)
    ]
    np.testing.assert_array_equal(reference.unpack(packed, bits, 40).numpy(), want)


def test_encode_rounds_halves_to_even_codes_and_clamps() -> None:
    weight = torch.tensor([[-9.0, -0.5, 0.5, 1.5, 2.5, 3.5, 99.0, 1.0]])
    packed = reference.nearest_codes(weight, torch.ones(1, 1), None, None, 2, 8)
    assert reference.unpack(packed, 2, 8).tolist() == [[0, 0, 0, 2, 2, 3, 3, 1]]


def test_encode_gives_ties_between_levels_to_the_lower() -> None:
    levels = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    packed = reference.nearest_codes(
        torch.tensor([[-0.5, 0.25, 0.75, 0.2500001]]), torch.ones(1, 1), None, levels, 2, 4
    )
    assert reference.unpack(packed, 2, 4).tolist() == [[0, 1, 2, 2]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 5, 8, 31])
def test_pack_is_a_little_endian_stream_of_bits(bits: int, columns: int) -> None:
    codes = random_codes(4, columns, bits)
    packed = reference.pack(codes, bits)
    np.testing.assert_array_equal(packed.numpy(), pack_numpy.pack(codes.numpy(), bits))
    np.testing.assert_array_equal(reference.unpack(packed, bits, columns).numpy(), codes.numpy())


def test_group_range_of_a_short_last_group_sees_its_own_weights_alone() -> None:
    weight = torch.randn(5, 40)
    low, high = reference.group_range(weight, 16)
    for k, part in enumerate((slice(0, 16), slice(16, 32), slice(32, 40))):
        assert torch.equal(low[:, k], weight[:, part].min(1).values)
        assert torch.equal(high[:, k], weight[:, part].max(1).values)


@pytest.mark.parametrize("table", [None, torch.tensor(normal_levels(3), dtype=torch.float64)], ids=["int", "nf"])
def test_group_error_is_the_squared_error_of_rounding(table: torch.Tensor | None) -> None:
    weight, (scales, offsets) = 2 * torch.randn(3, 40, dtype=torch.float64), random_grid(3, 3)
    found = reference.group_error(weight, scales, offsets, table, 3, 16)
    values = None if table is None else table.tolist()
    for row in range(3):
        for k in range(3):
            s, o = float(scales[row, k]), float(offsets[row, k])
            total = 0.0
            for w in weight[row, 16 * k : 16 * k + 16].tolist():
                code = nearest_numpy.nearest(w, s, o, 3, values)
                total += (w - s * (code if values is None else values[code]) - o) ** 2
            assert float(found[row, k]) == pytest.approx(total, rel=1e-12)


def test_compensate_hands_each_error_on() -> None:
    x = torch.randn(50, 12, dtype=torch.float64).numpy()
    upper = np.linalg.cholesky(np.linalg.inv(damped(x.T @ x / 50, 0.01))).T
    weight, (scales, offsets) = torch.randn(4, 12, dtype=torch.float64), random_grid(4, 1)
    work, errors = weight.numpy().copy(), weight.clone()
    codes = reference.compensate(errors, torch.tensor(upper), scales[:, 0], offsets[:, 0], None, 4)
    for i in range(12):
        for row in range(4):
            s, o = float(scales[row, 0]), float(offsets[row, 0])
            code = nearest_numpy.nearest(work[row, i], s, o, 4, None)
            error = (work[row, i] - s * code - o) / upper[i, i]
            work[row, i:] -= error * upper[i, i:]
            assert code == codes[row, i]
            assert float(errors[row, i]) == pytest.approx(error, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("group_size", [1, 16, 40, 64])
def test_pool_sums_each_group(group_size: int) -> None:
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    want = x.numpy() @ qa_lora_numpy.pooling(40, group_size).T
    np.testing.assert_allclose(reference.pool(x, group_size).numpy(), want, atol=1e-12)


def test_pool_of_bfloat16_sums_in_float32() -> None:
    x = torch.full((1, 256), 1.0).bfloat16()
    x[0, 0] = 256.0  # bfloat16 would lose every 1 added to it
    found = reference.pool(x, 256)
    assert found.dtype == torch.float32
    assert float(found) == 511.0


def test_expand_repeats_groups_and_cuts_the_last() -> None:
    assert reference.expand(torch.tensor([[1, 2, 3]]), 4, 10).tolist() == [[1, 1, 1, 1, 2, 2, 2, 2, 3, 3]]


def test_rows_worked_on_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, (scales, offsets) = random_codes(37, 40, 3), random_grid(37, 3)
    packed = reference.pack(codes, 3)
    whole = reference.dequantize(packed, scales, offsets, None, 3, 16, 40, torch.float64)
    monkeypatch.setattr(reference, "_CHUNK", 200)
    assert reference.rows_per_chunk(40) == 5
    assert torch.equal(whole, reference.dequantize(packed, scales, offsets, None, 3, 16, 40, torch.float64))
