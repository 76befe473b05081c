"""Starts that fit the adapter to what quantization changed in the layer's outputs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.nn.starts.base import STARTS, Begun, Quantize, Start, folded
from quadapt.nn.starts.fit import Factors, balanced, leading, moment_of, objective, padded, solved, svd_factors
from quadapt.quant.fixed import mean, one_thread, total
from quadapt.quant.grids import check_choice
from quadapt.quant.rounding import Statistics
from quadapt.quant.weight import QuantWeight


@dataclass(frozen=True, kw_only=True)
class Calibrated(Start):
    """A quantized base as it is, and the low-rank term nearest to its error `E = W - Q` as inputs see it."""

    needs: ClassVar[frozenset[str]] = frozenset({"dense_second_moment"})

    def __call__(
        self, weight: Tensor, quantize: Quantize, rank: int, statistics: Statistics, *, pooled: bool = False
    ) -> Begun:
        base = quantize(weight)
        E = weight.double() - base.dequantize().double()
        H = moment_of(statistics.get("dense_second_moment"), E)
        if pooled:
            return folded(base, E, H)
        up, down = self.fit(E, H, rank)
        return Begun(base, (up.float(), down.float()))

    @abstractmethod
    def fit(self, E: Tensor, H: Tensor, rank: int) -> Factors:
        """Factors for an error `[out, in]` under a second moment `[in, in]`, all float64."""


@STARTS.register("quailora")
@dataclass(frozen=True, kw_only=True)
class QuAILoRA(Calibrated):
    """QuAILoRA (Lawton et al. 2024, arXiv:2410.14713, eqs. 2 to 6): alternating least squares from the SVD of `E`.

        A <- E H B (B^T H B)^-1,    B <- E^T A (A^T A)^-1

    `H` is never inverted; no half-step raises the objective. It converges to :class:`CLoQ`'s closed form.

    Differs: the LoRA scaling is absorbed by the factors; the paper does not say. Singular Gram matrices are damped by
        1e-9 of their mean diagonal.
    """

    summary: ClassVar[str] = "fitted to what quantization changed about outputs, by turns"

    iterations: int = 20
    """Sweeps over A and B (the paper: 20)."""

    balance: bool = False
    """Share the singular values out evenly in the end; the product is the same."""

    def fit(self, E: Tensor, H: Tensor, rank: int) -> Factors:
        A, Bt = svd_factors(E, min(rank, *E.shape))
        gained = 0.0
        for _ in range(self.iterations):
            HB = H @ Bt.T
            EHB = E @ HB
            A = solved(Bt @ HB, EHB.T).T
            Bt = solved(A.T @ A, A.T @ E)
            gain = float(total(A * EHB))  # twice what this A has taken off the objective: never falls
            if gain <= gained * (1 + 1e-12):
                break
            gained = gain
        return padded(balanced((A, Bt)) if self.balance else (A, Bt), rank)


@STARTS.register("cloq")
@dataclass(frozen=True, kw_only=True)
class CLoQ(Calibrated):
    r"""CLoQ (Deng et al. 2025, arXiv:2501.18475) and QERA-exact (arXiv:2410.06040): the optimum in closed form.

    With `H = R R^T`, `up @ down = LR_r(E R) R^-1`: the best rank-r approximation of `E R`, taken back through `R`.
    Channels that inputs never use get nothing.
    """

    summary: ClassVar[str] = "fitted to what quantization changed about outputs, in closed form"

    split: Literal["even", "up", "down"] = "even"
    """Which factor carries the singular values of `E R`: half each, `lora_B`, or `lora_A`."""

    damping: float = 1e-4
    """Added to the eigenvalues of `H`, as a fraction of their mean."""

    def __post_init__(self) -> None:
        check_choice("split", self.split, ("even", "up", "down"))
        if not 0 <= self.damping < 1:
            raise ConfigError(f"damping={self.damping} is not between 0 and 1. Published code uses 1e-4")

    def root(self, H: Tensor) -> tuple[Tensor, Tensor]:
        """`R` and its inverse; a symmetric root, float64 `[in, in]`."""
        with one_thread():
            values, vectors = torch.linalg.eigh(H)
        values = values.clamp_min(0) + self.damping * mean(values.clamp_min(0))
        root = values.sqrt()
        inverse = torch.where(root > 0, 1 / root, 0)
        return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T

    def fit(self, E: Tensor, H: Tensor, rank: int) -> Factors:
        R, inverse = self.root(H)
        U, S, Vh = leading(E @ R, rank)
        down = Vh @ inverse
        share = {"even": 0.5, "up": 1.0, "down": 0.0}[self.split]
        return padded((U * S**share, (S ** (1 - share))[:, None] * down), rank)


@STARTS.register("qera")
@dataclass(frozen=True, kw_only=True)
class QERA(CLoQ):
    """QERA-approx (Zhang et al. 2024, arXiv:2410.06040): :class:`CLoQ` with the diagonal of `H` alone.

    Optimal where channels are uncorrelated; it needs no more than a number for each input.
    """

    summary: ClassVar[str] = "as cloq, with no more than the scale of each input"

    def root(self, H: Tensor) -> tuple[Tensor, Tensor]:
        values = H.diagonal().clamp_min(0)
        root = (values + self.damping * mean(values)).sqrt()
        return torch.diag(root), torch.diag(torch.where(root > 0, 1 / root, 0))


@STARTS.register("loftq")
@dataclass(frozen=True, kw_only=True)
class LoftQ(Start):
    """LoftQ (Li et al. 2023, arXiv:2310.08659, Algorithm 1): quantize `W - A B`, and fit `A B` to the rest, in turn.

    Ends on a fit. One iteration leaves the quantized base as it is.

    Differs: keeps the best iterate, since a later one may be worse; the LoRA scaling is absorbed by the factors, which
        PEFT's does not do.
    """

    summary: ClassVar[str] = "fitted to what quantization changed about the matrix"

    iterations: int = 5
    """Times to quantize (the paper: 5; PEFT's default is 1)."""

    def __call__(
        self, weight: Tensor, quantize: Quantize, rank: int, statistics: Statistics, *, pooled: bool = False
    ) -> Begun:
        W = weight.double()
        base = quantize(weight)
        if pooled:
            return folded(base, W - base.dequantize().double(), None)
        best: tuple[float, QuantWeight, Factors] | None = None
        for _ in range(self.iterations):
            E = W - base.dequantize().double()
            factors = svd_factors(E, rank)
            left = objective(E, None, factors)
            if best is None or left < best[0]:
                best = left, base, factors
            base = quantize((W - factors[0] @ factors[1]).float())
        assert best is not None
        _, base, (up, down) = best
        return Begun(base, (up.float(), down.float()))
