r"""The adapter of QA-LoRA (Xu et al. 2023, arXiv:2309.14717): it sees its inputs summed over each quantization group.

So its update is constant within a group, `dW[o, i] = scaling * (B A)[o, group of i]`, and is a shift of the group's
offset: `offsets += scaling * B @ A`. Codes and scales never change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quadapt.errors import ConfigError
from quadapt.kernels import expand, pool
from quadapt.nn.adapters.base import Begins, CodesAdapter, Exactness, add_low_rank
from quadapt.quant.grids import check_choice
from quadapt.quant.storage import FLOATS, Storage
from quadapt.quant.weight import Layout, QuantWeight


@dataclass(frozen=True, kw_only=True)
class Pooled(CodesAdapter):
    """`W' = scales * levels[codes] + offsets + scaling * B @ A`, with `A [rank, groups]`.

    Trained in the merged form by default: forward computes with the offsets that a merge would store, rounded to their
    stored dtype (straight through), so that the merged model is the trained one bit for bit, in any compute dtype. Its
    gradient costs `1 / group_size` of a matrix product.

    Differs: the paper trains a side branch on pooled inputs (`form="side"`), which equals the merged model but for
        rounding: with fp16 offsets the merge then loses 1 to 9 % of what the adapter does.
    """

    kind: ClassVar[str] = "pooled"

    pooling: Literal["sum", "mean"] = "sum"
    """sum over a group, as in the paper, or mean, as in the authors' code: there the same A and B do `1 / group_size`
    as much."""

    form: Literal["merged", "side"] = "merged"
    """merged: train what a merge will give. side: a branch beside the quantized matrix, as published."""

    offsets: Literal["base", "fp16", "fp32"] = "base"
    """How the merged offsets are stored; base: as the floats of the quantized base are, fp16 where it has none."""

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

    def inputs(self, layout: Layout) -> int:
        return layout.groups

    def reset(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.xavier_uniform_(lora_A)
        nn.init.zeros_(lora_B)

    @property
    def exactness(self) -> Exactness:
        return "exact" if self.merged_form else "equivalent"

    @property
    def merged_form(self) -> bool:
        return self.form == "merged"

    def merge(self, weight: QuantWeight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> QuantWeight:
        """Shift the offsets.

        `B @ A` is computed in float64: a merge on another device, or with other threads, must round to the same
        offsets.
        """
        change = self._strength(weight.layout, scaling) * (lora_B.double() @ lora_A.double())
        base = weight.offsets
        return weight.with_offsets(
            (change if base is None else base + change).float(), self._kind(weight.layout.storage)
        )

    def _kind(self, storage: Storage) -> Literal["fp16", "fp32"]:
        if self.offsets != "base":
            return self.offsets
        return storage.floats

    def offset_gradients(
        self, layout: Layout, lora_A: Tensor, lora_B: Tensor, scaling: float, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradient = self._strength(layout, scaling) * gradient
        kind = torch.promote_types(gradient.dtype, lora_A.dtype)
        gradient, A, B = gradient.to(kind), lora_A.to(kind), lora_B.to(kind)
        return (B.T @ gradient).to(lora_A.dtype), (gradient @ A.T).to(lora_B.dtype)

    def side(self, x: Tensor, y: Tensor, weight: QuantWeight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        if self.merged_form:
            return y
        pooled = pool(weight.stored_order(x), weight.format.width(weight.layout.columns)).to(x.dtype)
        return add_low_rank(y, pooled, lora_A, lora_B, self._strength(weight.layout, scaling))

    def as_lora(self, weight: QuantWeight, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Repeat each column of `A` for all inputs of its group."""
        columns = weight.layout.columns
        A = weight.layer_order(expand(lora_A, weight.format.width(columns), columns))
        return A * self._strength(weight.layout, 1.0), lora_B

    def _strength(self, layout: Layout, scaling: float) -> float:
        """Factor of `B @ A` in the offsets. A shorter last group counts as a full one that ends in zeros."""
        return scaling / layout.format.width(layout.columns) if self.pooling == "mean" else scaling
