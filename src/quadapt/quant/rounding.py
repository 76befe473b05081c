"""Rounding: from a weight matrix to codes, scales and offsets.

`Nearest` looks at the weights alone; `GPTQ` (gptq.py) also at second moments of the inputs. Both are frozen dataclasses
whose fields are their settings, called as `rounding(weight, layout, statistics)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quadapt.errors import ConfigError, ShapeError
from quadapt.kernels import kernels_for
from quadapt.kernels.entropy import group_crowding
from quadapt.kernels.reference import rows_per_chunk
from quadapt.quant import icq
from quadapt.quant import storage as stored
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

Statistics = Mapping[str, Tensor]
"""What calibration gathered for a layer, by name: `second_moment` float `[in, in]`."""

CodeAgainst = Literal["stored", "exact"]

Range = Literal["minmax", "mse", "icq", "icq-scale"]
RANGES: tuple[Range, ...] = ("minmax", "mse", "icq", "icq-scale")


@dataclass(frozen=True, kw_only=True)
class Rounding(ABC):
    """How weights become codes."""

    name: ClassVar[str]
    """As the command line calls it."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Names of the statistics that it reads."""

    scope: ClassVar[Literal["layer", "block"]] = "layer"
    """What it quantizes at once."""

    def check(self, layout: Layout) -> None:
        """Raise ConfigError if this rounding cannot serve a layout."""
        layout.storage.check(layout.format)

    @abstractmethod
    def __call__(self, weight: Tensor, layout: Layout, statistics: Statistics) -> QuantWeight:
        """Quantize `weight` (any float dtype, `[out, in]`, not modified).

        Raises:
            ShapeError: The weight has NaN or infinite values, or does not fit its layout.
            CalibrationError: Statistics are missing or unusable.
        """


@dataclass(frozen=True, kw_only=True)
class Nearest(Rounding):
    """Each weight to the nearest level of its group."""

    name: ClassVar[str] = "nearest"

    range: Range = "minmax"
    """minmax: the levels span the group. mse: the span is shrunk to the one of least squared error (100 candidates).
    icq: symmetric about the shift of highest entropy. icq-scale: the span is scaled for entropy. See `icq.py`."""

    code_against: CodeAgainst = "stored"
    """Compute codes with the scales and offsets as stored (rounded), or with the exact ones as QLoRA does."""

    def __post_init__(self) -> None:
        check_choice("range", self.range, RANGES)
        check_choice("code_against", self.code_against, ("stored", "exact"))

    def check(self, layout: Layout) -> None:
        super().check(layout)
        check_range(self.range, layout.format)

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
            [_encode(weight[rows], layout, scales[rows], None if shift is None else shift[rows]) for rows in chunks]
        )
        return QuantWeight(layout, {**grid.tensors, "weight": packed.view(layout.shapes["weight"])})


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Rounding):
    """Eight bits for a matrix that will have fewer: the range of `bits`-bit codes in `256 / 2**bits` times finer steps.

    LR-QAT's frozen base (arXiv 2406.06385, Q n.(8-n)): its training moves weights between the coarse codes.
    """

    name: ClassVar[str] = "fixed-point"

    bits: int = 4
    """Width of a code of the product: 2, 3 or 4."""

    range: Range = "mse"
    """How a group's span is chosen for the coarse codes, as in `Nearest`; what lies beyond it is clipped."""

    def check(self, layout: Layout) -> None:
        super().check(layout)
        if layout.format.levels != "int" or layout.format.bits != 8 or layout.format.zero != "none":
            raise ConfigError(f"{layout.format.name}: a fixed-point base is made of symmetric 8-bit integers")
        check_range(self.range, layout.format)

    def __call__(self, weight: Tensor, layout: Layout, statistics: Statistics = {}) -> QuantWeight:  # noqa: B006
        self.check(layout)
        coarse = replace(layout, format=replace(layout.format, bits=self.bits))
        chunks = row_chunks(weight)
        scales = torch.cat([find_grid(weight[rows], coarse, self.range)[0] for rows in chunks]) / 2 ** (8 - self.bits)
        grid = QuantWeight.build(layout, codes_of_zero(layout, weight), scales, None)
        shift = implied_offsets(layout, grid.scales, None)
        assert shift is not None
        packed = torch.cat([_encode(weight[rows], layout, grid.scales[rows], shift[rows]) for rows in chunks])
        return QuantWeight(layout, {**grid.tensors, "weight": packed.view(layout.shapes["weight"])})


