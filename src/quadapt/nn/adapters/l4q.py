"""Quantizing inside the forward, over the dense matrix: L4Q, and the baseline that its paper measures it against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quadapt.errors import ConfigError, MergeError
from quadapt.kernels import kernels_for
from quadapt.nn.adapters.base import ADAPTERS, Base, Dropout, Exactness, Param, Params, Source, add_low_rank, same
from quadapt.nn.adapters.grid import LowRankGrid, grid_param, grown
from quadapt.quant.fake_quant import FakeQuant
from quadapt.quant.format import Format, Zero
from quadapt.quant.grids import check_choice
from quadapt.quant.storage import Storage, ValueStorage
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.setting import setting


@ADAPTERS.register("l4q")
@dataclass(frozen=True, kw_only=True)
class L4Q(LowRankGrid):
    """L4Q (Jeon et al. 2024, arXiv:2402.04902): quantize after merging, `W' = Q(W0 + scaling * B A; s, b)`.

    `A`, `B`, scales and (unless `offsets` is none) offsets train together over the dense matrix, which stays frozen.
    Training memory is that of LoRA over 16-bit weights; the product is codes, scales and offsets alone.

    Differs: scales and shifts train relative to the first scale, `s = s0 * exp(rho)` and `b = b0 + s0 * shift`; the
        paper trains them as they are, where one step of Adam may be several percent of a scale, or cross zero.
    """

    base: ClassVar[Base] = "float"
    takes_grid: ClassVar[bool] = True
    extra: ClassVar[tuple[str, ...]] = ("rho", "shift", "start")

    bits: int = 4
    """The width of a code in bits."""

    group_size: int = 128
    """How many inputs share a scale."""

    offsets: Zero = "float"
    """none: symmetric, only scales train. integer: zero-points stay whole (straight through). float: free."""

    init: Literal["l4q", "lsq+", "symmetric", "asymmetric"] = setting(panel="Adapter", default="l4q")
    """First scales (paper, eqs. 15, 37, 38): l4q clips neither tail; the others are its ablation."""

    order: Literal["clamp-round", "round-clamp"] = "clamp-round"
    """Whether a weight beyond the last level, but nearest to it, counts as clipped (the paper) or not."""

    tolerance: float = 1e-4
    """How far beyond the last level a weight counts as inside, in steps: first scales put the extremes right on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("offsets", self.offsets, ("none", "integer", "float"))
        check_choice("init", self.init, ("l4q", "lsq+", "symmetric", "asymmetric"))
        if self.init == "asymmetric" and self.offsets == "none":
            raise ConfigError("init='asymmetric' starts from offsets, and offsets='none' has none. Use another init")

    def grid_params(self, layout: Layout) -> dict[str, Param]:
        """`rho`, `shift` where offsets train, and the first scales and shifts, `start [2, out, groups]`, frozen."""
        names = ("rho",) if layout.format.zero == "none" else ("rho", "shift")
        start = Param(shape=(2, layout.out, layout.groups), init=self._begin, dtype=torch.float32, trains=False)
        return {**{name: grid_param(layout) for name in names}, "start": start}

    def _begin(self, tensor: Tensor, source: Source) -> None:
        tensor.copy_(self.start(source))

    def with_grid(self, format: Format, storage: Storage) -> L4Q:
        if format.levels != "int":
            raise ConfigError(f"levels={format.levels!r}: {self.kind} trains evenly spaced levels. Use levels='int'")
        assert format.zero != "default"  # a format resolves it
        scales = storage.of_scales.trained
        return replace(self, bits=format.bits, group_size=format.group_size, offsets=format.zero, scales=scales)

    def layout_of(self, source: Source) -> Layout:
        assert isinstance(source, Tensor)
        return self.layout(*source.shape)

    def layout(self, out: int, columns: int) -> Layout:
        """Layout of the product over a dense matrix `[out, columns]`."""
        format = Format(bits=self.bits, group_size=self.group_size, zero=self.offsets)
        return Layout.fitting(format, Storage.floating(self.floats, self.offsets), out, columns)

    def how(self, layout: Layout) -> FakeQuant:
        return FakeQuant(format=layout.format, columns=layout.columns, order=self.order, tolerance=self.tolerance)

    @torch.no_grad()
    def start(self, source: Source) -> Tensor:
        """First scales and shifts over a dense matrix, float32 `[2, out, groups]`."""
        assert isinstance(source, Tensor)
        layout = self.layout_of(source)
        half = 2 ** (layout.format.bits - 1)
        width = layout.format.width(layout.columns)
        low, high = kernels_for(source.device).group_range(source, width)
        if layout.storage.of_offsets.never_positive:
            low = low.clamp(max=0)
        if layout.storage.of_scales.signed:  # the level that is one more goes to the largest weight
            turned = high > -low
            low, high = torch.where(turned, -high, low), torch.where(turned, -low, high)
            sign = 1 - 2 * turned.float()
        else:
            sign = torch.ones_like(low)
        if self.init == "asymmetric" and layout.format.zero != "none":
            scales = _up((high - low) / (2 * half - 1), layout.storage.of_scales)
            return torch.stack([scales, low + half * scales])
        if self.init == "lsq+":
            mean, deviation = _moments(source, width)
            scales = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / half
        elif self.init == "symmetric":
            scales = torch.maximum(-low, high) / half
        else:
            scales = torch.maximum(-low / half, high / (half - 1))
        return torch.stack([_up(sign * scales, layout.storage.of_scales), torch.zeros_like(scales)])

    def begin_with(self, grid: Tensor, params: Params) -> None:
        params["start"].copy_(grid)

    def begin_quantizing(self, source: Source, params: Params, scaling: float) -> None:
        """Begin with the grid of the matrix as the first steps have changed it."""
        assert isinstance(source, Tensor)
        changed = source.float() + scaling * (params["B"].float() @ params["A"].float())
        params["start"].copy_(self.start(changed))

    def grid(self, source: Source, params: Params, scaling: float) -> tuple[Tensor, Tensor | None]:
        layout = self.layout_of(source)
        half, zero = 2 ** (layout.format.bits - 1), layout.format.zero
        first, shift = params["start"].detach().float()
        scales = layout.storage.of_scales.snap(first * grown(params["rho"]))
        if zero == "none":
            return scales, None
        shift = shift + first * params["shift"].float()
        if zero == "integer":
            point = half - shift / scales
            return scales, point + (point.round().clamp(0, 2 * half - 1) - point).detach()
        return scales, layout.storage.of_offsets.snap(shift - half * scales)


