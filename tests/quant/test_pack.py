"""Packing loses nothing, wastes less than a byte a row, and lays codes out as documented."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import pack_numpy

from quadapt.kernels import cpu, pack, unpack
from quadapt.quant.format import Format


@st.composite
def codes(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.sampled_from([2, 3, 4, 5, 6, 8]))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 70)))
    return draw(arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1))), bits


@given(codes())
def test_unpack_undoes_pack(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    packed = pack(torch.from_numpy(values), bits)
    np.testing.assert_array_equal(unpack(packed, bits, values.shape[1]).numpy(), values)


@given(codes())
def test_a_row_is_a_stream_of_bits_in_the_fewest_bytes(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    packed = pack(torch.from_numpy(values), bits)
    assert packed.dtype == torch.uint8
    assert packed.shape[1] == Format(bits=bits).row_bytes(values.shape[1]) == -(-values.shape[1] * bits // 8)
    np.testing.assert_array_equal(packed.numpy(), pack_numpy.pack(values, bits))


@given(codes())
def test_the_compiled_encoder_packs_the_same(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    weight = torch.from_numpy(values).float()
    packed = cpu.nearest_codes(weight, torch.ones(len(weight), 1), None, None, bits, weight.shape[1])
    np.testing.assert_array_equal(packed.numpy(), pack_numpy.pack(values, bits))


@given(codes())
def test_the_compiled_decoder_reads_the_same(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    packed = torch.from_numpy(pack_numpy.pack(values, bits).copy())
    weight = cpu.dequantize(
        packed, torch.ones(len(values), 1), None, None, bits, values.shape[1], values.shape[1], torch.float32
    )
    np.testing.assert_array_equal(weight.numpy(), values)


def test_three_bit_codes_straddle_bytes() -> None:
    packed = pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 5]], dtype=torch.uint8), 3)
    assert packed.tolist() == [[0b11_010_001, 0b0_101_100_0, 0b000_111_11, 0b101]]
