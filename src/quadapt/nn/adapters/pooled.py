r"""The adapter of QA-LoRA (Xu et al. 2023, arXiv:2309.14717): it sees its inputs summed over each quantization group.

So its update is constant within a group, `dW[o, i] = scaling * (B A)[o, group of i]`, and is a shift of the group's
offset: `offsets += scaling * B @ A`. Codes and scales never change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.kernels import expand, pool
from quadapt.nn.adapters.base import (
    ADAPTERS,
    Begins,
    Dropout,
    Exactness,
    LowRank,
    Param,
    Params,
    Source,
    add_low_rank,
    check_offsets,
    xavier,
)
from quadapt.nn.adapters.codes import CodesAdapter, promoted, quantized
from quadapt.quant.autograd import offset_gradient
from quadapt.quant.grids import check_choice
from quadapt.quant.storage import FLOATS, Storage
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.setting import setting


@ADAPTERS.register("pooled")
@dataclass(frozen=True, kw_only=True)
class Pooled(LowRank, CodesAdapter):
    """`W' = scales * levels[codes] + offsets + scaling * B @ A`, with `A [rank, groups]`.

    Trained in the merged form by default: forward computes with the offsets that a merge would store, rounded to their
    stored dtype (straight through), so that the merged model is the trained one bit for bit, in any compute dtype. Its
    gradient costs `1 / group_size` of a matrix product.

    Differs: the paper trains a side branch on pooled inputs (`form="side"`), which equals the merged model but for
        rounding: with fp16 offsets the merge then loses 1 to 9 % of what the adapter does.
    """

    pooling: Literal["sum", "mean"] = setting(panel="Adapter", default="sum")
    """sum over a group, as in the paper, or mean, as in the authors' code: there the same A and B do `1 / group_size`
    as much."""

    form: Literal["merged", "side"] = setting(panel="Adapter", default="merged")
    """merged: train what a merge will give. side: a branch beside the quantized matrix, as published."""

    offsets: Literal["base", "fp16", "fp32"] = "base"
    """How the merged offsets are stored; base: as the floats of the quantized base are, or in its super-blocks; fp16
    where it has neither."""

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, ("sum", "mean"))
        check_choice("form", self.form, ("merged", "side"))
        check_choice("offsets", self.offsets, ("base", *FLOATS))

    @property
    def begins(self) -> Begins:
        return "offsets"

    def check(self, layout: Layout, rank: int, dropout: float) -> None:
        if self.form == "merged" and dropout:
            raise ConfigError(
                f"dropout={dropout} has no meaning in the merged form, which has no branch to drop. "
                "Use dropout=0, or form='side'"
            )
        check_offsets(self.kind, layout)

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        return self.low_rank(layout, layout.groups, rank, xavier)

    @property
    def exactness(self) -> Exactness:
        return "exact" if self.merged_form else "equivalent"

    @property
    def merged_form(self) -> bool:
        return self.form == "merged"

    def merge(self, source: Source, params: Params, scaling: float) -> QuantWeight:
        """Shift the offsets by what the adapter adds to each group.

        `B @ A` is computed in float64: a merge on another device, or with other threads, must round to the same
        offsets.
        """
        weight, (A, B) = quantized(source), self.factors(params)
        change = self._strength(weight.layout, scaling) * (B.double() @ A.double())
        base = weight.offsets
        return weight.with_offsets(
            (change if base is None else base + change).float(), self._storage(weight.layout.storage)
        )

    def _storage(self, storage: Storage) -> str:
        if self.offsets != "base":
            return self.offsets
        return storage.floats

    def keep(self, layout: Layout, pooled: Tensor, params: Params, needed: frozenset[str]) -> Tensor:
        """The pooled inputs themselves; where `A` is frozen, `pooled A^T [tokens, rank]` is all that `B` needs."""
        if "A" in needed:
            return pooled
        pooled, A = promoted(pooled, params["A"])
        return pooled @ A.T

    def gradients(
        self, layout: Layout, params: Params, scaling: float, dy: Tensor, kept: Tensor, needed: frozenset[str]
    ) -> Params:
        gradient = self._strength(layout, scaling) * offset_gradient(dy, kept)
        if "A" not in needed:
            return {"B": gradient.to(params["B"].dtype)}
        gradient, A, B = promoted(gradient, params["A"], params["B"])
        return {"A": (B.T @ gradient).to(params["A"].dtype), "B": (gradient @ A.T).to(params["B"].dtype)}

    def side(self, x: Tensor, y: Tensor, source: Source, params: Params, scaling: float, dropout: Dropout) -> Tensor:
        if self.merged_form:
            return y
        strength = self._strength(quantized(source).layout, scaling)
        return add_low_rank(y, self._pooled(dropout(x), source), *self.factors(params), strength)

    def _pooled(self, x: Tensor, source: Source) -> Tensor:
        """`x [.., in]` summed over the groups of the matrix, `[.., groups]` in the dtype of `x`."""
        weight = quantized(source)
        return pool(weight.stored_order(x), weight.format.width(weight.layout.columns)).to(x.dtype)

    def as_lora(self, source: Source, params: Params) -> tuple[Tensor, Tensor]:
        """Repeat each column of `A` for all inputs of its group."""
        weight, (A, B) = quantized(source), self.factors(params)
        columns = weight.layout.columns
        wide = weight.layer_order(expand(A, weight.format.width(columns), columns))
        return wide * self._strength(weight.layout, 1.0), B

    def _strength(self, layout: Layout, scaling: float) -> float:
        """Factor of `B @ A` in the offsets. A shorter last group counts as a full one that ends in zeros."""
        return scaling / layout.format.width(layout.columns) if self.pooling == "mean" else scaling
