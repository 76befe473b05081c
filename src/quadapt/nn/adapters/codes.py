"""Adapters over a matrix whose codes and scales stay as they are, alone or several in one layer.

In the merged form an adapter moves the offsets: the product computes with what a merge would store. Otherwise it is a
side branch, added to the product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quadapt.errors import MergeError
from quadapt.nn.adapters.base import Adapter, Base, Dropout, Params, Part, Source, same
from quadapt.quant.autograd import quant_matmul
from quadapt.quant.weight import Layout, QuantWeight


@dataclass(frozen=True, kw_only=True)
class CodesAdapter(Adapter):
    """An adapter over codes. By itself a side branch that cannot merge: deriving classes say what they add to that."""

    base: ClassVar[Base] = "codes"
    stacks: ClassVar[bool] = True

    def layout_of(self, source: Source) -> Layout:
        return quantized(source).layout

    def factors(self, params: Params) -> tuple[Tensor, Tensor]:
        """`A` and `B` that act, differentiable in what is stored."""
        acting = self.acting(params)
        return acting["A"], acting["B"]

    def forward(self, x: Tensor, source: Source, params: Params, scaling: float, dropout: Dropout = same) -> Tensor:
        return stacked(x, quantized(source), [Part(self, params, scaling, dropout)])

    def merge(self, source: Source, params: Params, scaling: float) -> QuantWeight:
        raise MergeError(
            f"{self.kind} adapters change weights within a group, which the codes of "
            f"{quantized(source).layout.name} cannot follow. Serve base + adapter (export --format lora), train with "
            "--method qa-lora, or accept the loss and requantize (merge --requantize)"
        )

    def dense(self, source: Source, params: Params, scaling: float) -> Tensor:
        return stacked_dense(quantized(source), [Part(self, params, scaling)])

    def untrained(self, source: Source, params: Params, scaling: float) -> QuantWeight:
        return quantized(source)


def quantized(source: Source) -> QuantWeight:
    """The quantized matrix that a layer hands to an adapter over codes."""
    assert isinstance(source, QuantWeight)
    return source


def stacked(x: Tensor, weight: QuantWeight, parts: Sequence[Part]) -> Tensor:
    """The product `[.., out]` for `x [.., in]` with several adapters over codes.

    Those in the merged form move the offsets together, each from where those before it have moved them; then side
    branches are added, in order. Without any it is the product with the matrix alone.
    """
    inside = [(part, part.adapter.acting(part.params)) for part in parts if part.adapter.merged_form]
    move = MergedForm(
        tuple((part.adapter, part.scaling) for part, _ in inside), tuple(tuple(acting) for _, acting in inside)
    )
    params = tuple(tensor for _, acting in inside for tensor in acting.values())
    y = quant_matmul(x, weight, move if inside else None, params)
    for part in parts:
        y = part.adapter.side(x, y, weight, part.params, part.scaling, part.dropout)
    return y


def stacked_dense(weight: QuantWeight, parts: Sequence[Part]) -> Tensor:
    """The matrix that :func:`stacked` computes with, side branches added up, float32 `[out, in]`."""
    moved = weight
    for part in parts:
        if part.adapter.merged_form:
            moved = part.adapter.merge(moved, part.params, part.scaling)
    dense = moved.dequantize()
    for part in parts:
        lora = None if part.adapter.merged_form else part.adapter.as_lora(weight, part.params)
        if lora is not None:
            dense = dense + part.scaling * (lora[1].float() @ lora[0].float())
    return dense


@dataclass(frozen=True)
class MergedForm:
    """How adapters in the merged form move offsets: a `Move` of quant/autograd.py."""

    parts: tuple[tuple[Adapter, float], ...]
    """Adapters with their scaling, in the order in which a merge would apply them."""

    names: tuple[tuple[str, ...], ...] = ()
    """Names of the parameters of each part, in the order in which they are given. Default: `A` and `B` of each."""

    def offsets(self, weight: QuantWeight, params: tuple[Tensor, ...]) -> Tensor | None:
        """Offsets of the merged matrix, as they would be stored."""
        for adapter, scaling, own, _ in self._split(params, ()):
            weight = adapter.merge(weight, own, scaling)
        return weight.operand("offsets")

    def keep(
        self, layout: Layout, pooled: Tensor, params: tuple[Tensor, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor, ...]:
        """What backward needs of the inputs: one tensor for each part that trains."""
        return tuple(
            adapter.keep(layout, pooled, own, wanted)
            for adapter, _, own, wanted in self._split(params, needed)
            if wanted
        )

    def gradients(
        self,
        layout: Layout,
        params: tuple[Tensor, ...],
        dy: Tensor,
        kept: tuple[Tensor, ...],
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Each part adds to the offsets, so each sees the same gradient."""
        found: list[Tensor | None] = []
        rest = iter(kept)
        for adapter, scaling, own, wanted in self._split(params, needed):
            own_gradients: Params = {}
            if wanted:
                own_gradients = adapter.gradients(layout, own, scaling, dy, next(rest), wanted)
            found += [own_gradients.get(name) for name in own]
        return tuple(found)

    def _split(
        self, params: tuple[Tensor, ...], needed: tuple[bool, ...]
    ) -> Iterator[tuple[Adapter, float, dict[str, Tensor], frozenset[str]]]:
        """Each adapter with its scaling, its own parameters by name, and names of those whose gradients are wanted."""
        at = 0
        for index, (adapter, scaling) in enumerate(self.parts):
            names = self.names[index] if self.names else ("A", "B")
            own = dict(zip(names, params[at : at + len(names)], strict=True))
            wanted = frozenset(name for name, want in zip(names, needed[at : at + len(names)], strict=False) if want)
            yield adapter, scaling, own, wanted
            at += len(names)


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in the widest of their dtypes."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)
