"""Information elastic connections (IR-QLoRA, section 3.3), matrix by matrix, in float64."""

from __future__ import annotations

import math

import numpy as np


def first(inputs: int, rank: int) -> np.ndarray:
    """`M1 [inputs, rank]`: latents are means of runs of inputs."""
    g, found = math.gcd(inputs, rank), np.zeros((inputs, rank))
    for i in range(inputs):
        for j in range(rank):
            if i // (inputs // g) == j // (rank // g):
                found[i, j] = g / inputs
    return found


def second(rank: int, outputs: int) -> np.ndarray:
    """`M2 [rank, outputs]`: outputs are means of runs of latents (repeat-interleave, where `rank` divides them)."""
    g, found = math.gcd(outputs, rank), np.zeros((rank, outputs))
    for i in range(rank):
        for k in range(outputs):
            if i // (rank // g) == k // (outputs // g):
                found[i, k] = g / rank
    return found


def tiled(rank: int, outputs: int) -> np.ndarray:
    """The layout of the paper's equations 12 to 14, where `rank` divides `outputs`: output k from latent k mod rank."""
    return np.tile(np.eye(rank), (1, outputs // rank))


def branch(
    x: np.ndarray, A: np.ndarray, B: np.ndarray, beta: tuple[float, float], kept: np.ndarray | None = None
) -> np.ndarray:
    """`U2(U1(x))`; `kept`: the inputs before dropout, which the connections see."""
    (rank, inputs), outputs = A.shape, len(B)
    hidden = x @ A.T + beta[0] * (x if kept is None else kept) @ first(inputs, rank)
    return hidden @ B.T + beta[1] * hidden @ second(rank, outputs)
