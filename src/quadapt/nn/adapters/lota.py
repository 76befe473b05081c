r"""Ternary factors among the codes of an integer base: LoTA-QAF (Chen et al. 2025, arXiv:2505.18724).

    D = B @ A,    m = sign(D) [|D| > omega],    R = D - omega * m,    mu = mean of R over a group / omega
    W' = s * (q + m - z + mu),    that is    q <- q + m    and    offsets <- offsets + s * mu

`A [rank, in]` and `B [out, rank]` hold -1, 0 and 1, so `D [out, in]` is whole, and `|D| <= rank`. A mark that would
take its code `q` out of `0 .. 2**bits - 1` is none.

The engine (`quant/fake_quant.py`) makes the marks: with `t = floor(omega) + 1`, the least `|D|` that is marked, it
rounds `D / (2 t - 1)`, which is above 1/2 from `t` on, below 1/2 up to `t - 1`, and never near enough to 1/2 for a
rounding error to matter. The mean of `D` is `B` times the group means of `A`, and that of `m` comes from sums of codes,
so nothing of the size of `W` is kept.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from quadapt.errors import ConfigError
from quadapt.kernels import expand, pool
from quadapt.nn.adapters.base import ADAPTERS, Dropout, Param, Params, Source, same, zeros
from quadapt.nn.adapters.codes_grid import CodesGrid, check_integers
from quadapt.quant.fake_quant import FakeQuant, fake_quant_sums
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.setting import setting

MOST_RANK = 1024
"""The largest rank at which no rounding error of `D / (2 t - 1)` reaches half of its distance from 1/2."""


@ADAPTERS.register("lota")
@dataclass(frozen=True, kw_only=True)
class LoTA(CodesGrid):
    """LoTA-QAF: a product of ternary factors moves codes by one step, and what it leaves over moves the offsets.

    Gradients are those of the authors' code: that of `D` is that of `m` (straight through, also where the code is at
    its end) plus that of `mu`, in which `m` is constant. The factors train by t-SignSGD (`quadapt.train.sign_sgd`), and
    stay ternary by it alone; a merge is exact whatever they hold. A mark that has no room stays in the rest, which is
    `D` there. The scaling alpha / rank has no meaning here.

    Differs: the authors compute the adapted matrix anew in their forward and keep it for backward; here it is quantized
        tile by tile. Their offsets are floats of the compute dtype, not rounded as they will be stored.
    """

    extra: ClassVar[tuple[str, ...]] = ()

    omega: Annotated[float, Ge(0.5), Lt(1)] = setting(panel="Adapter", default=0.75)
    """Codes move where the product of the ternary factors exceeds this share of the rank, from 0.5 to below 1; the
    paper takes larger ones for fewer bits."""

    shift_offsets: bool = setting(panel="Adapter", default=True)
    """Whether what the ternary product holds beyond the moved codes shifts the offsets, as published. Without it whole
    zero-points stay whole, and the product fits formats that have no others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 <= self.omega < 1:
            raise ConfigError(f"omega={self.omega}: must be at least 0.5 and below 1. Use 0.75")

    @property
    def moves_scales(self) -> bool:
        return False

    @property
    def frees_offsets(self) -> bool:
        return self.shift_offsets

    def check(self, layout: Layout, rank: int, dropout: float) -> None:
        super().check(layout, rank, dropout)
        check_integers(self.kind, layout)
        if rank > MOST_RANK:
            raise ConfigError(f"rank={rank}: marks are told apart up to rank {MOST_RANK}. Use a smaller rank")

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        return {
            "A": Param(shape=(rank, layout.columns), init=ternary, group="ternary"),
            "B": Param(shape=(layout.out, rank), init=zeros, group="ternary"),
        }

    def how(self, layout: Layout) -> FakeQuant:
        """How forward quantizes; the tolerance lets the gradient pass where a mark would leave the codes."""
        return replace(super().how(layout), order="clamp-round", tolerance=2.0)

    def least(self, rank: int) -> int:
        """The least absolute value of `D` that is marked."""
        return math.floor(self.limit(rank)) + 1

    def limit(self, rank: int) -> float:
        """The paper's omega: `|D|` is marked above it."""
        return round(self.omega * rank, 6)  # 0.55 * 100 is a little above 55

    def unit(self, params: Params) -> float:
        """What `D` is multiplied by to be rounded to marks."""
        return 1 / (2 * self.least(len(params["A"])) - 1)

    def inside(self, params: Params) -> tuple[Tensor | None, Tensor | None]:
        """`A` and `B`, with gradients as if the quantizer did not multiply their product by :meth:`unit`."""
        growth = 1 / self.unit(params)
        return _Grown.apply(params["A"], growth), _Grown.apply(params["B"], growth)

    def forward(self, x: Tensor, source: Source, params: Params, scaling: float, dropout: Dropout = same) -> Tensor:
        return super().forward(x, source, params, self.unit(params), dropout)

    def quantized(self, source: Source, params: Params, scaling: float) -> QuantWeight:
        """What the quantizer gives: the moved codes, and the offsets that go with them."""
        return super().quantized(source, params, self.unit(params))

    def grid(self, source: Source, params: Params, scaling: float) -> tuple[Tensor, Tensor | None]:
        return self.moved(source, steps=self.shift(source, params) if self.shift_offsets else None)

    def shift(self, source: Source, params: Params) -> Tensor:
        """How far each offset moves in steps, the paper's mu: float32 `[out, groups]`, differentiable in `A` and `B`.

        All sums are of whole numbers and exact, so that it is the same on every device.
        """
        assert isinstance(source, QuantWeight)
        layout, A, B = source.layout, params["A"], params["B"]
        how, omega = self.how(layout), self.limit(len(A))
        width = layout.format.width(layout.columns)
        moved = fake_quant_sums(source.packed, how=how, A=A, B=B, scaling=self.unit(params))
        marks = (moved - _code_sums(source, how)).double()
        sums = _Sums.apply(A, B, width)
        counts = pool(torch.ones(layout.columns, dtype=torch.float64, device=A.device), width)
        return ((sums - omega * marks) / (omega * counts)).float()


