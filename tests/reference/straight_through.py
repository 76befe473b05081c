"""A layer that trains its quantizer, in float64, and the same layer dense, with gradients that torch derives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quadapt.kernels import expand, pack, unpack
from quadapt.quant.fake_quant import FakeQuant, fake_quant_matmul
from quadapt.quant.format import Format

BITS = (2, 3, 4, 5, 6, 8)
ORDERS = ("clamp-round", "round-clamp")
OUT, IN = 24, 80  # groups of 32: the last has 16


@dataclass
class Case:
    """One layer and what trains in it; leaves in float64 unless said otherwise."""

    how: FakeQuant
    x: Tensor
    base: Tensor
    scales: Tensor
    offsets: Tensor
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 0.5

    def __call__(self, **changes: Any) -> Tensor:
        case = replace(self, **changes)
        return fake_quant_matmul(case.x, *case.grid, how=case.how, **case.low_rank)

    @property
    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.base, self.scales, self.offsets

    @property
    def low_rank(self) -> dict[str, Any]:
        return {"A": self.A, "B": self.B, "scaling": self.scaling}

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        every = (self.x, self.base, self.scales, self.offsets, self.A, self.B)
        return tuple(each for each in every if each is not None and each.requires_grad)

    def to(self, dtype: torch.dtype, x: torch.dtype | None = None) -> Case:
        """The same numbers in other dtypes; codes stay."""

        def cast(tensor: Tensor | None, kind: torch.dtype) -> Tensor | None:
            if tensor is None or not tensor.is_floating_point():
                return tensor
            return tensor.detach().to(kind).requires_grad_(tensor.requires_grad)

        changed = {name: cast(getattr(self, name), dtype) for name in ("base", "scales", "offsets", "A", "B")}
        return replace(self, x=cast(self.x, x or dtype), **changed)


def case(
    domain: str = "weight",
    order: str = "clamp-round",
    bits: int = 3,
    *,
    group_size: int = 32,
    columns: int = IN,
    rank: int = 3,
    base_bits: int | None = None,
    lead: tuple[int, ...] = (2, 5),
    spread: float = 1.0,
    scaling: float = 0.5,
    levels: str = "int",
) -> Case:
    """Weights of deviation `spread` on a grid that clamps, at spread 1, a few hundredths of them at both ends."""
    format = Format(levels=levels, bits=bits, group_size=group_size)
    how = FakeQuant(
        format=format, columns=columns, domain=domain, order=order, base_bits=base_bits, tolerance=0.0
    )  # nor has the reference's clamp any
    double: dict[str, Any] = {"dtype": torch.float64}
    scales = (torch.rand(OUT, format.groups(columns), **double) + 0.5) * 4 / 2**bits
    offsets = -scales * 2 ** (bits - 1) + 0.1 * torch.randn(scales.shape, **double)
    x, A, B = (
        torch.randn(*lead, columns, **double),
        torch.randn(rank, columns, **double),
        torch.randn(OUT, rank, **double),
    )
    if domain == "weight":
        base = spread * torch.randn(OUT, columns, **double)
        A = 0.1 * spread / scaling * A
    else:
        base = pack(torch.randint(0, 2 ** (base_bits or bits), (OUT, columns), dtype=torch.uint8), base_bits or bits)
        A = 0.06 * 2**bits * spread / scaling * A
    made = Case(how, x, base, scales, offsets, A, B, scaling) if rank else Case(how, x, base, scales, offsets)
    for tensor in (made.x, made.scales, made.offsets, made.A, made.B):
        if tensor is not None:
            tensor.requires_grad_()
    return made


def unrounded(each: Case) -> Tensor:
    """Real-valued codes, differentiable."""
    width, columns = each.how.grid.group_size, each.how.columns
    update = 0 if each.A is None else each.scaling * (each.B @ each.A)
    if each.how.domain == "weight":
        return (each.base + update - expand(each.offsets, width, columns)) / expand(each.scales, width, columns)
    codes = unpack(each.base, each.how.grid.base_bits, columns).double()
    return codes / 2 ** (each.how.grid.base_bits - each.how.grid.bits) + update


def product(each: Case, u: Tensor) -> Tensor:
    width, columns = each.how.grid.group_size, each.how.columns
    return each.x @ (u * expand(each.scales, width, columns) + expand(each.offsets, width, columns)).T


def straight_through(each: Case) -> Tensor:
    """The same layer, dense; torch derives it. Rounding has the gradient of no rounding."""

    def rounded(values: Tensor) -> Tensor:
        return values + (values.round() - values).detach()

    def clamped(values: Tensor) -> Tensor:
        """With the gradient 1 at both ends; that of `Tensor.clamp` there is another from torch 2.14 on."""
        top = each.how.grid.top
        return torch.where((values >= 0) & (values <= top), values, values.detach().clamp(0, top))

    v = unrounded(each)
    return product(each, rounded(clamped(v)) if each.how.order == "clamp-round" else clamped(rounded(v)))


def assert_same_gradients(ours: Tensor, theirs: Tensor, leaves: tuple[Tensor, ...], rtol: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(ours)
    found, want = torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(theirs, leaves, dy)
    for mine, other in zip(found, want, strict=True):
        assert mine.shape == other.shape
        assert float((mine - other).norm()) <= rtol * float(other.norm())


def gradients(each: Case, dy: Tensor, **changes: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(each(**changes), each.leaves, dy)
