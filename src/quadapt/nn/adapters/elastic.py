r"""Information elastic connections (IR-QLoRA, Qin et al. 2024, arXiv:2402.05445, section 3.3): a LoRA with short cuts.

    U1(x) = x A^T + beta1 * x M1,    U2(z) = z B^T + beta2 * z M2,    y = x W^T + scaling * U2(U1(x))

`M1 [in, rank]` averages inputs, `M2 [rank, out]` spreads latents, and neither trains; beta1 and beta2 do, one number
each a layer. With `g = gcd(in, rank)`, `M1` joins the i-th of `g` even runs of inputs to the i-th of `g` even runs of
latents, by their mean; `M2` does the same for `gcd(out, rank)`. Both are linear, so that the whole is again a LoRA,
of the same rank: `A + beta1 * M1^T` and `B + beta2 * M2^T`. That is how it is computed here, merged and handed over.

Differs: the paper's equations 12 to 14 repeat the latents one run after the other (output k from latent k mod rank),
    its merge (eq. 16) and its code repeat each latent in place (k from floor(k * rank / out)). The two disagree; this
    is the latter, with which training and merge agree. Its code has `rank` divide both dimensions; this needs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quadapt.nn.adapters.base import ADAPTERS, Dropout, Param, Params, Source, same, zeros
from quadapt.nn.adapters.codes import CodesAdapter, quantized
from quadapt.nn.adapters.lora import LoRA
from quadapt.nn.adapters.pooled import Pooled
from quadapt.quant.weight import Layout

BETA = Param(shape=(2,), init=zeros)
"""beta1 and beta2 of a layer."""


class _Connected(CodesAdapter):
    """What both adapters below have in common: two betas, which are worked into the factors."""

    extra: ClassVar[tuple[str, ...]] = ("beta",)

    def acting(self, params: Params) -> Params:
        """The factors with their connections; without betas (at first these are zero) as they are."""
        if "beta" not in params:
            return params
        beta = params["beta"]
        return {"A": _connect(params["A"], beta[0]), "B": _connect(params["B"], beta[1])}


@ADAPTERS.register("elastic")
@dataclass(frozen=True, kw_only=True)
class Elastic(_Connected, LoRA):
    """LoRA with IR-QLoRA's connections. Cannot merge into codes; goes out as an ordinary LoRA of the same rank."""

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        return {**super().params(layout, rank, started=started), "beta": BETA}

    def side(self, x: Tensor, y: Tensor, source: Source, params: Params, scaling: float, dropout: Dropout) -> Tensor:
        dropped, acting = dropout(x), self.acting(params)
        y = super().side(dropped, self.beside(x, y, params, scaling), source, acting, scaling, same)
        if dropped is x or "beta" not in params:
            return y
        return _add_mean(y, x - dropped, acting["B"], scaling * params["beta"][0])


@ADAPTERS.register("elastic-pooled")
@dataclass(frozen=True, kw_only=True)
class ElasticPooled(_Connected, Pooled):
    """QA-LoRA's adapter with IR-QLoRA's connections, which start from the pooled inputs: merges exactly.

    Differs: the authors' code takes `M1` over all inputs, even where `A` sees pooled ones. Its runs of `in / rank`
        inputs are whole groups for few shapes (of Llama-7B's not for down_proj, of 13B's for none), and what is not
        constant within a group cannot merge into offsets. Here `M1` has the groups for inputs.
    """

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        return {**super().params(layout, rank, started=started), "beta": BETA}

    def side(self, x: Tensor, y: Tensor, source: Source, params: Params, scaling: float, dropout: Dropout) -> Tensor:
        if self.merged_form:
            return y
        dropped, acting = dropout(x), self.acting(params)
        y = super().side(dropped, y, source, acting, scaling, same)
        if dropped is x or "beta" not in params:
            return y
        strength = self._strength(quantized(source).layout, scaling)
        return _add_mean(y, self._pooled(x - dropped, source), acting["B"], strength * params["beta"][0])


def _connect(factor: Tensor, beta: Tensor) -> Tensor:
    """`factor + beta * M^T` for a factor `[outputs, inputs]`, in float32 at least.

    Elements of `M^T` are `g / inputs` where input and output lie in the same of `g = gcd` even runs, else zero.
    """
    outputs, inputs = factor.shape
    runs, dtype = math.gcd(outputs, inputs), torch.promote_types(factor.dtype, torch.float32)
    row = torch.arange(outputs, device=factor.device) // (outputs // runs)
    column = torch.arange(inputs, device=factor.device) // (inputs // runs)
    joined = row[:, None] == column
    return factor.to(dtype) + torch.where(joined, beta.to(dtype) * (runs / inputs), 0)


def _add_mean(y: Tensor, x: Tensor, lora_B: Tensor, strength: Tensor) -> Tensor:
    """`y + strength * x M1 B^T`, by the means of `x` over its runs: nothing of its size is kept for backward."""
    rank = lora_B.shape[1]
    runs = math.gcd(x.shape[-1], rank)
    means = x.unflatten(-1, (runs, -1)).mean(-1).repeat_interleave(rank // runs, -1)
    return y + torch.nn.functional.linear(strength.to(y.dtype) * means.to(y.dtype), lora_B.to(y.dtype))