def codes_of_zero(layout: Layout, like: Tensor) -> Tensor:
    """Packed codes, all zero: a place holder while only scales and offsets matter."""
    return torch.zeros(layout.shapes["weight"], dtype=torch.uint8, device=like.device)


def row_chunks(weight: Tensor) -> list[slice]:
    """Slices of rows, each small enough that float32 temporaries of its size are cheap."""
    step = rows_per_chunk(weight.shape[1])
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def _encode(part: Tensor, layout: Layout, scales: Tensor, offsets: Tensor | None) -> Tensor:
    width = layout.format.width(layout.columns)
    return kernels_for(part.device).encode(
        as_float(part), scales, offsets, layout.format.table(part), layout.format.bits, width
    )


def as_float(weight: Tensor) -> Tensor:
    """Float32, but float64 stays: references run in it."""
    return weight if weight.dtype == torch.float64 else weight.float()


def find_grid(
    weight: Tensor, layout: Layout, range_: str = "minmax", *, check: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets of some rows (or of columns that form whole groups), not yet rounded to their stored dtype.

    Args:
        weight: Float `[rows, in]`.
        layout: Its format decides the kind of grid.
        range_: As in :class:`Nearest`.
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
    if range_ == "icq":
        low, high = icq.shifted_range(weight, layout.format)
    scales, offsets = _grid(low, high, layout)
    if check:
        check_grid(scales, offsets, layout.storage)
    if range_ == "mse":
        return _least_error(weight, low, high, layout)
    if range_ == "icq-scale":
        return _most_entropy(weight, low, high, layout)
    return scales, offsets


def _least_error(weight: Tensor, low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The grid of least squared error over `low` to `high`, both shrunk alike."""
    best = torch.full_like(low, torch.inf)
    kept, kept_offsets = _grid(low, high, layout)
    for shrink in (1 - 0.8 * step / 100 for step in range(100)):
        tried, tried_offsets = snap(layout.storage, *_grid(low * shrink, high * shrink, layout))
        error = _squared_error(weight, layout, tried, tried_offsets)
        better = error < best
        best = torch.where(better, error, best)
        kept, kept_offsets = _where(better, tried, tried_offsets, kept, kept_offsets)
    return kept, kept_offsets


def _most_entropy(weight: Tensor, low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The grid over `low` to `high`, both scaled alike, whose codes have the highest entropy (see `icq.py`)."""
    kept, kept_offsets = snap(layout.storage, *_grid(low, high, layout))
    best = _crowding(weight, layout, kept, kept_offsets)
    bound = icq.GUARD * _squared_error(weight, layout, kept, kept_offsets)
    for factor in icq.FACTORS:
        tried, tried_offsets = snap(layout.storage, *_grid(low * factor, high * factor, layout))
        crowding = _crowding(weight, layout, tried, tried_offsets)
        better = (crowding < best) & (_squared_error(weight, layout, tried, tried_offsets) <= bound)
        best = torch.where(better, crowding, best)
        kept, kept_offsets = _where(better, tried, tried_offsets, kept, kept_offsets)
    return kept, kept_offsets


def _where(
    better: Tensor, scales: Tensor, offsets: Tensor | None, kept: Tensor, kept_offsets: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if offsets is not None and kept_offsets is not None:
        kept_offsets = torch.where(better, offsets, kept_offsets)
    return torch.where(better, scales, kept), kept_offsets


def _squared_error(weight: Tensor, layout: Layout, scales: Tensor, offsets: Tensor | None) -> Tensor:
    format, shift = layout.format, implied_offsets(layout, scales, offsets)
    kernel, table = kernels_for(weight.device), format.table(weight)
    return kernel.group_error(weight, scales, shift, table, format.bits, format.width(weight.shape[1]))


def _crowding(weight: Tensor, layout: Layout, scales: Tensor, offsets: Tensor | None) -> Tensor:
    format, shift = layout.format, implied_offsets(layout, scales, offsets)
    return group_crowding(weight, scales, shift, format.bits, format.width(weight.shape[1]))


def _grid(low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The grid that spans `low` to `high`. A group without extent gets the smallest scale: nothing divides by zero."""
    bits, zero = layout.format.bits, layout.format.zero
    if layout.format.levels != "int":
        middle = (high + low) / 2 if zero == "float" else torch.zeros_like(low)
        return _positive(torch.maximum(high - middle, middle - low)), middle if zero == "float" else None
    if zero == "float":  # QA-LoRA's form: the offset is the smallest weight
        return _positive((high - low) / (2**bits - 1)), low
    if zero == "integer":  # GPTQ's form: the range contains zero, and zero is a level
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = _positive((high - low) / (2**bits - 1))
        return scales, (-low / scales).round().clamp(0, 2**bits - 1)
    half = 2 ** (bits - 1)  # levels -half .. half - 1 about zero; neither tail is clipped
    return _positive(torch.maximum(-low / half, high / (half - 1))), None


def _positive(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, SMALLEST_SCALE)


def implied_offsets(layout: Layout, scales: Tensor, offsets: Tensor | None) -> Tensor | None:
    """Offsets in units of weights, from what is stored for them (zero-points, nothing) and the scales."""
    if offsets is None:
        return None if layout.format.levels != "int" else -scales * 2 ** (layout.format.bits - 1)
    return -scales * offsets if layout.format.zero == "integer" else offsets


def snap(storage: Storage, scales: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Round scales and offsets as stored. Double-quantized ones stay: their codes depend on the whole matrix."""

    def rounded(values: Tensor, kind: str) -> Tensor:
        return values.float().to(stored.FLOATS[kind]).to(values.dtype) if kind in stored.FLOATS else values

    return rounded(scales, storage.scales), None if offsets is None else rounded(offsets, storage.offsets)


class ScaleUnderflow(ShapeError):  # noqa: N818
    """Scales are too small (or too large) for fp16, or offsets too large; the layer needs fp32."""


SMALLEST_SCALE = 32 * 2.0**-24
"""Smallest scale that fp16 holds within 1/64."""


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
    linear, top = stored.Linear.of(storage.scales), torch.finfo(torch.float16).max
    finite = torch.isfinite(scales)
    ends = [scales.where(finite, torch.inf).min(), scales.where(finite, 0).max(), finite.all()]
    if offsets is not None:
        ends += [offsets.where(torch.isfinite(offsets), 0).abs().max(), torch.isfinite(offsets).all()]
    least, most, *rest = torch.stack([each.to(scales.dtype) for each in ends]).tolist()  # a GPU is waited for once
    if storage.scales == "fp16" or (linear and linear.constant == "fp16"):
        worst = most if linear else least
        if worst < SMALLEST_SCALE or most > top:
            raise ScaleUnderflow(
                f"scales from {worst:.1e} to {most:.1e} do not fit fp16. Use fp32 scales (--scales fp32)"
            )
    if offsets is not None and storage.offsets == "fp16" and rest[1] > top:
        raise ScaleUnderflow(f"offsets up to {rest[1]:.1e} do not fit fp16. Use fp32 scales (--scales fp32)")
    if not all(rest[::2]):
        raise ShapeError(
            "rounding errors that are handed on grow beyond all bounds. Calibrate on more text, or skip it"
        )


def check_range(range_: str, format: Format) -> None:
    """Raise ConfigError unless a grid of this format can be chosen in that way."""
    if range_ == "icq" and format.zero != "float":
        raise ConfigError(
            f"range='icq' shifts each group, and {format.name} has no free offsets. Use zero='float'"
            + (", or range='icq-scale'" if format.levels == "int" else "")
        )
    if range_ == "icq-scale" and format.levels != "int":
        raise ConfigError(
            f"range='icq-scale' scales the span of integers, and {format.name} has no such. Use range='icq' with "
            "zero='float'"
        )


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is unknown. Use {', '.join(allowed)}")
