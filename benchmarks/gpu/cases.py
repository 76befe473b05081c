"""Every Triton kernel on inputs that reach its corners, with what the plain torch kernels say of the same inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quadapt.kernels import (
    _held,
    cuda,
    entropy_cuda,
    entropy_reference,
    fake_cuda,
    fake_reference,
    product_cuda,
    reference,
)
from quadapt.kernels.fake_reference import Grid
from quadapt.quant.format import Format, normal_levels
from quadapt.quant.icq import fractions
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout
from quadapt.widths import INTEGER_WIDTHS, NORMAL_FLOAT_WIDTHS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BITS = INTEGER_WIDTHS


@dataclass(frozen=True)
class Case:
    """One call of a kernel."""

    kernel: str
    """Which."""

    name: str
    """On what."""

    mine: Callable[..., Any]
    """The Triton kernel: tensors may be changed in place."""

    plain: Callable[..., Any]
    """Its reference."""

    arguments: tuple[Any, ...]
    """What both get."""

    tolerance: tuple[float, ...] = (0.0,)
    """Norm of the difference over that of the reference, for each result; zero: bit for bit."""

    def run(self, device: torch.device) -> None:
        """Launch the kernel on `device`, whatever comes out."""
        self.mine(*_moved(self.arguments, device))

    def deviations(self, device: torch.device) -> list[float]:
        """Relative difference of each result, and of each tensor that is changed in place, to the reference's."""
        moved = _moved(self.arguments, device)
        found = _tensors((self.mine(*moved), *moved))
        kept = _moved(self.arguments, torch.device("cpu"))
        want = _tensors((self.plain(*kept), *kept))
        return [_deviation(mine.cpu(), plain) for mine, plain in zip(found, want, strict=True)]

    def check(self, device: torch.device) -> None:
        """Raise AssertionError if the kernel differs from its reference by more than it may."""
        for at, found in enumerate(self.deviations(device)):
            limit = self.tolerance[at] if at < len(self.tolerance) else 0.0
            if not found <= limit:
                raise AssertionError(f"{self.kernel}, {self.name}: result {at} differs by {found:.1e}, limit {limit}")


