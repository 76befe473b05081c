"""Packing as one big number per row: code `i` stands at bit `i * bits`, bytes follow from the lowest."""

from __future__ import annotations

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Uint8 `[out, in]` to uint8 `[out, ceil(in * bits / 8)]`."""
    size = (codes.shape[1] * bits + 7) // 8
    rows = []
    for row in codes:
        number = sum(int(code) << (i * bits) for i, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(size, "little"), np.uint8))
    return np.stack(rows)


def unpack(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Undo `pack`."""
    numbers = [int.from_bytes(row.tobytes(), "little") for row in packed]
    return np.array([[(number >> (i * bits)) & (2**bits - 1) for i in range(columns)] for number in numbers], np.uint8)
