"""What an adapter is: which parameters it has over a matrix, and what they do to it.

An :class:`Adapter` is a frozen dataclass without tensors. It declares its parameters (:meth:`Adapter.params`); a layer
stores what is declared, whatever it is, and hands it back by name. So one PEFT layer serves every adapter, an optimizer
reads from the declaration how a parameter trains, and an adapter's settings are its identity on disk.

A new adapter is a class in a file of its own in this package, or in another package that names it under the entry
points `quadapt.adapters`::

    @ADAPTERS.register("my-adapter")
    @dataclass(frozen=True, kw_only=True)
    class MyAdapter(CodesAdapter):
        ...

Most derive from :class:`~quadapt.nn.adapters.codes.CodesAdapter` (codes and scales stay as they are), or from
:class:`~quadapt.nn.adapters.grid.GridAdapter` (the grid itself trains).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quadapt.errors import ConfigError
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.registry import Registry
from quadapt.setting import Positive, setting

Exactness = Literal["exact", "equivalent", "none"]

Base = Literal["codes", "float", "fixed-point"]

Begins = Literal["factors", "offsets", "zero"]

Group = Literal["adapter", "grid", "ternary"]

Source = QuantWeight | Tensor
"""What an adapter trains over: a quantized matrix, or the dense one `[out, in]`."""

Params = Mapping[str, Tensor]
"""The parameters of one adapter in one layer, by the names that it has declared."""

Dropout = Callable[[Tensor], Tensor]
"""Dropout on the input of a side branch; gives back the very tensor where there is none."""

Init = Callable[[Tensor, Source], None]
"""Fills a parameter in place, given what the adapter trains over."""


def same(x: Tensor) -> Tensor:
    """Give `x` itself, which is what no dropout does."""
    return x


FIRST = ("first_A", "first_B")
"""Names of the factors from before training, which an adapter that starts from more than zero keeps, frozen."""


class _Adapters(Registry[type["Adapter"]]):
    """Adapters by the name under which they are saved; each class learns its name here."""

    def _add(self, name: str, piece: object) -> None:
        super()._add(name, piece)
        piece.kind = name  # type: ignore[attr-defined]  # the class of an adapter


ADAPTERS = _Adapters("adapter", "quadapt.nn.adapters")
"""Every adapter's class by its name on disk (`kind`): those of this package, and those of other packages."""


@dataclass(frozen=True, kw_only=True)
class Param:
    """One parameter that an adapter has over a matrix."""

    shape: tuple[int, ...]
    """The shape of the parameter. `A` is `[rank, inputs]` and `B` is `[out, rank]`."""

    init: Init
    """How it begins: fills it in place, given the matrix. PEFT's `init_lora_weights` replaces that of `A` and `B`."""

    dtype: torch.dtype | None = None
    """The dtype of the parameter; None for the usual one, which PEFT chooses (float32, unless `autocast_adapter_dtype`
    is off). For `A` and `B` PEFT always chooses it."""

    trains: bool = True
    """Whether it trains. Otherwise it is frozen, whatever else is set, and saved and loaded all the same."""

    group: Group = "adapter"
    """How an optimizer treats it: `grid` (scales, offsets) has a learning rate of its own and no weight decay;
    `ternary` (values -1, 0 and 1) steps by t-SignSGD, without a learning rate; `adapter` has what is usual."""

    serves: bool = True
    """Whether the adapted layer computes with it. First factors that train on in `A` and `B` matter only while the
    adapter is switched off."""