def _moved(arguments: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """A copy of each tensor."""
    return tuple(
        each.to(device, copy=True)
        if isinstance(each, Tensor)
        else [tensor.to(device, copy=True) for tensor in each]
        if isinstance(each, list)
        else each
        for each in arguments
    )


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [tensor for each in values for tensor in _tensors(each)] if isinstance(values, (tuple, list)) else []


def _deviation(mine: Tensor, plain: Tensor) -> float:
    if mine.dtype != plain.dtype or mine.shape != plain.shape:
        return float("inf")
    if torch.equal(mine, plain):
        return 0.0
    gap = float((mine.double() - plain.double()).norm() / plain.double().norm())
    return gap if gap > 0 else float("nan")  # equal but for NaN, or for the sign of a zero


def cases(rows: int, columns: int, group: int) -> Iterator[Case]:
    """All kernels on matrices of about this size; `columns` that end inside a word and a group reach the most."""
    torch.manual_seed(0)
    for make in (_decoding, _encoding, _gptq, _entropy, _faking, _products):
        yield from make(rows, columns, group)


def _levels(bits: int) -> dict[str, Tensor | None]:
    if bits not in NORMAL_FLOAT_WIDTHS:
        return {f"int{bits}": None}
    return {f"int{bits}": None, f"nf{bits}": torch.tensor(normal_levels(bits))}


def _grid(rows: int, columns: int, group: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets, some of them small and some large, some of the scales negative."""
    shape = (rows, -(-columns // group))
    sign = torch.where(torch.rand(shape) < 0.25, -1, 1)
    return sign * torch.rand(shape).mul(0.3).add(0.01) * 4.0 ** torch.randint(-3, 3, shape), torch.randn(shape)


def _packed(rows: int, columns: int, bits: int) -> Tensor:
    return reference.pack(torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8), bits)


def _decoding(rows: int, columns: int, group: int) -> Iterator[Case]:
    for bits, dtype in itertools.product(BITS, DTYPES):
        for name, table in _levels(bits).items():
            for width, wide in ((group, columns), (columns, columns - columns % 8)):  # cut words, and whole ones
                scales, offsets = _grid(rows, wide, min(width, wide))
                halves = dtype == torch.float16
                grid = (scales.half(), offsets.half()) if halves else (scales, offsets if width == group else None)
                arguments = (_packed(rows, wide, bits), *grid, table, bits, min(width, wide), wide, dtype)
                about = f"{name}, groups of {min(width, wide)}, to {str(dtype)[6:]}"
                yield Case("dequantize", about, cuda.dequantize, reference.dequantize, arguments)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    constants = torch.rand(-(-codes.numel() // 256)), torch.randn(1), torch.linspace(-1, 1, 256)
    yield Case("widen", "doubly quantized scales", cuda.widen, reference.widen, (codes, *constants))


def _encoding(rows: int, columns: int, group: int) -> Iterator[Case]:
    for bits, shifted in itertools.product(BITS, (True, False)):
        for name, table in _levels(bits).items():
            for width in (group, columns):
                scales, offsets = _grid(rows, columns, width)
                weight = torch.randn(rows, columns)
                arguments = (weight, scales, offsets if shifted else None, table, bits, width)
                about = f"{name}, groups of {width}{', shifted' if shifted else ''}"
                yield Case("nearest_codes", about, cuda.nearest_codes, reference.nearest_codes, arguments)
                yield Case("group_error", about, cuda.group_error, reference.group_error, arguments, (1e-5,))


def _gptq(rows: int, _: int, group: int) -> Iterator[Case]:
    noise = torch.randn(4 * group, group)
    upper = torch.linalg.cholesky(noise.T @ noise).T.contiguous()
    for bits, shifted in ((2, True), (3, False), (4, True), (5, False), (6, True), (8, True)):
        for name, table in _levels(bits).items():
            scales, offsets = _grid(rows, group, group)
            grid = (scales[:, 0], offsets[:, 0] if shifted else None)
            arguments = (torch.randn(rows, group), upper, *grid, table, bits)
            yield Case("compensate", f"{name}, {group} columns", cuda.compensate, reference.compensate, arguments)


def _entropy(rows: int, columns: int, group: int) -> Iterator[Case]:
    weight, tried = torch.randn(rows, columns), fractions()[95:106].float().contiguous()
    for bits in (2, 3, 4, 5):
        for name, table in _levels(bits).items():
            mids = reference.midpoints(torch.linspace(-1, 1, 2**bits) if table is None else table)
            arguments = (weight, mids, tried, group)
            kernels = entropy_cuda.entropy_shift, entropy_reference.entropy_shift
            yield Case("entropy_shift", f"{name}, groups of {group}", *kernels, arguments)
    for bits in BITS:
        scales, offsets = _grid(rows, columns, group)
        arguments = (weight, scales, offsets if bits != 3 else None, bits, group)
        kernels = entropy_cuda.group_crowding, entropy_reference.group_crowding
        yield Case("group_crowding", f"int{bits}, groups of {group}", *kernels, arguments)


def _faking(rows: int, columns: int, group: int) -> Iterator[Case]:
    bases = (*(("weights", dtype) for dtype in DTYPES), ("codes", None), ("fixed point", None), ("levels", None))
    for bits, (kind, dtype) in itertools.product(BITS, bases):
        if kind == "levels" and bits not in NORMAL_FLOAT_WIDTHS:
            continue
        width = columns if bits == 3 else group
        base_bits = 8 if kind == "fixed point" else bits
        base = torch.randn(rows, columns).to(dtype) if dtype else _packed(rows, columns, base_bits)
        table = torch.tensor(normal_levels(bits)) if kind == "levels" else None
        factors = (None, None) if kind == "levels" else (0.3 * torch.randn(3, columns), torch.randn(rows, 3))
        grid = (*_grid(rows, columns, width), table, Grid(bits, base_bits, width, columns))
        about = f"int{bits}, base of {kind}{f' ({str(dtype)[6:]})' if dtype else ''}, groups of {width}"
        whole = (base, *factors, *grid)
        out = dtype or torch.bfloat16
        yield Case("fake_quantize", about, fake_cuda.quantize, fake_reference.quantize, (*whole, out))
        if table is None:
            yield Case(
                "fake_quantize", f"{about}, codes", fake_cuda.quantize, fake_reference.quantize, (*whole, torch.uint8)
            )
        for slack in (None, 1e-4):
            arguments = (torch.randn(rows, columns), *whole, slack, torch.zeros(rows, columns, dtype=out))
            kernels = fake_cuda.gradients, fake_reference.gradients
            yield Case("fake_gradients", f"{about}, slack {slack}", *kernels, arguments, (1e-5,))


def _products(rows: int, columns: int, group: int) -> Iterator[Case]:
    kinds: tuple[tuple[str, str, str, str], ...] = (
        ("int", "none", "absent", "fp16"),
        ("int", "integer", "integer", "double"),
        ("int", "float", "fp16", "fp16"),
        ("nf", "none", "absent", "double"),
        ("nf", "float", "double", "fp32"),
    )
    for bits, (levels, zero, offsets, scales) in itertools.product(BITS, kinds):
        if levels == "nf" and bits not in NORMAL_FLOAT_WIDTHS:
            continue
        format = Format(bits=bits, levels=levels, group_size=group, zero=zero)  # type: ignore[arg-type]
        layout = Layout(format=format, storage=Storage(scales=scales, offsets=offsets), out=rows, columns=columns)
        weight = Nearest()(torch.randn(rows, columns), layout)
        for tokens, dtype in ((1, torch.bfloat16), (1, torch.float32), (5, torch.float16)):
            held = (_held(weight.held(name), layout.groups) for name in ("scales", "offsets"))
            arguments = (
                torch.randn(tokens, columns).to(dtype), weight.packed, *held, format.table(weight.packed), bits,
                format.width(columns), columns,
            )  # fmt: skip
            about = f"{format.name}, scales {scales}, offsets {offsets}, {tokens} of {str(dtype)[6:]}"
            limit = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 3e-6}[dtype]
            plain = partial(_product, weight.dequantize(torch.float64))
            yield Case("product", about, product_cuda.product, plain, arguments, (limit,))


def _product(dense: Tensor, x: Tensor, *_: Any) -> Tensor:
    """In float64, rounded once."""
    return (x.double() @ dense.T).to(x.dtype)