_known: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()
"""The sums of codes of each base that is alive, after the version that the codes had."""


def _code_sums(source: QuantWeight, how: FakeQuant) -> Tensor:
    """The sum of the codes of each group of the base, float32 `[out, groups]`; kept, since those never move."""
    codes = source.tensors["weight"]
    if torch.compiler.is_compiling():
        return fake_quant_sums(source.packed, how=how)
    known = _known.get(codes)
    if known is None or known[0] != codes._version:
        known = _known[codes] = (codes._version, fake_quant_sums(source.packed, how=how))
    return known[1]


class _Sums(torch.autograd.Function):
    """Sums of `B @ A` over groups, float64 `[out, groups]`; for backward it keeps the factors as they are."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, width: int) -> Tensor:
        ctx.width = width
        ctx.save_for_backward(A, B)
        return B.double() @ pool(A.double(), width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        A, B = ctx.saved_tensors
        dA = expand(B.double().T @ gradient, ctx.width, A.shape[1]).to(A.dtype) if ctx.needs_input_grad[0] else None
        dB = (gradient @ pool(A.double(), ctx.width).T).to(B.dtype) if ctx.needs_input_grad[1] else None
        return dA, dB, None


class _Grown(torch.autograd.Function):
    """A tensor as it is, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, growth: float) -> Tensor:
        ctx.growth = growth
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.growth * gradient, None


def ternary(tensor: Tensor, _: Source) -> None:
    """Fill `A` as the authors do: from a normal distribution, ternary with the threshold `0.75 * mean |A|`."""
    real = nn.init.kaiming_normal_(torch.empty_like(tensor, dtype=torch.float32))
    tensor.copy_(torch.where(real.abs() > 0.75 * real.abs().mean(), real.sign(), 0))
