"""How quantization and adapter begin: a quantized base, and the low-rank term that stands beside it at the first step.

A start is given `quantize` as a function, because some (LoftQ, LQ-LoRA) call it in a loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quadapt.nn.starts.fit import best_offsets
from quadapt.quant.rounding import Statistics
from quadapt.quant.weight import QuantWeight
from quadapt.registry import Registry

Quantize = Callable[[Tensor], QuantWeight]
"""A rounding, bound to a layout and to the layer's statistics."""


@dataclass(frozen=True, eq=False)
class Begun:
    """A layer before the first step: it computes with `weight + up @ down`."""

    weight: QuantWeight
    """The quantized matrix that the adapter lies over."""

    factors: tuple[Tensor, Tensor] | None = None
    """`up` `[out, rank]` and `down` `[rank, in]` (`[rank, groups]` for an adapter over pooled inputs), float32. The
    LoRA scaling `s` is the caller's affair: `lora_B = up / sqrt(s)`, `lora_A = down / sqrt(s)`. None for the adapter's
    own initialization, which changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Start(ABC):
    """How the base and the adapter come about before the first step."""

    name: ClassVar[str]
    """The name of the start on the command line."""

    summary: ClassVar[str] = ""
    """A few words that say what is fitted, for `--help`."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """The names of the statistics that it reads, besides those of the rounding."""

    fits: ClassVar[bool] = True
    """Whether anything is fitted: otherwise the adapter changes nothing at first."""

    shared: ClassVar[bool] = False
    """Whether grids that differ in how their scales are stored may share one low-rank term (plans do)."""

    def shortened(self, turns: int, tolerance: float, *, fisher: bool) -> Start:
        """A start of this kind that takes less work, for a table of errors.

        Args:
            turns: Turns that it takes at most.
            tolerance: It ends with a turn that lowers the error by less than this share.
            fisher: Whether there is Fisher information to weight errors with.
        """
        return self

    @abstractmethod
    def __call__(
        self, weight: Tensor, quantize: Quantize, rank: int, statistics: Statistics, *, pooled: bool = False
    ) -> Begun:
        """Quantized base and low-rank term for `weight` (any float dtype, `[out, in]`, not modified).

        Args:
            weight: The dense matrix.
            quantize: Makes a quantized matrix of a dense one.
            rank: The adapter's rank. Factors have as many columns and rows even where fewer would do (with zeros).
            statistics: This layer's: `dense_second_moment` float `[in, in]`, the mean of `x x^T` over its inputs in
                the full-precision model; `fisher` float32 `[out, in]`; those that `needs` names.
            pooled: The adapter sees inputs summed over groups. Then what it would start from is folded into the
                offsets of the base, and there are no factors: it starts at zero, over a better base.

        Raises:
            CalibrationError: Statistics are missing or unusable.
        """


STARTS: Registry[type[Start]] = Registry("start", "quadapt.nn.starts")
"""Every start that is known, by name."""


@STARTS.register("zero")
@dataclass(frozen=True, kw_only=True)
class Zero(Start):
    """The quantized weight, and an adapter that is zero at first (QLoRA, QA-LoRA)."""

    summary: ClassVar[str] = "nothing is fitted"
    fits: ClassVar[bool] = False
    shared: ClassVar[bool] = True

    def __call__(
        self, weight: Tensor, quantize: Quantize, rank: int, statistics: Statistics, *, pooled: bool = False
    ) -> Begun:
        return Begun(quantize(weight))


def folded(base: QuantWeight, E: Tensor, H: Tensor | None) -> Begun:
    """The base with the offsets that leave least of its error `E` under `H`: the start of a pooled adapter."""
    shift = best_offsets(E, H, base)
    offsets = base.offsets
    kept = (shift if offsets is None else offsets + shift).float()
    return Begun(base.with_offsets(kept, base.layout.storage.floats))
