"""What every format that is read answers, and the registry in which each is known by the name that its folders have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from quadapt import kernels
from quadapt.errors import CheckpointError, ShapeError
from quadapt.quant.format import WHOLE_ROW, Format, Levels
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.registry import Registry

Parts = Mapping[str, Tensor]
"""The tensors of one layer in a file, by what follows the layer's name and a dot: `qweight`, `weight.absmax`."""

IMPORTERS: Registry[type[Importer]] = Registry("importer", "quadapt.importers")
"""Every format that can be read, by the name that `quant_method` in its folders has; entry points of the group
`quadapt.importers` add theirs."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that scales may have in a file."""

WIDEST_GROUP = 256
"""The largest group of the stored form. A larger one is held as several that have the same scale."""


class Importer(BaseModel, ABC):
    """A format, with what the folder of a model says about itself: each field of the class is read from there.

    What a folder says is checked against its tensors, which decide. A new format is a class in a file of its own in
    this package, or in another package that names it under the entry points `quadapt.importers`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: ClassVar[str]
    """The name of the format, as its folders have it; registering the class sets it."""

    summary: ClassVar[str]
    """A line about the format for tables: what is read, and from whom."""

    parts: ClassVar[tuple[str, ...]]
    """The tensors that every layer has. The first one tells which layers are quantized."""

    optional: ClassVar[tuple[str, ...]] = ()
    """Further tensors that belong to a layer, if they are there."""

    config_fields: ClassVar[tuple[str, ...]] = ("quantization_config",)
    """The fields of config.json that speak of the format; the model's configuration in memory is without them."""

    settings_file: ClassVar[str] = ""
    """The file in which earlier writers of the format put what stands in config.json today; empty if there is none."""

    dtype: ClassVar[str] = "auto"
    """The dtype of computation, and of what is not quantized, if none is asked for."""

    @classmethod
    def found(cls, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What a folder says about its quantization, if its `config.json` says that it has this format; else None."""
        about = config.get("quantization_config")
        return about if isinstance(about, Mapping) and about.get("quant_method") == cls.name else None

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Importer:
        """An importer for a folder that says this about itself (`quantization_config`).

        Raises:
            CheckpointError: It says something that is not understood; the message has the field and what is allowed.
        """
        try:
            return cls.model_validate(dict(about))
        except ValidationError as error:
            wrong = error.errors()[0]
            field = ".".join(map(str, wrong["loc"]))
            raise CheckpointError(
                f"quantization_config: {field}={wrong['input']!r:.60} of a checkpoint by {cls.name} is not understood "
                f"({wrong['msg']}). Correct it in config.json, or give the dense model"
            ) from error

    @abstractmethod
    def layout(self, parts: Parts, out: int, columns: int) -> Layout:
        """The layout of a layer of `out` rows and `columns` inputs. It may read small tensors, but no codes.

        Raises:
            CheckpointError: The tensors contradict each other, the model, or what the folder says.
            ShapeError: The stored form cannot hold the layer.
        """

    @abstractmethod
    def weight(self, parts: Parts, layout: Layout) -> QuantWeight:
        """The layer in the stored form, with the very numbers of the file."""

    def dense(self, parts: Parts, out: int, columns: int) -> Tensor:
        """The numbers of a matrix that is not held as codes: an embedding of `out` rows.

        By default float32, as the stored form means them.
        """
        return self.weight(parts, self.layout(parts, out, columns)).dequantize()


class FileImporter(Importer):
    """A format of which one file is a whole checkpoint, with all that is known of its model."""

    suffix: ClassVar[str]
    """The ending of such files."""

    @classmethod
    @abstractmethod
    def of_file(cls, path: Path) -> Importer:
        """An importer for a file.

        Raises:
            CheckpointError: The stored form does not hold it as it is; the message says why.
        """

    @abstractmethod
    def tensors(self, path: Path, model: Any) -> Mapping[str, Tensor]:
        """All tensors of a file by the names that they have in the model (on the meta device)."""

    @abstractmethod
    def completed(self, path: Path, config: Any) -> Any:
        """A configuration of transformers', with what transformers has not read of the file; never changed itself."""


def grid(  # noqa: PLR0913 - all that a layout is made of
    *,
    out: int,
    columns: int,
    bits: int,
    width: int,
    zero: str,
    scales: torch.dtype,
    levels: Levels = "int",
    permuted: bool = False,
    offsets: torch.dtype | None = None,
) -> Layout:
    """A layout for numbers that lie in a file.

    Args:
        out: Rows of the matrix.
        columns: Inputs of the matrix.
        bits: Width of a code.
        width: Inputs that share a scale; `columns` or more for whole rows.
        zero: none, integer, or float, as :attr:`Format.zero`.
        scales: The dtype of the scales in the file. bfloat16 is held as float32.
        levels: The levels, as :attr:`Format.levels`.
        permuted: Whether inputs are permuted.
        offsets: The dtype of float offsets in the file, if it is another than that of the scales.

    Raises:
        ShapeError: The stored form has no groups of that width.
    """
    if width >= columns:
        size = WHOLE_ROW
    elif width > WIDEST_GROUP and width % WIDEST_GROUP == 0:
        size = WIDEST_GROUP
    elif width % 16 or not 16 <= width <= WIDEST_GROUP:
        raise ShapeError(
            f"has groups of {width} inputs, and groups of 16, 32, .. 256, and multiples of 256 can be held. Give the "
            "dense model"
        )
    else:
        size = width
    format = Format(levels=levels, bits=bits, group_size=size, zero=zero)  # type: ignore[arg-type]  # checked by it
    storage = Storage.floating(_floats(scales), zero)
    if zero == "float" and offsets is not None:
        storage = Storage(scales=_floats(scales), offsets=_floats(offsets))
    return Layout(format=format, storage=storage, out=out, columns=columns, permuted=permuted)


def _floats(dtype: torch.dtype) -> str:
    """The storage that holds all floats of a dtype as they are."""
    return "fp16" if dtype == torch.float16 else "fp32"


def width_of(columns: int, groups: int, said: int | None) -> int:
    """How many inputs a group has, if a row of `columns` has `groups` of them and the folder says `said`.

    Raises:
        CheckpointError: That does not fit.
    """
    if groups == 1:
        return columns
    wide = said if said is not None and said > 0 else -(-columns // groups)
    if -(-columns // wide) != groups:
        raise CheckpointError(
            f"has {groups} groups for {columns} inputs, and group_size={said} by quantization_config. Correct it in "
            "config.json"
        )
    return wide


def by_group(values: Tensor, layout: Layout, width: int) -> Tensor:
    """Numbers `[out, groups of the file]` as `[out, groups of the layout]`, where one group may be held as several.

    Args:
        values: A number for each group of the file.
        layout: The layout of the layer.
        width: Inputs of a full group of the file, a multiple of those that the layout has.
    """
    repeats = width // layout.format.width(layout.columns)
    return values.repeat_interleave(repeats, dim=1)[:, : layout.groups]


def offsets_of(zeros: Tensor, scales: Tensor, middle: int = 0) -> tuple[Tensor, torch.dtype]:
    """The offsets that zero-points of floats mean, and the dtype that holds them.

    An offset of float16 that was divided by its scale, for a file of zero-points, comes back but for the rounding of
    the quotient. Where this is so of all groups, the offsets are those of float16.

    Args:
        zeros: Zero-points in steps, floats `[out, groups]`.
        scales: Scales, floats `[out, groups]`.
        middle: The code from which zero-points are counted.

    Returns:
        float32 `[out, groups]`, and float16 or float32.
    """
    steps, scales = zeros.double() + middle, scales.double()
    offsets = -steps * scales
    near, slack = offsets.half(), 2**-23 * (zeros.double().abs() + steps.abs()) * scales.abs()
    if bool(((near.double() - offsets).abs() <= slack).all()):
        return near.float(), torch.float16
    return offsets.float(), torch.float32


def permutation(group_of: Tensor, width: int) -> Tensor | None:
    """The position of each input in a row whose groups are contiguous; None if they are contiguous already.

    Args:
        group_of: The group of each input, integers `[in]` (`g_idx`).
        width: Inputs of a full group.

    Returns:
        int32 `[in]`, or None.

    Raises:
        CheckpointError: The groups are not of that width.
    """
    groups = torch.arange(group_of.numel()) // width
    if torch.equal(group_of.long(), groups):
        return None
    order = torch.argsort(group_of.long(), stable=True)
    if not torch.equal(group_of.long()[order], groups):
        raise CheckpointError(f"has a g_idx that does not put {width} inputs into each group. The file is damaged")
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel())
    return position.to(torch.int32)


def packed_rows(codes: Tensor, bits: int, position: Tensor | None = None) -> Tensor:
    """Codes `[out, in]`, uint8 in the layer's own order, packed as they are stored.

    Args:
        codes: Codes, uint8.
        bits: Width of a code.
        position: The position of each input in the row, if inputs are permuted.
    """
    if position is not None:
        codes = torch.empty_like(codes).index_copy(1, position.long(), codes)
    return kernels.pack(codes.contiguous(), bits)


def expect(parts: Parts, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> Tensor:
    """A tensor of a layer, if it has one of these dtypes and this shape (None: any size).

    Raises:
        CheckpointError: It is another one.
    """
    tensor = parts[name]
    fits = tensor.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype in dtypes and fits:
        return tensor
    have = f"{str(tensor.dtype).removeprefix('torch.')} {' x '.join(map(str, tensor.shape))}"
    want = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    sizes = " x ".join("?" if size is None else str(size) for size in shape)
    raise CheckpointError(
        f"{name}: is {have}, where {want} {sizes} belongs. The file is damaged, or was packed by something that is not "
        "known here. Give the dense model"
    )