@dataclass(frozen=True, kw_only=True)
class Adapter(ABC):
    """What trains over a matrix, and what it makes of it.

    Methods take `source` (the matrix), `params` (what :meth:`params` declares, by name) and `scaling` (alpha / rank).
    """

    kind: ClassVar[str]
    """Name on disk and in `ADAPTERS`; registering the class sets it."""

    base: ClassVar[Base] = "codes"
    """What it trains over: codes; the dense matrix (float); or its 8-bit fixed-point form."""

    over_codes: ClassVar[str] = ""
    """The kind of adapter that does over what this one's quantizer gives what this one does beside it; empty for those
    that have no quantizer, or nothing beside it."""

    extra: ClassVar[tuple[str, ...]] = ()
    """Names of all parameters that it may declare besides `A`, `B` and first factors, whatever its settings. A file
    with such names is known to be an adapter of this library's."""

    takes_grid: ClassVar[bool] = False
    """Whether one that trains over dense matrices can begin with a grid that a rounding has chosen."""

    stacks: ClassVar[bool] = False
    """Whether several may be active in one layer. These say what they do by :meth:`merge` (and its gradients) in the
    merged form, by :meth:`side` otherwise, and `codes.stacked` puts them together. Others own their forward."""

    @property
    def begins(self) -> Begins:
        """What a start (nn/starts) sets: the factors, the offsets of the base (it is folded into them), or nothing."""
        return "zero"

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

    def with_grid(self, format: Format, storage: Storage) -> Adapter:
        """This adapter for another grid: only those that do not train over codes keep the grid themselves."""
        return self

    # --- what it has ---

    @abstractmethod
    def layout_of(self, source: Source) -> Layout:
        """The layout that its parameters belong to: of the quantized base, or of the product that it quantizes to."""

    @abstractmethod
    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        """The parameters of the adapter over one matrix, by name; a layer stores each as `lora_NAME`.

        Args:
            layout: As :meth:`layout_of` says.
            rank: Rank of the low-rank factors.
            started: Whether a start sets the factors, which are then kept as they were (`FIRST`).
        """

    def inputs(self, layout: Layout) -> int:
        """Inputs of `A`; 0 if there are no such factors."""
        factor = self.params(layout, 1).get("A")
        return 0 if factor is None else factor.shape[1]

    def check(self, layout: Layout, rank: int, dropout: float) -> None:  # noqa: B027 - most adapters accept anything
        """Raise ConfigError or ShapeError if this adapter cannot train over `layout`."""

    # --- what it does ---

    @abstractmethod
    def forward(self, x: Tensor, source: Source, params: Params, scaling: float, dropout: Dropout = same) -> Tensor:
        """The layer's product for `x [.., in]`, without its bias, with this adapter alone: `[.., out]`.

        An adapter may compute it by an autograd function of its own, and keep for backward what it needs.
        """

    @abstractmethod
    def merge(self, source: Source, params: Params, scaling: float) -> QuantWeight:
        """The adapted matrix, quantized, with nothing of the adapter left beside it.

        Raises:
            MergeError: It cannot be done without loss; the message says what can be done instead.
        """

    @abstractmethod
    def as_lora(self, source: Source, params: Params) -> tuple[Tensor, Tensor] | None:
        """`A [rank, in]` and `B [out, rank]` of the ordinary LoRA that does the same at the same scaling.

        None if there is none, since the quantizer itself has trained.
        """

    @abstractmethod
    def dense(self, source: Source, params: Params, scaling: float) -> Tensor:
        """The matrix that forward computes with, adapter included, float32 `[out, in]`."""

    @abstractmethod
    def untrained(self, source: Source, params: Params, scaling: float) -> QuantWeight:
        """The quantized matrix from before the first step."""

    def begin(self, params: Params, up: Tensor, down: Tensor) -> None:
        """Set in place the factors that a start has fitted, which train from there, and are kept as they were.

        Args:
            params: With `FIRST`.
            up: `[out, rank]`, divided by the root of the scaling.
            down: `[rank, in]`, likewise.
        """
        for names, value in zip((("A", FIRST[0]), ("B", FIRST[1])), (down, up), strict=True):
            for name in names:
                params[name].copy_(value)

    def first(self, params: Params) -> Params | None:
        """Parameters from before training, for adapters that kept first factors.

        None for all others: before training the layer was what it is without them.
        """
        if FIRST[0] not in params:
            return None
        return {"A": params[FIRST[0]], "B": params[FIRST[1]]}

    # --- side by side with others (`stacks`) ---

    def acting(self, params: Params) -> Params:
        """The parameters to compute with, differentiable in those that are stored.

        Those that have been worked into others are left out. All methods take what is stored, and what acts as well.
        """
        return params

    def side(self, x: Tensor, y: Tensor, source: Source, params: Params, scaling: float, dropout: Dropout) -> Tensor:
        """`y [.., out]` plus what a side branch adds to it for inputs `x [.., in]`, of which it sees `dropout(x)`."""
        return y

    def keep(self, layout: Layout, pooled: Tensor, params: Params, needed: frozenset[str]) -> Tensor:
        """What :meth:`gradients` needs of the inputs, which are kept for backward summed over groups.

        Args:
            layout: Of the matrix.
            pooled: `[tokens, groups]`.
            params: As :meth:`acting` gives them.
            needed: Names of the parameters whose gradients are wanted.
        """
        return pooled

    def gradients(
        self, layout: Layout, params: Params, scaling: float, dy: Tensor, kept: Tensor, needed: frozenset[str]
    ) -> Params:
        """Gradients, by name, of the parameters that move offsets in the merged form (straight through rounding).

        Args:
            layout: Of the matrix.
            params: As :meth:`acting` gives them.
            scaling: alpha / rank.
            dy: Gradient of the output, `[tokens, out]`.
            kept: What :meth:`keep` gave.
            needed: Names of the parameters whose gradients are wanted.
        """
        return {}

    # --- steps before it quantizes (`base = "float"`) ---

    def dense_step(self, x: Tensor, y: Tensor, params: Params, scaling: float) -> Tensor:
        """Output of the first steps, in which nothing is quantized yet: `y [.., out]` is the dense layer's."""
        return add_low_rank(y, x, params["A"], params["B"], scaling) if "A" in params else y

    def begin_with(self, grid: Tensor, params: Params) -> None:  # noqa: B027 - those of `takes_grid` alone have one
        """Set in place a first grid that a rounding has chosen: scales and middles, float32 `[2, out, groups]`."""

    def begin_quantizing(self, source: Source, params: Params, scaling: float) -> None:  # noqa: B027 - few have any
        """Set in place what begins with the matrix, from the one that those first steps have arrived at."""


