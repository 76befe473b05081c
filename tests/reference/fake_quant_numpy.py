"""Trained quantizers in float64, with the signed codes of the papers: forward and the gradients from `dY` alone.

L4Q (arXiv 2402.04902) eqs. 5-14 and 16-30; LR-QAT (arXiv 2406.06385); PEQA (arXiv 2305.14152). Loops over single
weights, so that nothing is shared with the code under test.
"""

from __future__ import annotations

import numpy as np


def l4q(
    X: np.ndarray,
    dY: np.ndarray,
    W0: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    alpha: float,
    s: np.ndarray,
    b: np.ndarray,
    bits: int,
    group: int,
    order: str = "clamp-round",
    tolerance: float = 1e-4,
) -> dict[str, np.ndarray]:
    """`Wq = s q + b` with `q = round(clamp((W0 + alpha B A - b) / s))` in `-2**(bits-1) .. 2**(bits-1) - 1`."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    W, G = W0 + alpha * (B @ A), dY.T @ X
    Wq, Gm, clipped = np.zeros_like(W), np.zeros_like(W), np.zeros_like(W)
    ds, db = np.zeros_like(s), np.zeros_like(s)
    for o in range(W.shape[0]):
        for i in range(W.shape[1]):
            k = i // group
            v = (W[o, i] - b[o, k]) / s[o, k]
            q = min(max(round(v), low), high)  # Python rounds halves to even
            if order == "clamp-round":
                inside = low - tolerance <= v <= high + tolerance
            else:
                inside = low <= round(v) <= high
            Wq[o, i] = s[o, k] * q + b[o, k]
            ds[o, k] += G[o, i] * (q - v if inside else q)
            db[o, k] += 0 if inside else G[o, i]
            Gm[o, i] = G[o, i] if inside else 0
            clipped[o, i] = not inside
    return {
        "weight": Wq, "y": X @ Wq.T, "x": dY @ Wq, "base": Gm, "A": alpha * B.T @ Gm, "B": alpha * Gm @ A.T,
        "s": ds, "b": db, "clipped": clipped,
    }  # fmt: skip


def lr_qat(
    X: np.ndarray,
    dY: np.ndarray,
    real: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    alpha: float,
    s: np.ndarray,
    bits: int,
    group: int,
) -> dict[str, np.ndarray]:
    """`Wq = s clip(round(real + alpha B A))`, symmetric; `real` are signed real-valued codes."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v, G = real + alpha * (B @ A), dY.T @ X
    Wq, dC, ds = np.zeros_like(v), np.zeros_like(v), np.zeros_like(s)
    for o in range(v.shape[0]):
        for i in range(v.shape[1]):
            k, r = i // group, round(v[o, i])
            q = min(max(r, low), high)
            Wq[o, i] = s[o, k] * q
            ds[o, k] += G[o, i] * q
            dC[o, i] = G[o, i] * s[o, k] if low <= r <= high else 0
    return {"weight": Wq, "y": X @ Wq.T, "x": dY @ Wq, "A": alpha * B.T @ dC, "B": alpha * dC @ A.T, "s": ds}


def peqa(
    X: np.ndarray, dY: np.ndarray, levels: np.ndarray, s: np.ndarray, z: np.ndarray, group: int
) -> dict[str, np.ndarray]:
    """`Wq = s (levels - z)` with `levels [out, in]` frozen: `ds = sum G (levels - z)`."""
    columns = levels.shape[1]
    k = np.arange(columns) // group
    G, centred = dY.T @ X, levels - z[:, k]
    ds = np.stack([(G * centred)[:, k == j].sum(1) for j in range(s.shape[1])], axis=1)
    return {"y": X @ (s[:, k] * centred).T, "s": ds}
