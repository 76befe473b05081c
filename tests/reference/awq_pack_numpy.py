"""AWQ's files of version gemm, written and read word by word in NumPy, by the description of the format alone."""

from __future__ import annotations

import numpy as np

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of the eight outputs of a word lies in each of its nibbles, from the least significant."""


def to_words(codes: np.ndarray) -> np.ndarray:
    """Codes `[rows, out]` as int32 words `[rows, out / 8]`."""
    rows, out = codes.shape
    words = np.zeros((rows, out // 8), np.uint32)
    for row in range(rows):
        for word in range(out // 8):
            words[row, word] = sum(int(codes[row, 8 * word + o]) << 4 * p for p, o in enumerate(ORDER))
    return words.view(np.int32)


def from_words(words: np.ndarray) -> np.ndarray:
    """The codes `[rows, out]` of such words."""
    rows, count = words.shape
    codes = np.zeros((rows, 8 * count), np.int64)
    for p, o in enumerate(ORDER):
        codes[:, o::8] = (words.view(np.uint32) >> np.uint32(4 * p)) & 15
    return codes


def write(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a layer as they lie in a file, of what `gptq_pack_numpy.quantized` gives."""
    return {
        "qweight": to_words(found["codes"]),
        "qzeros": to_words(found["zeros"]),
        "scales": found["scales"],
    }


def read(parts: dict[str, np.ndarray], group_size: int) -> np.ndarray:
    """The matrix `[out, in]` that the tensors of a layer mean, float64."""
    codes, zeros = from_words(parts["qweight"]), from_words(parts["qzeros"])
    g = np.arange(len(codes)) // (len(codes) if group_size == -1 else group_size)
    return ((codes - zeros[g]) * parts["scales"].astype(np.float64)[g]).T
