"""The grid of a group: scale and offset from the ends of the range that its levels are to span."""

from __future__ import annotations

import torch
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.kernels import expand, kernels_for, pool
from quadapt.quant.storage import Storage
from quadapt.quant.storage.floats import SMALLEST_SCALE
from quadapt.quant.weight import Layout


def as_float(weight: Tensor) -> Tensor:
    """Float32, but float64 stays: references run in it."""
    return weight if weight.dtype == torch.float64 else weight.float()


def where(
    better: Tensor, scales: Tensor, offsets: Tensor | None, kept: Tensor, kept_offsets: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The first grid where `better` (`[rows, groups]`) says so, the kept one elsewhere."""
    if offsets is not None and kept_offsets is not None:
        kept_offsets = torch.where(better, offsets, kept_offsets)
    return torch.where(better, scales, kept), kept_offsets


def by_scale(values: Tensor, layout: Layout) -> Tensor:
    """Numbers `[rows, groups]` summed over the groups that share a scale, for each of these; as they are if none do."""
    run, groups = layout.storage.of_scales.shared, values.shape[1]
    return values if run == 1 else expand(pool(values, run), run, groups)


def squared_error(weight: Tensor, layout: Layout, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """Squared error of each group, `[rows, groups]`, if its weights go to the nearest level of a grid."""
    format, shift = layout.format, implied_offsets(layout, scales, offsets)
    kernel, table = kernels_for(weight.device), format.table(weight)
    return kernel.group_error(weight, scales, shift, table, format.bits, format.width(weight.shape[1]))


def spanning(low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The grid that spans `low` to `high`. A group without extent gets the smallest scale: nothing divides by zero."""
    bits, zero = layout.format.bits, layout.format.zero
    if layout.format.levels != "int":
        return _spanning_table(low, high, layout)
    if zero == "float":  # QA-LoRA's form: the offset is the smallest weight
        return _spanning_freely(low, high, layout)
    if zero == "integer":  # GPTQ's form: the range contains zero, and zero is a level
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = _positive((high - low) / (2**bits - 1))
        stored = layout.storage.of_scales.rounded(scales) if layout.storage.of_scales.shared > 1 else scales
        return scales, (-low / stored).round().clamp(0, 2**bits - 1)
    half = 2 ** (bits - 1)  # levels -half .. half - 1 about zero; neither tail is clipped
    if not layout.storage.of_scales.signed:
        return _positive(torch.maximum(-low / half, high / (half - 1))), None
    turned = high > -low  # by a negative scale, the level that is one more lies at the upper end
    below, above = torch.where(turned, high, -low), torch.where(turned, -low, high)
    scales = _positive(torch.maximum(below / half, above / (half - 1)))
    return torch.where(turned, -scales, scales), None


def _spanning_table(low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Scales of a table of levels; and if they are free, offsets, which put its ends on those of the range."""
    least, most = layout.format.ends
    if layout.format.zero != "float":
        return _positive(torch.maximum(high / most, low / least)), None
    middle = (high + low) / 2
    scales = torch.maximum(high - middle, middle - low) * (2 / (most - least))
    return _positive(scales), middle - scales * ((most + least) / 2)


def _spanning_freely(low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Scales and float offsets of integers.

    Scales of super-blocks are rounded to codes of a few bits. There the offset is moved so that the middle of the range
    stays where it is: both ends then share what rounding the scale adds or leaves out.
    """
    top, storage = 2**layout.format.bits - 1, layout.storage
    if storage.of_offsets.never_positive:
        low = low.clamp(max=0)
    scales = _positive((high - low) / top)
    if storage.of_scales.together in (1, None):
        return scales, low
    wider = torch.where(high > low, storage.of_scales.rounded(scales) - scales, 0)
    return scales, low - wider * (top / 2)


def _positive(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, SMALLEST_SCALE)


def implied_offsets(layout: Layout, scales: Tensor, offsets: Tensor | None) -> Tensor | None:
    """Offsets in units of weights, from what is stored for them (zero-points, nothing) and the scales."""
    if offsets is None:
        return None if layout.format.levels != "int" else -scales * 2 ** (layout.format.bits - 1)
    return -scales * offsets if layout.format.zero == "integer" else offsets


def rounded(storage: Storage, scales: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Round scales and offsets `[rows, groups]` as stored.

    Those stay whose codes depend on the whole matrix (double quantization). Where groups are stored together, whole
    runs of them are given.
    """
    return storage.of_scales.rounded(scales), None if offsets is None else storage.of_offsets.rounded(offsets)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is unknown. Use {', '.join(allowed)}")