@ADAPTERS.register("qat-lora")
@dataclass(frozen=True, kw_only=True)
class QATLoRA(L4Q):
    """QAT-LoRA, the baseline of L4Q's paper: `y = Q(W0; s, b) x + scaling * B A x`.

    The quantizer and the adapter train side by side; the sum does not merge into codes. In a GGUF file the quantized
    matrix is the base, and the adapter a LoRA beside it.
    """

    over_codes: ClassVar[str] = "lora"

    @property
    def exactness(self) -> Exactness:
        return "none"

    @property
    def merged_form(self) -> bool:
        return False

    def inside(self, params: Params) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    def forward(self, x: Tensor, source: Source, params: Params, scaling: float, dropout: Dropout = same) -> Tensor:
        y = super().forward(x, source, params, scaling)
        return add_low_rank(y, x, params["A"], params["B"], scaling)

    def merge(self, source: Source, params: Params, scaling: float) -> QuantWeight:
        raise MergeError(
            "qat-lora's branch changes weights within a group, which codes cannot follow. Train with --method l4q, or "
            "accept the loss and requantize (merge --requantize)"
        )

    def dense(self, source: Source, params: Params, scaling: float) -> Tensor:
        return super().dense(source, params, scaling) + scaling * (params["B"].float() @ params["A"].float())


def _up(scales: Tensor, storage: ValueStorage) -> Tensor:
    """The next number that storage can hold: a scale that is rounded down would clip its group's extreme."""
    # In a super-block a one would be large.
    flat = torch.ones_like(scales) if storage.local else torch.zeros_like(scales)
    return storage.above(torch.where(scales != 0, scales, flat))


def _moments(weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each group, float32 `[out, groups]`."""
    missing = -weight.shape[1] % width
    groups = nn.functional.pad(weight.double(), (0, missing), value=torch.nan).unflatten(1, (-1, width))
    mean = groups.nanmean(-1, keepdim=True)
    return mean[..., 0].float(), (groups - mean).square().nanmean(-1).sqrt().float()
