"""Pieces of another package, one of each kind that has a recipe in CONTRIBUTING.md; the tests use them.

Inside of quadapt each of them would be a file of its own, in the package of its axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from quadapt.errors import ExportError
from quadapt.exporters.files import new_file
from quadapt.exporters.formats import EXPORTERS, Exporter
from quadapt.exporters.formats.base import Origin, Progress
from quadapt.exporters.report import ExportReport, TensorRow, bits_per_weight, size_of
from quadapt.exporters.tensors import refuse_adapters, shape_of, tensors_of
from quadapt.kernels import expand
from quadapt.methods import METHODS, Method, Recipe
from quadapt.nn.adapters import ADAPTERS, CodesAdapter, LoRA, Param, Params, Source
from quadapt.nn.adapters.base import Exactness, zeros
from quadapt.nn.adapters.codes import quantized
from quadapt.nn.starts import STARTS, Begun, Start
from quadapt.nn.starts.base import Quantize
from quadapt.quant.autograd import offset_gradient
from quadapt.quant.format import Format
from quadapt.quant.ranges import RANGES, Range
from quadapt.quant.rounding import Nearest, Statistics
from quadapt.quant.storage import Storage, ValueStorage, register
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.setting import Count, setting


@RANGES.register("inner")
@dataclass(frozen=True, kw_only=True)
class Inner(Range):
    """Nine tenths of a group's span: the outermost weights are clipped, the steps of all others are finer."""

    summary: ClassVar[str] = "nine tenths of it"

    def ends(self, weight: Tensor, low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        return 0.9 * low, 0.9 * high


@dataclass(frozen=True)
class _BFloat16(ValueStorage):
    """Each number as one bfloat16: uint8 `[out, 2 * groups]`."""

    summary: ClassVar[str] = "one bfloat16 for each group"

    @property
    def name(self) -> str:
        return "bf16"

    @property
    def together(self) -> int:
        return 1

    def encode(self, values: Tensor, *, centre: bool) -> dict[str, Tensor]:
        return {"": values.to(torch.bfloat16).contiguous().view(torch.uint8)}

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return tensors[""].contiguous().view(torch.bfloat16).float()

    def shapes(self, out: int, groups: int) -> dict[str, tuple[int, int]]:
        return {"": (out, 2 * groups)}

    def rounded(self, values: Tensor) -> Tensor:
        return values.to(torch.bfloat16).to(values.dtype)


BF16 = register(_BFloat16())


@STARTS.register("residual")
@dataclass(frozen=True, kw_only=True)
class Residual(Start):
    """The best low-rank term for what rounding changed: the largest singular values of `W - Q`."""

    passes: Count = setting(panel="Adapter", default=1)
    """Times that the matrix is rounded without the term, and the term fitted to what that changed."""

    def __call__(
        self, weight: Tensor, quantize: Quantize, rank: int, statistics: Statistics, *, pooled: bool = False
    ) -> Begun:
        base, W = quantize(weight), weight.double()
        if pooled:
            return Begun(base)
        for again in range(self.passes):
            U, S, Vh = torch.linalg.svd(W - base.dequantize().double(), full_matrices=False)
            root = S[:rank].sqrt()
            up, down = U[:, :rank] * root, root[:, None] * Vh[:rank]
            if again + 1 < self.passes:
                base = quantize(W - up @ down)
        return Begun(base, (up.float(), down.float()))


@ADAPTERS.register("shift")
@dataclass(frozen=True, kw_only=True)
class Shift(CodesAdapter):
    """Every offset trains by itself: `offsets + scaling * shift`, with `shift [out, groups]`, and a merge is exact."""

    extra: ClassVar[tuple[str, ...]] = ("shift",)

    @property
    def exactness(self) -> Exactness:
        return "exact"

    @property
    def merged_form(self) -> bool:
        return True

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        return {"shift": Param(shape=(layout.out, layout.groups), init=zeros)}

    def merge(self, source: Source, params: Params, scaling: float) -> QuantWeight:
        weight, change = quantized(source), scaling * params["shift"].double()
        moved = change if weight.offsets is None else weight.offsets + change
        return weight.with_offsets(moved.float(), weight.layout.storage.floats)

    def gradients(
        self, layout: Layout, params: Params, scaling: float, dy: Tensor, kept: Tensor, needed: frozenset[str]
    ) -> Params:
        return {"shift": scaling * offset_gradient(dy, kept).to(params["shift"].dtype)}

    def as_lora(self, source: Source, params: Params) -> tuple[Tensor, Tensor]:
        weight, shift = quantized(source), params["shift"]
        each = torch.eye(weight.layout.groups, dtype=shift.dtype, device=shift.device)
        columns = weight.layout.columns
        return weight.layer_order(expand(each, weight.format.width(columns), columns)), shift


@EXPORTERS.register("npz")
@dataclass(frozen=True, kw_only=True)
class Npz(Exporter):
    """One file of NumPy arrays: codes, scales and offsets of each quantized layer, and whatever else the model has."""

    summary: ClassVar[str] = "arrays for NumPy, codes as they are"
    form: ClassVar[str] = "codes as they are"
    served_by: ClassVar[str] = "NumPy"
    suffix: ClassVar[str] = ".npz"

    def accepts(self, layout: Layout) -> str | None:
        return (
            "the order of its inputs has no place in the file. Quantize without act_order" if layout.permuted else None
        )

    def write(
        self, model: Any, tokenizer: Any, path: Path, *, origin: Origin | None = None, progress: Progress = iter
    ) -> ExportReport:
        refuse_adapters(model)
        arrays: dict[str, np.ndarray] = {}
        rows: list[TensorRow] = []
        for name, source in tensors_of(model):
            made = self._arrays(name, source)
            arrays |= made
            nbytes, linear = sum(array.nbytes for array in made.values()), isinstance(source, QuantWeight)
            rows.append(TensorRow(name=name, type="arrays", shape=shape_of(source), nbytes=nbytes, linear=linear))
        with new_file(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
        bits = bits_per_weight(rows)
        return ExportReport(
            format=self.name, path=str(path), bytes=size_of(path), tensors=tuple(rows), bits_per_weight=bits
        )

    def _arrays(self, name: str, source: Tensor | QuantWeight) -> dict[str, np.ndarray]:
        if isinstance(source, Tensor):
            return {name: np.asarray(source.float())}
        reason = self.accepts(source.layout)
        if reason:
            raise ExportError(f"{name}: {reason}")
        made = {"codes": source.codes(), "scales": source.scales, "offsets": source.offsets}
        return {f"{name}.{part}": np.asarray(tensor) for part, tensor in made.items() if tensor is not None}


@METHODS.register("residual-lora")
def residual_lora(bits: int = 3, group_size: int = 32, **settings: Any) -> Method:
    r"""LoRA over rounded integers that starts from what rounding changed. Cannot merge exactly.

    $$ y = x \hat W^\top + \tfrac{\alpha}{r}\, x A^\top B^\top, \qquad \tfrac{\alpha}{r} B A \approx W - \hat W $$

    at first, with `A [rank, in]` and `B [out, rank]`.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale and an offset.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> residual_lora(bits=2).format.name
        'int2-g32'

    Source: the first iteration of LoftQ, arXiv:2310.08659, algorithm 1.
    """
    return Method(
        paper="2310.08659",
        format=Format(group_size=group_size),
        storage=Storage(scales="bf16"),
        rounding=Nearest(range="inner"),
        start=Residual(),
        adapter=LoRA(),
        recipe=Recipe(learning_rate=1e-3, rank=8, alpha=8, source="ours"),
    ).having(bits=bits, **settings)
