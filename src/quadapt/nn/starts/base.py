"""How quantization and adapter begin: a quantized base, and the low-rank term that stands beside it at the first step.

A start is given `quantize` as a function, because some (LoftQ, LQ-LoRA) call it in a loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quadapt.quant.rounding import Statistics
from quadapt.quant.weight import QuantWeight

Quantize = Callable[[Tensor], QuantWeight]
"""A rounding, bound to a layout and to the layer's statistics."""


@dataclass(frozen=True, eq=False)
class Begun:
    """A layer before the first step: it computes with `weight + up @ down`."""

    weight: QuantWeight
    """The quantized base."""

    factors: tuple[Tensor, Tensor] | None = None
    """`up` `[out, rank]` and `down` `[rank, in]` (`[rank, groups]` for an adapter over pooled inputs), float32. The
    LoRA scaling `s` is the caller's affair: `lora_B = up / sqrt(s)`, `lora_A = down / sqrt(s)`. None for the adapter's
    own initialization, which changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Start(ABC):
    """Where training starts."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Names of the statistics that it reads, besides those of the rounding."""

    @abstractmethod
    def __call__(self, weight: Tensor, quantize: Quantize, rank: int, statistics: Statistics) -> Begun:
        """Quantized base and low-rank term for `weight` (any float dtype, `[out, in]`, not modified).

        Args:
            weight: The dense matrix.
            quantize: Makes a quantized matrix of a dense one.
            rank: Of the adapter; factors have this many columns and rows even where fewer would do (the rest is zero).
            statistics: Of this layer: `second_moment` float64 `[in, in]` of its inputs in the full-precision model,
                `fisher` float32 `[out, in]`, those that `needs` names.

        Raises:
            CalibrationError: Statistics are missing or unusable.
        """


@dataclass(frozen=True, kw_only=True)
class Zero(Start):
    """The quantized weight, and an adapter that is zero at first (QLoRA, QA-LoRA)."""

    def __call__(self, weight: Tensor, quantize: Quantize, rank: int, statistics: Statistics) -> Begun:
        return Begun(quantize(weight))
