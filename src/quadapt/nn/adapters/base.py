"""What an adapter is: which parameters train over a matrix, and what they do to it.

An :class:`Adapter` is a frozen dataclass without tensors; a layer keeps the parameters and hands them over. So few PEFT
layers serve every adapter, and an adapter's settings are its identity on disk. There are two families: a
:class:`CodesAdapter` moves what lies over fixed codes and scales; a `GridAdapter` (grid.py) trains the grid itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quadapt.errors import MergeError
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

Exactness = Literal["exact", "equivalent", "none"]


Base = Literal["codes", "float", "fixed-point"]

Begins = Literal["factors", "offsets", "zero"]


@dataclass(frozen=True, kw_only=True)
class Adapter(ABC):
    """What trains over a matrix: `lora_A`, `lora_B`, `scaling` (alpha / rank), and whatever else its family has."""

    kind: ClassVar[str]
    """Name on disk and in `ADAPTERS`."""

    base: ClassVar[Base] = "codes"
    """What it trains over: codes; the dense matrix; or its 8-bit fixed-point form."""

    @property
    def begins(self) -> Begins:
        """What a start (nn/starts) sets: the factors, the offsets of the base (it is folded into them), or nothing."""
        return "zero"

    def check(self, layout: Layout, rank: int, dropout: float) -> None:  # noqa: B027 - most adapters accept anything
        """Raise ConfigError or ShapeError if this adapter cannot train over `layout`."""

    def layout(self, out: int, columns: int) -> Layout:
        """Layout of the quantized product over a dense matrix `[out, columns]`, for `base = "float"`."""
        raise AssertionError(f"{self.kind} does not train over dense matrices")

    @abstractmethod
    def inputs(self, layout: Layout) -> int:
        """Inputs of `lora_A` `[rank, inputs]`; `lora_B` is `[out, rank]`. 0: there are no such factors."""

    @abstractmethod
    def reset(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Initialize the factors in place, as the method's paper or authors do."""

    def with_grid(self, format: Format, storage: Storage) -> Adapter:
        """The same adapter for another grid: only those that do not train over codes keep it themselves."""
        return self

    @property
    def exactness(self) -> Exactness:
        """What a merge promises: exact (bit for bit), equivalent (but for rounding), none (it cannot merge)."""
        return "none"

    @property
    def merged_form(self) -> bool:
        """Whether training computes with the merged matrix itself; otherwise the adapter is a side branch."""
        return False

    def identity(self) -> dict[str, object]:
        """Kind and settings, as they are saved."""
        return {"kind": self.kind, **asdict(self)}


class CodesAdapter(Adapter):
    """An adapter over a matrix whose codes and scales stay as they are."""

    betas: ClassVar[int] = 0
    """How many numbers train beside the factors (`lora_beta`, zero at first)."""

    def factors(self, lora_A: Tensor, lora_B: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The factors that act, differentiable, of those that train and of `beta` `[betas]`.

        All other methods are given these.
        """
        return lora_A, lora_B

    def merge(self, weight: QuantWeight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> QuantWeight:
        """The adapted matrix, quantized, without moving a code.

        Raises:
            MergeError: This adapter changes weights within a group, which codes cannot follow.
        """
        raise MergeError(
            f"{self.kind} adapters change weights within a group, which the codes of {weight.format.name} cannot "
            "follow. Serve base + adapter (export --format lora), train with --method qa-lora, "
            "or accept the loss and requantize (merge --requantize)"
        )

    def offset_gradients(
        self, layout: Layout, lora_A: Tensor, lora_B: Tensor, scaling: float, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `lora_A` and `lora_B` from that of the merged offsets `[out, groups]`, straight through."""
        raise AssertionError(f"{self.kind} does not move offsets")

    def side(self, x: Tensor, y: Tensor, weight: QuantWeight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """`y` plus what a side branch adds to the layer's output for (dropped-out) inputs `x`."""
        return y

    def undropped(
        self, missing: Tensor, y: Tensor, weight: QuantWeight, lora_B: Tensor, beta: Tensor, scaling: float
    ) -> Tensor:
        """`y` plus what connections that see inputs without dropout make of those it took: `missing = x - dropped`."""
        return y

    @abstractmethod
    def as_lora(self, weight: QuantWeight, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """`A [rank, in]` and `B [out, rank]` of the ordinary LoRA that does the same, at the same scaling."""


@dataclass(frozen=True)
class MergedForm:
    """Adapters trained in the merged form: the product computes with what they merge to."""

    parts: tuple[tuple[CodesAdapter, float], ...]
    """Adapters with their scaling, in the order in which a merge would apply them."""

    def offsets(self, weight: QuantWeight, params: tuple[Tensor, ...]) -> Tensor | None:
        """Offsets of the merged matrix. `params` has `lora_A` and `lora_B` of each part."""
        for at, (adapter, scaling) in enumerate(self.parts):
            weight = adapter.merge(weight, params[2 * at], params[2 * at + 1], scaling)
        return weight.offsets

    def gradients(self, weight: QuantWeight, params: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
        """Each part adds to the offsets, so each sees the same gradient."""
        pairs = (
            adapter.offset_gradients(weight.layout, params[2 * at], params[2 * at + 1], scaling, gradient)
            for at, (adapter, scaling) in enumerate(self.parts)
        )
        return tuple(tensor for pair in pairs for tensor in pair)


def add_low_rank(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`y + scaling * x A^T B^T` in the dtype of `y`; parameters are cast, inputs and outputs are not."""
    hidden = torch.nn.functional.linear(x, lora_A.to(x.dtype))
    rows = torch.addmm(
        y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), lora_B.to(y.dtype).T, alpha=scaling
    )
    return rows.view(y.shape)
