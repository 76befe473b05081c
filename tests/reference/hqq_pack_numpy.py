"""HQQ's files with groups along the inputs, written and read row by row in NumPy, by the description of the format."""

from __future__ import annotations

import numpy as np

MANY = {2: 4, 3: 10, 4: 2, 8: 1}
"""How many codes of a width a byte holds, or an int32 word of codes of 3 bits."""


def quantized(W: np.ndarray, bits: int, group_size: int) -> dict[str, np.ndarray]:
    """Codes `[out * groups, group_size]`, and scales and zero-points `[out * groups, 1]` in float16."""
    rows = W.reshape(-1, group_size)
    low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16)
    zero = (-low / scale.astype(np.float64) + 0.03).astype(np.float16)
    codes = np.round(rows / scale.astype(np.float64) + zero.astype(np.float64)).clip(0, 2**bits - 1)
    return {"codes": codes.astype(np.int64), "scale": scale, "zero": zero}


def write(found: dict[str, np.ndarray], bits: int, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """The tensors of a layer as they lie in a file."""
    many, codes = MANY[bits], found["codes"]
    count = -(-len(codes) // many)
    filled = np.zeros((count * many, codes.shape[1]), np.int64)
    filled[: len(codes)] = codes
    words = np.zeros((count, codes.shape[1]), np.int64)
    for row, each in enumerate(filled):
        part, at = divmod(row, count)
        words[at] += each << bits * (many - 1 - part)
    said = {"nbits": bits, "group_size": codes.shape[1], "axis": 1}
    return {
        "W_q": words.astype(np.int32 if bits == 3 else np.uint8),
        "scale": found["scale"],
        "zero": found["zero"],
        "shape": np.array(shape),
        **{name: np.array(value, np.int32) for name, value in said.items()},
        "round_zero": np.array(0, np.uint8),
    }


def read(parts: dict[str, np.ndarray]) -> np.ndarray:
    """The matrix `[out, in]` that the tensors of a layer mean, float64."""
    bits = int(parts["nbits"])
    words = parts["W_q"].astype(np.int64)
    codes = np.concatenate([words // 2 ** (bits * place) % 2**bits for place in reversed(range(MANY[bits]))])
    scale, zero = (parts[name].astype(np.float64) for name in ("scale", "zero"))
    return ((codes[: len(scale)] - zero) * scale).reshape(tuple(parts["shape"]))
