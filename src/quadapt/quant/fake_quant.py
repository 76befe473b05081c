"""The product with a matrix that is quantized anew in every step: methods that train scales, offsets or codes.

Forward computes with the very weight that a merge would store, `scales * u + offsets` with unsigned codes `u`, so
merged model and training model are the same computation. Two domains say what is rounded (kernels/fake_reference.py):

* **weight** (L4Q, QAT-LoRA's base, LSQ, Block-AP): `W0 + scaling * B @ A` in units of the grid, over a float base;
* **codes** (LR-QAT; without `A` and `B` PEQA and E2E-QP): frozen codes plus `scaling * B @ A`.

Backward starts from the gradient of the output alone: a few rows at a time, it quantizes once more, computes the
gradient of these weights, and all that depends on it. So nothing is kept for backward but the inputs and tensors that
exist anyway, and nothing of a weight's size is made; forward has the dense weight while it multiplies.

Source: L4Q (arXiv 2402.04902) eqs. 5-14; LR-QAT (arXiv 2406.06385); PEQA (arXiv 2305.14152); EfficientQAT
(arXiv 2407.11062). Signed formulas follow by the chain rule of `offsets = b - scales * 2**(bits - 1)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quadapt.errors import ConfigError, ShapeError
from quadapt.kernels import few, pack, product, unpack
from quadapt.kernels.fake import Grid, fake_gradients, fake_quantize
from quadapt.quant.format import Format
from quadapt.quant.products import add_product, large_operand_dtype, product_dtype, unrounded

_TILE = {"cpu": 1 << 20}
"""Weights whose gradient exists at once (4 MB on a CPU, else 256 MB, which is a whole matrix of most models)."""

_LEAST_ROWS = 512
"""Rows of the matrix that such a tile has at least, if there are so many. What each tile adds to the gradient of the
inputs is read and written whole; with 95 rows, of 11008 inputs each, that took longer than the products themselves."""

_TOKENS = {"cpu": 2048}
"""Rows of the inputs that are widened to the gradient's dtype at once; elsewhere they stay as they are."""


