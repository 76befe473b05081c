"""Rounding: from a weight matrix to codes, scales and offsets.

`Nearest` looks at the weights alone; `GPTQ` (gptq.py) also at second moments of the inputs. Both are frozen dataclasses
whose fields are their settings, called as `rounding(weight, layout, statistics)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from quadapt.errors import ShapeError
from quadapt.kernels import expand, kernels_for
from quadapt.kernels.reference import rows_per_chunk
from quadapt.quant.grids import as_float, check_choice, implied_offsets, spanning
from quadapt.quant.ranges import RANGES
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.registry import Registry

Statistics = Mapping[str, Tensor]
"""What calibration gathered for a layer, by name: `second_moment` float `[in, in]`."""

CodeAgainst = Literal["stored", "exact"]


ROUNDINGS: Registry[type[Rounding]] = Registry("rounding", "quadapt.quant", "quadapt.nn")
"""Every rounding that is known, by name: `ROUNDINGS["gptq"]()`."""


@dataclass(frozen=True, kw_only=True)
class Rounding(ABC):
    """A way to turn the weights of a matrix into codes."""

    name: ClassVar[str]
    """The name of the rounding on the command line."""

    summary: ClassVar[str] = ""
    """A few words that say how it rounds, for `--help`."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """The names of the statistics that it reads."""

    @property
    def least_sequences(self) -> int:
        """Sequences of calibration text that it takes at least, if it takes any."""
        return 1

    @property
    def true_sequential(self) -> bool:
        """Whether, within a block too, each layer is calibrated on the already quantized ones before it."""
        return True

    def check(self, layout: Layout) -> None:
        """Raise ConfigError if this rounding cannot serve a layout."""
        layout.storage.check(layout.format)

    def without_data(self) -> Nearest:
        """The rounding to nearest that stands for it where there is no calibration text (in a table of errors)."""
        return Nearest()

    @abstractmethod
    def __call__(self, weight: Tensor, layout: Layout, statistics: Statistics) -> QuantWeight:
        """Quantize `weight` (any float dtype, `[out, in]`, not modified).

        Raises:
            ShapeError: The weight has NaN or infinite values, or does not fit its layout.
            CalibrationError: Statistics are missing or unusable.
        """

    def with_real_codes(self, weight: Tensor, layout: Layout, statistics: Statistics) -> tuple[QuantWeight, Tensor]:
        """Quantize `weight`, and give the real numbers whose roundings its codes are.

        Returns:
            The quantized weight, and its unrounded codes, float32 `[out, in]` in stored order (float64 for float64):
            those that were rounded, where a rounding changes the weights on its way (GPTQ).
        """
        quantized = self(weight, layout, statistics)
        return quantized, real_codes(quantized.stored_order(as_float(weight.detach())), quantized)

    def stored(self, layout: Layout) -> Layout:
        """The layout of what is made where a matrix of `layout` is wanted in the end; by default that is made."""
        return layout

    def product(self, weight: QuantWeight, layout: Layout) -> QuantWeight:
        """What the model computes with before it is trained, of a layout; by default the quantized weight itself."""
        return weight


@dataclass(frozen=True, kw_only=True)
class BlockRounding(Rounding):
    """A rounding that trains all layers of a block together, in place, until the quantized block does what it should.

    Called for a single matrix, which lies outside the blocks or is the first of a block, it gives the first state.
    """

    batch_size: int = 2
    """How many sequences an optimizer step takes."""

    @property
    def least_sequences(self) -> int:
        return 2 * self.batch_size

    @abstractmethod
    def layer(self, linear: nn.Linear, layout: Layout) -> Any:
        """A layer that is trained in the place of `linear`, which is not modified."""

    @abstractmethod
    def fit(self, block: nn.Module, layers: Any, examples: Any) -> tuple[float, float]:
        """Train such layers, which stand in `block`, in place; the relative error of its output before and after."""

    @abstractmethod
    def of_layer(self, layer: Any) -> QuantWeight:
        """The quantized weight of such a layer."""


def real_codes(weight: Tensor, quantized: QuantWeight) -> Tensor:
    """Weights `[out, in]`, in stored order, in units of a grid: what its codes would be if they were not rounded."""
    width, columns = quantized.format.width(quantized.layout.columns), quantized.layout.columns
    scales, offsets = quantized.scales.to(weight.dtype), quantized.offsets
    value = weight if offsets is None else weight - expand(offsets.to(weight.dtype), width, columns)
    return value / expand(scales, width, columns)


@ROUNDINGS.register("nearest")
@dataclass(frozen=True, kw_only=True)
class Nearest(Rounding):
    """Each weight to the nearest level of its group."""

    summary: ClassVar[str] = "each weight to the nearest level, which needs no data"

    range: str = "minmax"
    """How a group's span is chosen, by its name in `RANGES` (`ranges.py`, `icq.py`)."""

    code_against: CodeAgainst = "stored"
    """Compute codes with the scales and offsets as stored (rounded), or with the exact ones as QLoRA does."""

    def without_data(self) -> Nearest:
        return self

    def __post_init__(self) -> None:
        check_choice("range", self.range, tuple(RANGES))
        check_choice("code_against", self.code_against, ("stored", "exact"))

    def check(self, layout: Layout) -> None:
        super().check(layout)
        RANGES[self.range]().check(layout.format)

    def __call__(self, weight: Tensor, layout: Layout, statistics: Statistics = {}) -> QuantWeight:  # noqa: B006
        self.check(layout)
        if tuple(weight.shape) != (layout.out, layout.columns):
            raise ShapeError(f"the weight is {tuple(weight.shape)}, its layout {(layout.out, layout.columns)}")
        chunks = row_chunks(weight)
        exact = [find_grid(weight[rows], layout, self.range) for rows in chunks]
        scales = torch.cat([scale for scale, _ in exact])
        offsets = None if exact[0][1] is None else torch.cat([offset for _, offset in exact if offset is not None])
        grid = QuantWeight.build(layout, codes_of_zero(layout, weight), scales, offsets)
        if self.code_against == "stored":
            scales, shift = grid.scales, grid.offsets
        else:
            shift = implied_offsets(layout, scales, offsets)
        packed = torch.cat(
            [
                _nearest_codes(weight[rows], layout, scales[rows], None if shift is None else shift[rows])
                for rows in chunks
            ]
        )
        return QuantWeight(layout, {**grid.tensors, "weight": packed.view(layout.shapes["weight"])})


