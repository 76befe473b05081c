"""How quantization and adapter begin: `(Q, A, B)` before the first step.

A start is given `quantize` as a function, because some (LoftQ, LQ-LoRA) call it in a loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quadapt.quant.weight import QuantWeight

Quantize = Callable[[Tensor], QuantWeight]
"""A rounding, bound to a layout and to the layer's statistics."""


class Start(ABC):
    """Where training starts."""

    @abstractmethod
    def __call__(self, weight: Tensor, quantize: Quantize) -> tuple[QuantWeight, tuple[Tensor, Tensor] | None]:
        """Quantized base, and `lora_A`, `lora_B`; None for the adapter's own initialization, which changes nothing."""


@dataclass(frozen=True)
class Zero(Start):
    """The quantized weight, and an adapter that is zero at first (QLoRA, QA-LoRA)."""

    def __call__(self, weight: Tensor, quantize: Quantize) -> tuple[QuantWeight, None]:
        return quantize(weight), None