@dataclass(frozen=True, kw_only=True)
class FakeQuant:
    """How a matrix is quantized in every step: hashable, holds no tensors."""

    format: Format
    """The grid; its `zero` does not matter here, for offsets are given."""

    columns: int
    """How many inputs a row has."""

    domain: Literal["weight", "codes"] = "weight"
    """What is rounded: a float weight, or a real-valued code."""

    order: Literal["clamp-round", "round-clamp"] = "clamp-round"
    """Both orders give the same weights, but other gradients, since other codes count as clamped and pass none on. In
    clamp-round (L4Q) these are those whose unrounded value is out of range; in round-clamp (LR-QAT, EfficientQAT),
    those whose rounded value is."""

    tolerance: float = 1e-4
    """In the order clamp-round, how many steps out of range a value may be and still count as inside. L4Q's start puts
    the largest weight of each group exactly on the border, where a rounding error would stop its gradient."""

    base_bits: int | None = None
    """The width of the codes of a base of codes: None for `format.bits`; 8 for fixed point, where a code is `byte /
    2**(8 - bits)` (LR-QAT)."""

    def __post_init__(self) -> None:
        if self.domain not in ("weight", "codes"):
            raise ConfigError(f"domain={self.domain!r} is unknown. Use weight or codes")
        if self.order not in ("clamp-round", "round-clamp"):
            raise ConfigError(f"order={self.order!r} is unknown. Use clamp-round or round-clamp")
        if self.base_bits not in (None, 8, self.format.bits):
            raise ConfigError(f"base_bits={self.base_bits} is not supported. Use {self.format.bits} or 8")
        if self.format.levels != "int" and (self.domain == "weight" or self.base_bits not in (None, self.format.bits)):
            raise ConfigError(f"levels={self.format.levels!r} have no codes between them to train. Use levels='int'")

    @property
    def grid(self) -> Grid:
        """What the kernels know of it."""
        bits = self.format.bits
        return Grid(bits, self.base_bits or bits, self.format.width(self.columns), self.columns)

    @property
    def slack(self) -> float | None:
        """The tolerance for clamp-round, and None for round-clamp, which is how kernels are told the order."""
        return self.tolerance if self.order == "clamp-round" else None

    def check(self, base: Tensor, scales: Tensor, offsets: Tensor, A: Tensor | None, B: Tensor | None) -> None:
        """Raise ShapeError unless the tensors fit, ConfigError for codes of a table that are to be trained."""
        out, (_, base_bits, group, columns) = base.shape[0], self.grid
        row = columns if self.domain == "weight" else -(-columns * base_bits // 8)
        want = {"base": (out, row), "scales": (out, -(-columns // group)), "offsets": (out, -(-columns // group))}
        have = {"base": base, "scales": scales, "offsets": offsets}
        if A is not None or B is not None:
            if A is None or B is None:
                raise ShapeError("A and B come together: give both, or neither")
            if self.format.levels != "int":
                raise ConfigError(f"A and B cannot move codes of levels={self.format.levels!r}. Use levels='int'")
            want |= {"A": (A.shape[0], columns), "B": (out, A.shape[0])}
            have |= {"A": A, "B": B}
        for name, tensor in have.items():
            if tuple(tensor.shape) != want[name]:
                raise ShapeError(f"{name} is {tuple(tensor.shape)}, expected {want[name]}")
        if scales.dtype != offsets.dtype or scales.dtype not in (torch.float32, torch.float64):
            raise ShapeError(
                f"scales are {scales.dtype} and offsets {offsets.dtype}: both must be float32 (or float64)"
            )
        if base.is_floating_point() != (self.domain == "weight"):
            raise ShapeError(f"a base of {base.dtype} does not fit domain={self.domain!r}")


class FakeQuantMatmul(torch.autograd.Function):
    """`x @ W.T` with `W` quantized on the fly, and gradients for all that it is quantized from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: FakeQuant, scaling: float, *tensors: Any) -> Tensor:
        ctx.how, ctx.scaling = how, scaling
        base, scales, offsets, A, B = tensors
        trains = any(ctx.needs_input_grad[3:])
        ctx.save_for_backward(x if trains else None, *tensors)
        wide = product_dtype(x)
        dense = fake_quantize(*_operands(how, scaling, base, scales, offsets, A, B), wide)
        with unrounded(x.device.type, wide):
            return torch.nn.functional.linear(x.to(wide), dense).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, base, scales, offsets, A, B = ctx.saved_tensors
        operands = _operands(ctx.how, ctx.scaling, base, scales, offsets, A, B)
        with torch.autocast(dy.device.type, enabled=False):  # backward may run inside of it
            if x is None:
                wide = product_dtype(dy)
                return (dy.to(wide) @ fake_quantize(*operands, wide)).to(dy.dtype), *(None,) * 7
            rows = x.reshape(-1, x.shape[-1])
            needs_x, _, _, needs_base, _, _, needs_A, needs_B = ctx.needs_input_grad
            step = _rows_at_once(dy.device.type, operands[-1].columns)
            whole = len(base) <= step  # else what each tile adds to the gradient of the inputs is summed in float32
            wanted = Gradients(
                base=torch.empty_like(base) if needs_base else None,
                scales=torch.empty_like(scales),
                offsets=torch.empty_like(offsets),
                A=torch.zeros_like(A, dtype=scales.dtype) if needs_A else None,
                B=torch.empty_like(B, dtype=scales.dtype) if needs_B else None,
                x=torch.empty_like(rows, dtype=_working(dy, scales) if whole else scales.dtype) if needs_x else None,
            )
            _fill(wanted, dy.reshape(-1, dy.shape[-1]), rows, operands, ctx.how.slack, step)
        dx = None if wanted.x is None else wanted.x.view(x.shape).to(x.dtype)
        dA = None if wanted.A is None else wanted.A.to(A.dtype)
        dB = None if wanted.B is None else (ctx.scaling * wanted.B).to(B.dtype)
        return dx, None, None, wanted.base, wanted.scales, wanted.offsets, dA, dB


@dataclass(frozen=True)
class Gradients:
    """What backward fills in; None for what is not wanted."""

    base: Tensor | None
    scales: Tensor
    offsets: Tensor
    A: Tensor | None
    """The gradient of `A`, which starts as zeros, since every tile adds to it."""

    B: Tensor | None
    """The gradient of `B` as the kernels take it, which is already scaled."""

    x: Tensor | None
    """The gradient of the inputs, `[tokens, in]`; every tile adds to it."""


Operands = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, Grid]
"""The tensors in the order in which kernels take them: base, A, scaled B, scales, offsets, levels, grid."""


def _operands(
    how: FakeQuant, scaling: float, base: Tensor, scales: Tensor, offsets: Tensor, A: Tensor | None, B: Tensor | None
) -> Operands:
    A = None if A is None else A.to(scales.dtype)
    B = None if B is None else scaling * B.to(scales.dtype)
    return base, A, B, scales, offsets, how.format.table(base), how.grid


def _rows_at_once(device_type: str, columns: int) -> int:
    """How many rows of a matrix a tile of the gradient has."""
    return max(_LEAST_ROWS, _TILE.get(device_type, 1 << 26) // columns)


def _working(dy: Tensor, scales: Tensor) -> torch.dtype:
    """The dtype of the operands of products of the matrix's size."""
    return large_operand_dtype(dy, scales.dtype)


def _fill(wanted: Gradients, dy: Tensor, x: Tensor, operands: Operands, slack: float | None, step: int) -> None:
    """Compute gradients tile by tile, given `dy [tokens, out]` and `x [tokens, in]`.

    The pass that masks the gradient of a tile gives its weights too, for that of `x`; where these are float32, they are
    not rounded as forward rounds them.
    """
    base, A, B, scales, offsets, levels, grid = operands
    work = _working(dy, scales)
    tile = scales.new_empty(min(step, len(base)), grid.columns)
    weights = None if wanted.x is None else torch.empty_like(tile, dtype=work)
    size = _TOKENS.get(dy.device.type, max(1, len(x)))
    parts = [slice(at, at + size) for at in range(0, len(x), size)] or [slice(0)]
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        G = tile[: len(base) - start]
        for some in parts:
            add_product(G, dy[some, rows].to(work).T, x[some].to(work), first=some is parts[0])
        factor = None if B is None else B[rows]
        dense = None if weights is None else weights[: len(base) - start]
        wanted.scales[rows], wanted.offsets[rows] = fake_gradients(
            G, base[rows], A, factor, scales[rows], offsets[rows], levels, grid, slack, dense
        )
        if wanted.x is not None and dense is not None:
            for some in parts:
                add_product(wanted.x[some], dy[some, rows].to(work), dense, first=not start)
        if wanted.base is not None:
            wanted.base[rows] = G
        if wanted.A is not None and factor is not None:
            wanted.A.addmm_(factor.T, G)
        if wanted.B is not None and A is not None:
            torch.mm(G, A.T, out=wanted.B[rows])


def fake_quant_matmul(
    x: Tensor,
    base: Tensor,
    scales: Tensor,
    offsets: Tensor,
    *,
    how: FakeQuant,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """`x @ W.T` with the quantized `W`; gradients for `x`, `base` (floats), `scales`, `offsets`, `A` and `B`.

    Args:
        x: `[..., in]`, float16, bfloat16, float32 (or float64): the dtype of the product. Autocast is the caller's
            affair, as in `QuantLinear`; inside it is off.
        base: Float `[out, in]`, or packed codes, uint8 `[out, ceil(in * base_bits / 8)]`, see :class:`FakeQuant`.
        scales: float32 `[out, groups]` (float64 for references), positive, as they will be stored
            (:meth:`ValueStorage.snap`).
        offsets: `[out, groups]` in the dtype of `scales`, with the values that will be stored.
        how: How the matrix is quantized.
        A: `[rank, in]`, any float dtype; None with `B` for none.
        B: `[out, rank]`.
        scaling: The factor of `B @ A`, alpha / rank.
    """
    how.check(base, scales, offsets, A, B)
    if not torch.is_grad_enabled() and scales.dtype == torch.float32 and few(x, how.grid.group_size, how.columns):
        return _few(x, how, scaling, base, scales, offsets, A, B)
    return FakeQuantMatmul.apply(x, how, scaling, base, scales, offsets, A, B)


def _few(
    x: Tensor,
    how: FakeQuant,
    scaling: float,
    base: Tensor,
    scales: Tensor,
    offsets: Tensor,
    A: Tensor | None,
    B: Tensor | None,
) -> Tensor:
    """The product of few tokens as the merged model computes it, bit for bit (`autograd.quant_matmul`)."""
    _, _, group_size, columns = how.grid
    bits = how.format.bits
    packed = pack(fake_quant_codes(base, scales, offsets, how=how, A=A, B=B, scaling=scaling), bits)
    rows = x.reshape(-1, columns)
    y = product(rows, packed, [scales], [offsets], how.format.table(x), bits, group_size, columns)
    return y.view(*x.shape[:-1], len(base))


@torch.no_grad()
def fake_quant_weight(
    base: Tensor,
    scales: Tensor,
    offsets: Tensor,
    *,
    how: FakeQuant,
    dtype: torch.dtype,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """The weight that :func:`fake_quant_matmul` multiplies with, `[out, in]` in `dtype`. No gradients."""
    how.check(base, scales, offsets, A, B)
    return fake_quantize(*_operands(how, scaling, base, scales, offsets, A, B), dtype)


@torch.no_grad()
def fake_quant_codes(
    base: Tensor,
    scales: Tensor,
    offsets: Tensor,
    *,
    how: FakeQuant,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """The codes, uint8 `[out, in]`, that make the merged weight with `scales` and `offsets` as they are."""
    if how.format.levels != "int":
        return unpack(base, how.format.bits, how.columns)
    return fake_quant_weight(base, scales, offsets, how=how, dtype=torch.uint8, A=A, B=B, scaling=scaling)


@torch.no_grad()
def fake_quant_sums(
    base: Tensor, *, how: FakeQuant, A: Tensor | None = None, B: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """The sum of the codes of each group, over a base of integer codes; float32 `[out, groups]`, whole numbers.

    They are summed tile by tile, as a gradient of the scales is: nothing of a weight's size is made.
    """
    group, columns = how.grid.group_size, how.grid.columns
    unit = torch.ones(len(base), -(-columns // group), device=base.device)
    how.check(base, unit, unit, A, B)
    packed, A, B, scales, offsets, levels, grid = _operands(how, scaling, base, unit, unit, A, B)
    step = _rows_at_once(base.device.type, columns)
    tile, sums = unit.new_empty(min(step, len(base)), columns), torch.empty_like(unit)
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        G, factor = tile[: len(base) - start].fill_(1), None if B is None else B[rows]
        sums[rows], _ = fake_gradients(
            G, packed[rows], A, factor, scales[rows], offsets[rows], levels, grid, None, None
        )
    return sums
