"""MLX's files, written and read bit by bit in NumPy, by the description of the format alone."""

from __future__ import annotations

import numpy as np
from reference.gptq_pack_numpy import from_words, to_words


def write(W: np.ndarray, bits: int, group_size: int) -> dict[str, np.ndarray]:
    """The tensors of a layer for a matrix `W [out, in]`, float16; scales of either sign, as MLX has them."""
    out, columns = W.shape
    blocks = W.reshape(out, -1, group_size)
    low, high = blocks.min(-1), blocks.max(-1)
    turned = np.abs(low) < np.abs(high)  # the end of larger magnitude has the code zero
    scales = (np.where(turned, low - high, high - low) / (2**bits - 1)).astype(np.float16)
    biases = np.where(turned, high, low).astype(np.float16)
    steps = (blocks - biases.astype(np.float64)[..., None]) / scales.astype(np.float64)[..., None]
    codes = np.clip(np.round(steps), 0, 2**bits - 1).astype(np.int64).reshape(out, columns)
    weight = np.stack([to_words(row, bits) for row in codes]).view(np.uint32)
    return {"weight": weight, "scales": scales, "biases": biases}


def read(parts: dict[str, np.ndarray], bits: int, group_size: int) -> np.ndarray:
    """The matrix `[out, in]` that the tensors of a layer mean, float64, not rounded."""
    codes = np.stack([from_words(row.view(np.int32), bits) for row in parts["weight"]])
    scales, biases = (parts[name].astype(np.float64).repeat(group_size, 1) for name in ("scales", "biases"))
    return scales * codes + biases


def looked_up(parts: dict[str, np.ndarray], bits: int, group_size: int) -> np.ndarray:
    """The same as MLX computes it: in the dtype of the scales, the product rounded before the sum."""
    dtype = parts["scales"].dtype
    codes = np.stack([from_words(row.view(np.int32), bits) for row in parts["weight"]]).astype(dtype)
    scales, biases = (parts[name].repeat(group_size, 1) for name in ("scales", "biases"))
    return codes * scales + biases