def codes_of_zero(layout: Layout, like: Tensor) -> Tensor:
    """Packed codes, all zero: a place holder while only scales and offsets matter."""
    return torch.zeros(layout.shapes["weight"], dtype=torch.uint8, device=like.device)


def row_chunks(weight: Tensor) -> list[slice]:
    """Slices of rows, each small enough that float32 temporaries of its size are cheap."""
    step = rows_per_chunk(weight.shape[1])
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def _nearest_codes(part: Tensor, layout: Layout, scales: Tensor, offsets: Tensor | None) -> Tensor:
    width = layout.format.width(layout.columns)
    return kernels_for(part.device).nearest_codes(
        as_float(part), scales, offsets, layout.format.table(part), layout.format.bits, width
    )


def find_grid(
    weight: Tensor, layout: Layout, range_: str = "minmax", *, check: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets of some rows (or of columns that form whole groups), not yet rounded to their stored dtype.

    Columns must be whole runs of the groups that are stored together (`Storage.together`).

    Args:
        weight: Float `[rows, in]`.
        layout: The layout, whose format decides the kind of grid.
        range_: The name of the range, as :class:`Nearest` takes it.
        check: Whether to look at the values, for which a GPU must be waited for. Otherwise `check_finite` and
            `check_grid` are the caller's affair.

    Returns:
        Scales and offsets, `[rows, groups]`. For `zero="integer"` the latter are zero-points in steps (as they are
        stored); for `zero="none"` None.
    """
    width = layout.format.width(weight.shape[1])
    weight = as_float(weight)
    low, high = kernels_for(weight.device).group_range(weight, width)
    if check:
        check_finite(weight, low, high)
    chosen = RANGES[range_]()
    low, high = chosen.ends(weight, low, high, layout)
    if check:
        check_grid(*spanning(low, high, layout), layout.storage)
    return chosen(weight, low, high, layout)


class ScaleUnderflow(ShapeError):  # noqa: N818
    """Scales are too small (or too large) for fp16, or offsets too large; the layer needs fp32."""


def check_finite(weight: Tensor, *extremes: Tensor) -> None:
    """Raise ShapeError if a weight is not finite; `extremes` of all its groups, if these are known, tell it sooner."""
    seen = extremes or (weight,)
    if not bool(torch.stack([torch.isfinite(each).all() for each in seen]).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise ShapeError(
            f"{count} of {weight.numel()} weights are NaN or infinite. Repair the model before quantizing it"
        )


def check_grid(scales: Tensor, offsets: Tensor | None, storage: Storage) -> None:
    """Raise unless scales and offsets can be stored.

    Raises:
        ScaleUnderflow: fp16 changes a scale by over 1/64 (it is under 32 of the smallest steps, or over the top), or an
            offset is over its top. Where fp16 holds only the constants of linear codes, the largest scale counts.
        ShapeError: Some are not finite, for another reason.
    """
    finite = torch.isfinite(scales)
    sizes = scales.abs()
    ends = [sizes.where(finite, torch.inf).min(), sizes.where(finite, 0).max(), finite.all()]
    if offsets is not None:
        ends += [offsets.where(torch.isfinite(offsets), 0).abs().max(), torch.isfinite(offsets).all()]
    least, most, *rest = torch.stack([each.to(scales.dtype) for each in ends]).tolist()  # a GPU is waited for once
    if not storage.of_scales.fits_scales(least, most):
        raise ScaleUnderflow(
            f"scales from {least:.1e} to {most:.1e} do not fit {storage.scales}. Use fp32 scales (--scales fp32)"
        )
    if offsets is not None and not storage.of_offsets.fits_offsets(rest[1]):
        raise ScaleUnderflow(
            f"offsets up to {rest[1]:.1e} do not fit {storage.offsets}. Use fp32 scales (--scales fp32)"
        )
    if not all(rest[::2]):
        raise ShapeError(
            "rounding errors that are handed on grow beyond all bounds. Calibrate on more text, or skip it"
        )
