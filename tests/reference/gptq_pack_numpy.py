"""GPTQ's files, written and read bit by bit in NumPy, by the description of the format alone."""

from __future__ import annotations

import numpy as np


def to_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[n]` as a stream of bits, the least significant first, in int32 words."""
    stream = [(int(code) >> bit) & 1 for code in codes for bit in range(bits)]
    assert len(stream) % 32 == 0
    words = [sum(bit << at for at, bit in enumerate(stream[start : start + 32])) for start in range(0, len(stream), 32)]
    return np.array(words, np.uint32).view(np.int32)


def from_words(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes of such a stream."""
    stream = [(int(word) >> at) & 1 for word in words.view(np.uint32) for at in range(32)]
    return np.array(
        [sum(stream[start + bit] << bit for bit in range(bits)) for start in range(0, len(stream), bits)], np.int64
    )


def quantized(
    W: np.ndarray, bits: int, group_size: int, *, symmetric: bool, act_order: bool, seed: int = 0
) -> dict[str, np.ndarray]:
    """Codes `[in, out]`, zero-points and float16 scales `[groups, out]`, and `g_idx`, of a matrix `W [out, in]`."""
    columns = W.shape[1]
    width = columns if group_size == -1 else group_size
    g_idx = np.arange(columns) // width
    if act_order:
        g_idx = g_idx[np.argsort(np.random.default_rng(seed).permutation(columns))]
    groups, top = int(g_idx.max()) + 1, 2**bits - 1
    scales, zeros = np.zeros((groups, W.shape[0]), np.float16), np.zeros((groups, W.shape[0]), np.int64)
    codes = np.zeros((columns, W.shape[0]), np.int64)
    for g in range(groups):
        part = W[:, g_idx == g]
        if symmetric:
            scales[g] = np.abs(part).max(1) / 2 ** (bits - 1)
            zeros[g] = 2 ** (bits - 1)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[g] = (high - low) / top
            zeros[g] = np.clip(np.round(-low / scales[g].astype(np.float64)), 0, top)
        step = scales[g].astype(np.float64)[:, None]
        codes[g_idx == g] = np.clip(np.round(part / step) + zeros[g][:, None], 0, top).T.astype(np.int64)
    return {"codes": codes, "zeros": zeros, "scales": scales, "g_idx": g_idx}


def write(found: dict[str, np.ndarray], bits: int, version: int) -> dict[str, np.ndarray]:
    """The tensors of a layer as they lie in a file."""
    kept = (found["zeros"] - (version == 1)) % 2**bits
    return {
        "qweight": np.stack([to_words(column, bits) for column in found["codes"].T], 1),
        "qzeros": np.stack([to_words(row, bits) for row in kept]),
        "scales": found["scales"],
        "g_idx": found["g_idx"].astype(np.int32),
    }


def read(parts: dict[str, np.ndarray], bits: int, version: int) -> np.ndarray:
    """The matrix `[out, in]` that the tensors of a layer mean, float64."""
    codes = np.stack([from_words(column, bits) for column in parts["qweight"].T], 1)
    zeros = np.stack([from_words(row, bits) for row in parts["qzeros"]]) + (version == 1)
    g = parts["g_idx"]
    return (parts["scales"].astype(np.float64)[g] * (codes - zeros[g])).T
