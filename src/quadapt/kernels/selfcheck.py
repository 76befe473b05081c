"""Are the kernels of this machine right? Each is run on random matrices, and compared with plain torch.

The kernels are compiled for the processor that runs them, so what another machine's tests say is no proof for this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quadapt.kernels import entropy_reference, fake_reference, reference
from quadapt.kernels.dispatch import kernels_for
from quadapt.kernels.fake_reference import Grid
from quadapt.widths import INTEGER_WIDTHS

ROWS, COLUMNS, GROUP = 48, 352, 32
TABLE = (-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0)
"""Sixteen ascending levels, as 4-bit tables have them."""


@dataclass(frozen=True)
class Check:
    """How far what one kernel gave is from what plain torch gives."""

    kernel: str
    """What the kernel computes, in words."""

    error: float
    """The largest difference from plain torch, relative to the largest number; infinity where it cannot run."""

    limit: float
    """The largest difference that is right: 0 where bits are to be the same, more where sums are in another order."""

    words: str = ""
    """Why it cannot run; empty if it can."""

    @property
    def right(self) -> bool:
        """Whether the kernel computes what it should."""
        return self.error <= self.limit


def checks(device: torch.device) -> Iterator[Check]:
    """Run a kernel of each kind on a device, one after the other."""
    for name, limit, compute in _CASES:
        try:
            found, wanted = compute(device)
        except Exception as error:  # whatever a compiler or a driver raises is what is to be known
            words = " ".join(str(error).split())[:200]
            yield Check(name, float("inf"), limit, f"{type(error).__name__}: {words}")
            continue
        largest = max(float(wanted.double().abs().max()), 1e-30)
        missed = float((found.cpu().double() - wanted.cpu().double()).abs().max()) / largest
        yield Check(name, float("inf") if math.isnan(missed) else missed, limit)


Pair = tuple[Tensor, Tensor]


def _matrix(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and scales and offsets of its groups, float32."""
    seeded = torch.Generator().manual_seed(0)
    groups = COLUMNS // GROUP
    weight = torch.randn(ROWS, COLUMNS, generator=seeded)
    scales = torch.rand(ROWS, groups, generator=seeded) * 0.1 + 0.05
    offsets = torch.randn(ROWS, groups, generator=seeded) - 0.5
    return weight.to(device), scales.half().float().to(device), offsets.half().float().to(device)


def _table(bits: int, device: torch.device, *, lookup: bool) -> Tensor | None:
    return torch.tensor(TABLE[:: 16 >> bits], device=device) if lookup else None


def _dequantized(device: torch.device, *, bits: int, lookup: bool) -> Pair:
    weight, scales, offsets = _matrix(device)
    levels = _table(bits, device, lookup=lookup)
    packed = reference.nearest_codes(weight, scales, offsets, levels, bits, GROUP)
    given = (packed, scales.half(), offsets.half(), levels, bits, GROUP, COLUMNS, torch.float32)
    return kernels_for(device).dequantize(*given), reference.dequantize(*given)


def _coded(device: torch.device, *, lookup: bool) -> Pair:
    given = (*_matrix(device), _table(4, device, lookup=lookup), 4, GROUP)
    return kernels_for(device).nearest_codes(*given), reference.nearest_codes(*given)


def _ranges(device: torch.device) -> Pair:
    weight, *_ = _matrix(device)
    found, wanted = kernels_for(device).group_range(weight, GROUP), reference.group_range(weight, GROUP)
    return torch.cat(found), torch.cat(wanted)


def _multiplied(device: torch.device, *, bits: int, lookup: bool) -> Pair:
    weight, scales, offsets = _matrix(device)
    levels = _table(bits, device, lookup=lookup)
    packed = reference.nearest_codes(weight, scales, offsets, levels, bits, GROUP)
    x = weight[:3].contiguous()
    found = kernels_for(device, "product").product(x, packed, [scales], [offsets], levels, bits, GROUP, COLUMNS)
    dense = reference.dequantize(packed, scales, offsets, levels, bits, GROUP, COLUMNS, torch.float32)
    return found, x.double() @ dense.double().T


def _compensated(device: torch.device) -> Pair:
    weight, scales, offsets = _matrix(device)
    upper = torch.eye(GROUP, device=device) + torch.triu(torch.full((GROUP, GROUP), 0.02, device=device), 1)
    left = [weight[:, :GROUP].clone(), weight[:, :GROUP].clone()]
    for kernels, errors in zip((kernels_for(device), reference), left, strict=True):
        kernels.compensate(errors, upper, scales[:, 0].contiguous(), offsets[:, 0].contiguous(), None, 4)
    return left[0], left[1]


def _fake(device: torch.device) -> Pair:
    base, scales, offsets = _matrix(device)
    seeded = torch.Generator().manual_seed(1)
    A, B = torch.randn(4, COLUMNS, generator=seeded).to(device), torch.randn(ROWS, 4, generator=seeded).to(device)
    given = (base, A, 0.1 * B, scales, offsets, None, Grid(bits=4, base_bits=4, group_size=GROUP, columns=COLUMNS))
    return kernels_for(device, "fake").quantize(*given, torch.float32), fake_reference.quantize(*given, torch.float32)


def _entropies(device: torch.device) -> Pair:
    weight, *_ = _matrix(device)
    mids = reference.midpoints(torch.tensor(TABLE, device=device))
    fractions = torch.linspace(-0.1, 0.1, 21, device=device)
    given = (weight, mids, fractions, GROUP)
    found = kernels_for(device, "entropy").entropy_shift(*given)
    return torch.cat(found), torch.cat(entropy_reference.entropy_shift(*given))


_CASES: tuple[tuple[str, float, Callable[[torch.device], Pair]], ...] = (
    *((f"dequantize, int{bits}", 0.0, partial(_dequantized, bits=bits, lookup=False)) for bits in INTEGER_WIDTHS),
    *((f"dequantize, nf{bits}", 0.0, partial(_dequantized, bits=bits, lookup=True)) for bits in (2, 3, 4)),
    ("nearest codes, integers", 0.0, partial(_coded, lookup=False)),
    ("nearest codes, a table", 0.0, partial(_coded, lookup=True)),
    ("ranges of groups", 0.0, _ranges),
    ("GPTQ's inner loop", 1e-5, _compensated),
    ("entropies of codes", 1e-5, _entropies),
    ("a grid that trains", 0.0, _fake),
    *((f"few tokens, int{bits}", 1e-5, partial(_multiplied, bits=bits, lookup=False)) for bits in INTEGER_WIDTHS),
    *((f"few tokens, nf{bits}", 1e-5, partial(_multiplied, bits=bits, lookup=True)) for bits in (2, 3, 4)),
)
"""What is computed, the largest relative difference that is right, and a function that gives both results."""
