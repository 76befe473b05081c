"""The one stored form of a quantized weight matrix.

    W[o, i] = scales[o, g] * levels[codes[o, i]] + offsets[o, g],    g = perm[i] // group_size

The product is rounded to float32 before the sum, and the sum once to the dtype asked for: this order of operations is
part of the form, and every kernel keeps it. Offsets are additive floats for integers and NormalFloat alike, so that one
merge rule (`offsets += scaling * B @ A`) serves both; zero-points in units of codes would need a subtraction and a
division, and could not carry NormalFloat.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from quadapt import kernels
from quadapt.errors import ShapeError
from quadapt.kernels.reference import rows_per_chunk
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage

T = TypeVar("T")

Name = Literal["scales", "offsets"]
SCALES_AND_OFFSETS: tuple[Name, Name] = ("scales", "offsets")
"""The two kinds of numbers that a weight has for each group, by the names of their tensors."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything about a quantized matrix but its tensors: hashable, and small enough for a checkpoint's config."""

    format: Format
    """The grid: which values a weight may take."""

    storage: Storage
    """How scales and offsets are held."""

    out: int
    """How many rows (output features) the matrix has."""

    columns: int
    """How many columns (input features) the matrix has."""

    permuted: bool = False
    """Whether an input permutation is stored (imported act-order models)."""

    def __post_init__(self) -> None:
        if not all(type(size) is int and size > 0 for size in (self.out, self.columns)):
            raise ShapeError(
                f"a weight of {self.out} rows and {self.columns} columns cannot be quantized. Skip the layer"
            )

    @staticmethod
    def fitting(format: Format, storage: Storage, out: int, columns: int) -> Layout:
        """The layout of a layer for which such a grid is wanted, or what takes its place (:meth:`Storage.fitting`)."""
        format, storage = storage.fitting(format, columns)
        return Layout(format=format, storage=storage, out=out, columns=columns)

    @property
    def name(self) -> str:
        """The short name of the grid that reports use: `int4-g32`, `nf4-g64`, `int4-q4k`."""
        return self.storage.label(self.format)

    @cached_property
    def groups(self) -> int:
        """How many groups a row has."""
        return self.format.groups(self.columns)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every tensor of the stored form, in a fixed order; all are uint8, but `perm` is int32.

        Eight-bit codes have a third axis of one: a loader that does not know this form must fail on the shape of
        `weight`, and at eight bits only that axis tells it from the dense matrix.
        """
        return _shapes(self)  # shared by all equal layouts; and found again without asking whether they are equal

    @cached_property
    def _with_offsets(self) -> dict[str, Layout]:
        """Layouts with other offsets, by the storage of these: a training step asks for one again and again."""
        return {}

    def with_offsets(self, storage: str) -> Layout:
        """This layout with float offsets, held in `storage`."""
        if storage not in self._with_offsets:
            format, both = replace(self.format, zero="float"), replace(self.storage, offsets=storage)
            self._with_offsets[storage] = replace(self, format=format, storage=both)
        return self._with_offsets[storage]

    @property
    def bits(self) -> int:
        """How many bits are stored, second-level constants and permutation included."""
        sizes = {name: math.prod(shape) * (4 if name == "perm" else 1) for name, shape in self.shapes.items()}
        return 8 * sum(sizes.values())

    @property
    def bits_per_weight(self) -> float:
        """How many bits are stored for each weight, all of `bits` counted."""
        return self.bits / (self.out * self.columns)


def from_fields(cls: type[T], fields: Mapping[str, Any]) -> T:
    """Make a format or storage of the fields that were written: all of them, since no default may stand in for one.

    Raises:
        TypeError: One is missing or unknown.
    """
    missing = [name for name in cls.__dataclass_fields__ if name not in fields]  # type: ignore[attr-defined]
    if missing:
        raise TypeError(f"{cls.__name__.lower()} lacks {', '.join(missing)}")
    return cls(**fields)


@cache
def _shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    row = layout.format.row_bytes(layout.columns)
    shapes: dict[str, tuple[int, ...]] = {
        "weight": (layout.out, row, 1) if layout.format.bits == 8 else (layout.out, row)
    }
    for name in SCALES_AND_OFFSETS:
        for suffix, shape in layout.storage.of(name).shapes(layout.out, layout.groups).items():
            shapes[name + suffix] = shape
    if layout.permuted:
        shapes["perm"] = (layout.columns,)
    return shapes


@dataclass(frozen=True, eq=False)
class QuantWeight:
    """A quantized weight matrix: a layout and its tensors.

    The tensors are never changed in place; what changes a weight returns a new one.
    """

    layout: Layout
    """The format, the storage and the shape of the matrix."""

    tensors: Mapping[str, Tensor] = field(repr=False)
    """`weight`: packed codes, uint8 `[out, ceil(in * bits / 8)]`, stored in group order. `scales`, `offsets` and their
    second-level constants: bytes of numbers, see `quant/storage/`. `perm`: int32 `[in]`, the position of each input in
    the row."""

    def __post_init__(self) -> None:
        want, tensors = self.layout.shapes, self.tensors
        if tensors.keys() != want.keys() or any(tensors[name].shape != shape for name, shape in want.items()):
            have = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ShapeError(f"tensors {have} do not fit {self.layout.format.name}: expected {want}")

    @staticmethod
    def build(
        layout: Layout, packed: Tensor, scales: Tensor, offsets: Tensor | None, perm: Tensor | None = None
    ) -> QuantWeight:
        """Store packed codes, and scales and offsets `[out, groups]` (zero-points, for `zero="integer"`)."""
        tensors = {"weight": packed.view(layout.shapes["weight"])}
        for name, values in zip(SCALES_AND_OFFSETS, (scales, offsets), strict=True):
            if values is not None:
                for suffix, tensor in layout.storage.of(name).encode(values, centre=name == "scales").items():
                    tensors[name + suffix] = tensor
        if perm is not None:
            tensors["perm"] = perm.to(torch.int32)
        return QuantWeight(layout, tensors)

    @property
    def format(self) -> Format:
        """The grid: which values a weight may take."""
        return self.layout.format

    def _stored(self, name: Name) -> tuple[dict[str, Tensor], tuple[int, int]]:
        """The tensors of scales or offsets by suffix, and the shape of the numbers that they hold."""
        tensors = {suffix: self.tensors[name + suffix] for suffix in self.layout.storage.of(name).suffixes}
        return tensors, (self.layout.out, self.layout.groups)

    def held(self, name: Name) -> list[Tensor]:
        """Scales or offsets in the form in which they are held, which `kernels.product` takes."""
        return self.layout.storage.of(name).held(*self._stored(name))

    @property
    def scales(self) -> Tensor:
        """The scale of each group, decoded to float32 `[out, groups]`."""
        return self.layout.storage.of_scales.decode(*self._stored("scales"))

    @property
    def offsets(self) -> Tensor | None:
        """The offset of each group, float32 `[out, groups]`: stored, or implied by the format; None if all are zero."""
        storage = self.layout.storage.of_offsets
        if storage.implied:
            return None if self.format.levels != "int" else -self.scales * 2 ** (self.format.bits - 1)
        values = storage.decode(*self._stored("offsets"))
        return values if storage.free else -self.scales * values

    def operand(self, name: Name) -> Tensor | None:
        """Scales or offsets in the form that `kernels.dequantize` takes: bytes of floats where they are stored so."""
        if self.layout.storage.of(name).is_float:
            return self.held(name)[0]
        return self.scales if name == "scales" else self.offsets

    @property
    def packed(self) -> Tensor:
        """The packed codes, uint8 `[out, ceil(in * bits / 8)]`."""
        return self.tensors["weight"].flatten(1)

    def codes(self) -> Tensor:
        """The code of each weight, uint8 `[out, in]`, with inputs in the layer's own order."""
        return self.layer_order(kernels.unpack(self.packed, self.format.bits, self.layout.columns))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight matrix, `[out, in]` in `dtype`, with inputs in the layer's own order."""
        return self.layer_order(self.decode(self.operand("offsets"), dtype))

    def decode(self, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Dequantize in stored order, with offsets that may be other than the stored ones (in training)."""
        columns = self.layout.columns
        width, table = self.format.width(columns), self.format.table(self.packed)
        scales = self.operand("scales")
        assert scales is not None
        return kernels.dequantize(self.packed, scales, offsets, table, self.format.bits, width, columns, dtype)

    def layer_order(self, columns: Tensor) -> Tensor:
        """Bring columns `[.., in]` from stored order into the layer's own."""
        return columns[..., self.tensors["perm"].long()] if self.layout.permuted else columns

    def stored_order(self, columns: Tensor) -> Tensor:
        """Bring columns (or inputs) `[.., in]` into the order in which codes are stored."""
        if not self.layout.permuted:
            return columns
        return torch.empty_like(columns).index_copy(-1, self.tensors["perm"].long(), columns)

    @property
    def nbytes(self) -> int:
        """How many bytes all stored tensors take."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())

    def with_offsets(self, offsets: Tensor, storage: str) -> QuantWeight:
        """A weight with the same codes, and other offsets (float32 `[out, groups]`) in `storage` (fp16 or fp32)."""
        layout = self.layout.with_offsets(storage)
        kept = {name: tensor for name, tensor in self.tensors.items() if name in layout.shapes and name != "offsets"}
        encoded = layout.storage.of_offsets.encode(offsets, centre=False)
        moved = {"offsets" + suffix: tensor for suffix, tensor in encoded.items()}
        return QuantWeight(layout, {name: {**kept, **moved}[name] for name in layout.shapes})

    def digest(self) -> str:
        """SHA-256 over layout and bytes: two weights with equal digests are the same model."""
        state = hashlib.sha256(json.dumps(asdict(self.layout), sort_keys=True).encode())
        for name in self.layout.shapes:
            state.update(name.encode())
            hash_tensor(state, self.tensors[name])
        return state.hexdigest()


def hash_tensor(state: hashlib._Hash, tensor: Tensor) -> None:
    """Feed the bytes of a tensor to a hash; by address, since `.numpy()` would pin a parameter's storage (cpu.py)."""
    tensor = tensor.detach().contiguous().cpu()
    if tensor.numel():
        state.update((ctypes.c_char * (tensor.numel() * tensor.itemsize)).from_address(tensor.data_ptr()))


def largest_move(weight: QuantWeight, before: Tensor, after: Tensor) -> float:
    """How far a weight differs at most between `before` and `after` (both `[out, in]`), in steps of `weight`.

    A step is the distance of neighbouring levels times the scale; for a table, that of the two closest levels.
    """
    table, columns = weight.format.table(before), weight.layout.columns
    gap = 1.0 if table is None else float(table.unique().diff().min())
    worst, chunk = 0.0, rows_per_chunk(columns)
    for scales, old, new in zip(weight.scales.split(chunk), before.split(chunk), after.split(chunk), strict=True):
        steps = weight.layer_order(kernels.expand(gap * scales.abs(), weight.format.width(columns), columns))
        moved = (new.to(old.device).float() - old).abs() / steps
        worst = max(worst, float(torch.where(steps > 0, moved, 0).max()))
    return worst
