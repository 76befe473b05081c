"""Codes in the int32 words of other software's files; importers read them, and exporters write them.

A stream of bits, the least significant first, in little-endian words is our packed row, byte for byte. Two more orders
are told apart from it here: AWQ's nibbles, and bitsandbytes' bytes and FP4 codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quadapt.kernels import pack, unpack

_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of one of AWQ's words that holds each of its eight outputs."""

FP4_CODES = (8, 9, 14, 15, 12, 13, 10, 11, 7, 6, 1, 0, 3, 2, 5, 4)
"""The place of each of bitsandbytes' FP4 codes among the levels in ascending order."""


def words(rows: Tensor) -> Tensor:
    """Packed rows, uint8 `[rows, bytes]`, as int32 `[rows, ceil(bytes / 4)]`, filled up with zeros."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4)).contiguous().view(torch.int32)


def stream(values: Tensor, bits: int) -> Tensor:
    """Rows of numbers, uint8 `[rows, n]`, as words `[rows, ceil(n * bits / 32)]` of their bits."""
    return words(pack(values.contiguous(), bits))


def of_stream(stream: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of each row of words, uint8 `[rows, count]`."""
    return unpack(stream.contiguous().view(torch.uint8), bits, count)


def awq_words(codes: Tensor) -> Tensor:
    """Codes, uint8 `[rows, out]`, as AWQ's words `[rows, out / 8]`."""
    eights = codes.view(len(codes), -1, 8)
    nibbles = torch.empty_like(eights)
    nibbles[..., _AWQ] = eights
    return words((nibbles[..., ::2] | (nibbles[..., 1::2] << 4)).flatten(1))


def of_awq_words(words: Tensor) -> Tensor:
    """The codes of AWQ's words `[rows, out / 8]`, uint8 `[rows, out]`."""
    pairs = words.contiguous().view(torch.uint8)
    nibbles = torch.stack((pairs & 15, pairs >> 4), -1).view(len(words), -1, 8)
    return nibbles[..., _AWQ].flatten(1)


def swapped(bytes: Tensor) -> Tensor:
    """Bytes, uint8, with their two nibbles in each other's place."""
    return (bytes >> 4) | (bytes << 4)
