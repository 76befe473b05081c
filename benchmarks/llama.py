"""llama.cpp's own quantizer and its own forward, through `llama-cpp-python` (which pip builds from source).

    pip install llama-cpp-python

What a file loses is measured on the file itself, by the engine that serves it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {
    "Q4_K_M": 15,
    "Q4_K_S": 14,
    "IQ4_XS": 30,
    "Q3_K_L": 13,
    "Q3_K_M": 12,
    "Q3_K_S": 11,
    "IQ3_M": 27,
    "IQ3_S": 26,
    "IQ3_XXS": 23,
    "Q2_K": 10,
    "Q2_K_S": 21,
    "IQ2_M": 29,
    "IQ2_S": 28,
    "IQ2_XS": 20,
}
"""llama.cpp's mixtures of types (`llama_ftype`) that lie between 2 and 5 bits per weight."""

NEEDS_IMPORTANCE = ("IQ2_M", "IQ2_S", "IQ2_XS", "IQ3_XXS", "Q2_K_S")
"""Mixtures that llama.cpp makes only with an importance matrix, or advises it for."""


class RefusedError(RuntimeError):
    """llama.cpp's quantizer refuses a mixture for a model."""


def quantize(source: Path, target: Path, kind: str, importance: Mapping[str, np.ndarray] | None = None) -> None:
    """Quantize a GGUF file as `llama-quantize` does.

    Args:
        source: A file with dense weights.
        target: The file to write.
        kind: Name of the mixture, one of `TYPES`.
        importance: Mean square of the inputs of each matrix, float32 `[in]`, by its name in the file; None for none.

    Raises:
        RefusedError: llama.cpp refuses.
    """
    import llama_cpp as llama

    _silence()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = TYPES[kind], 1
    kept: list[Any] = []
    if importance:
        entries = (llama.llama_model_imatrix_data * (len(importance) + 1))()
        for at, (name, values) in enumerate(importance.items()):
            numbers, text = np.ascontiguousarray(values, np.float32), name.encode()
            kept += [numbers, text]
            entries[at].name = text
            entries[at].data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entries[at].size = numbers.size
        params.imatrix = entries
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        target.unlink(missing_ok=True)
        raise RefusedError(kind)


def loss(path: Path, windows: Sequence[Sequence[int]]) -> float:
    """Mean loss of the next token over windows of token ids, in nats, as llama.cpp computes it from a file.

    Args:
        path: A GGUF file.
        windows: Each is read by itself; its first token bears no loss.
    """
    import llama_cpp as llama

    _silence()
    longest = max(len(window) for window in windows)
    model = llama.Llama(
        model_path=str(path), n_ctx=longest, n_batch=longest, logits_all=True, n_threads=1, verbose=False
    )
    total, count = 0.0, 0
    try:
        for window in windows:
            model.reset()
            model.eval(list(window))
            logits = np.asarray(model.scores[: len(window) - 1], np.float64)
            top = logits.max(-1, keepdims=True)
            spread = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
            total += float((spread - logits[np.arange(len(window) - 1), np.asarray(window[1:])]).sum())
            count += len(window) - 1
    finally:
        model.close()
    return total / count


def _silence() -> None:
    """No lines of llama.cpp's own."""
    import llama_cpp as llama

    global _quiet  # the library keeps its address, so the function must live
    if _quiet is None:
        _quiet = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(_quiet, ctypes.c_void_p(0))


_quiet: Any = None