@dataclass(frozen=True)
class Part:
    """An adapter at work in a layer."""

    adapter: Adapter
    """The adapter that is at work."""

    params: Params
    """The parameters of the adapter in this layer, by name."""

    scaling: float
    """The factor of what the adapter adds, which is `alpha / rank`."""

    dropout: Dropout = same
    """On the input of its side branch."""


def check_offsets(kind: str, layout: Layout) -> None:
    """Raise ConfigError if an adapter of this kind, which moves offsets, trains over scales that have none beside."""
    if layout.storage.of_scales.signed:
        raise ConfigError(
            f"scales={layout.storage.scales!r}: the {kind} adapter moves offsets, and this type of llama.cpp has none. "
            "Use --method l4q, lr-qat or peqa, which train its scales, or 2, 4 or 5 bits"
        )


# --- what many declare ------------------------------------------------------------------------------------------------


def kaiming(tensor: Tensor, _: Source) -> None:
    """Fill `A` as LoRA's authors do: uniform in `+-1 / sqrt(inputs)`."""
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def xavier(tensor: Tensor, _: Source) -> None:
    """Fill `A` as QA-LoRA's authors do: uniform in `+-sqrt(6 / (rank + inputs))`."""
    nn.init.xavier_uniform_(tensor)


def zeros(tensor: Tensor, _: Source) -> None:
    """Zero: at first it does nothing."""
    nn.init.zeros_(tensor)


def low_rank(
    layout: Layout, inputs: int, rank: int, init: Init = kaiming, *, started: bool = False
) -> dict[str, Param]:
    """`A [rank, inputs]` and `B [out, rank]`, which is zero; with frozen first factors of the same shapes if asked."""
    shapes = (rank, inputs), (layout.out, rank)
    trained = {"A": Param(shape=shapes[0], init=init), "B": Param(shape=shapes[1], init=zeros)}
    first = {
        name: Param(shape=shape, init=zeros, trains=False, serves=False)
        for name, shape in zip(FIRST, shapes, strict=True)
    }
    return {**trained, **first} if started else trained


@dataclass(frozen=True, kw_only=True)
class LowRank(Adapter):
    """An adapter with real-valued low-rank factors, of which `A` begins random and `B` at zero."""

    init_scale: Positive = setting(panel="Adapter", default=1.0)
    """What the random values at which A begins are multiplied by: since B begins at zero, the larger A is, the more the
    first steps of B do."""

    def low_rank(
        self, layout: Layout, inputs: int, rank: int, init: Init = kaiming, *, started: bool = False
    ) -> dict[str, Param]:
        """What :func:`low_rank` declares, with an `A` that begins as `init` fills it, times `init_scale`."""
        if self.init_scale == 1:
            return low_rank(layout, inputs, rank, init, started=started)

        def scaled(tensor: Tensor, source: Source) -> None:
            init(tensor, source)
            tensor.mul_(self.init_scale)

        return low_rank(layout, inputs, rank, scaled, started=started)


def add_low_rank(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`y + scaling * x A^T B^T` in the dtype of `y`; parameters are cast, inputs and outputs are not.

    Backward needs `x` for the gradient of `A` alone: with `A` frozen, `x A^T` is all that is kept.
    """
    hidden = torch.nn.functional.linear(x, lora_A.to(x.dtype))
    rows = torch.addmm(
        y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), lora_B.to(y.dtype).T, alpha=scaling
    )
    return rows.view(y.shape)
