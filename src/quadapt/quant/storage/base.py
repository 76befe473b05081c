"""What every storage of numbers answers, and the registry in which each is known by its name on disk."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from quadapt.registry import Registry

if TYPE_CHECKING:
    from quadapt.quant.format import Format

STORAGES: Registry[ValueStorage] = Registry("storage", "quadapt.quant.storage")
"""Every way to hold scales or offsets, by its name on disk; entry points of the group `quadapt.storages` add theirs."""

V = TypeVar("V", bound="ValueStorage")


def register(storage: V) -> V:
    """Make a storage known by its own name, and give it back.

    Raises:
        ConfigError: Another storage has that name.
    """
    return STORAGES.register(storage.name)(storage)


class ValueStorage(ABC):
    """How the scales of one weight matrix, or its offsets, are held: one number for each group, `[out, groups]`.

    A storage is made once, registered by :func:`register`, and never changes. What it stores is uint8 tensors, keyed by
    the suffix of their name: `""` is the main one (`scales`), `"_absmax"` is stored as `scales_absmax`.
    """

    summary: ClassVar[str]
    """A line about the storage for tables: what is stored, and at what cost."""

    zero: ClassVar[Literal["none", "integer", "float"]] = "float"
    """Which offsets it can hold, in the words of :attr:`Format.zero`: none at all, whole numbers of steps, or any."""

    for_scales: ClassVar[bool] = True
    """Whether this storage can hold scales."""

    for_offsets: ClassVar[bool] = True
    """Whether this storage can hold offsets."""

    suffixes: ClassVar[tuple[str, ...]] = ("",)
    """The suffixes of the tensors that it makes, in the order in which they are stored."""

    signed: ClassVar[bool] = False
    """Whether scales may be negative, where the levels are symmetric integers: the level that is one more then goes to
    a group's largest weight, whatever its sign."""

    never_positive: ClassVar[bool] = False
    """Whether offsets that it holds are zero or below: a group's range then reaches down to zero at least."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of this storage in settings and in a checkpoint's config: `fp16`, `linear8-256-fp32`."""

    @property
    def spelling(self) -> str:
        """How its name is spelled, for messages that list what there is; one for all that differ in settings alone."""
        return self.name

    @property
    def together(self) -> int | None:
        """How many neighbouring groups of a row are stored together, on whose numbers a stored one depends.

        1: each by itself. None: all of the matrix, so that a rounding which chooses scales as it goes cannot know what
        will be stored.
        """
        return None

    @property
    def shared(self) -> int:
        """How many neighbouring groups of a row have one and the same number, which is chosen for all of them."""
        return 1

    @property
    def local(self) -> bool:
        """Whether each number is stored by itself."""
        return self.together == 1

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the plain floats that are held, float16 or float32, which kernels read as they are; else None.

        Numbers of a storage whose dtype is None have to be decoded first.
        """
        return None

    @property
    def is_float(self) -> bool:
        """Whether it holds plain floats, which kernels read and training writes."""
        return self.dtype is not None

    @property
    def free(self) -> bool:
        """Whether it can hold any offset, so that training and merging may move offsets and store them so again."""
        return self.zero == "float"

    @property
    def implied(self) -> bool:
        """Whether nothing is stored, since the format implies the numbers."""
        return self.zero == "none"

    @property
    def beside(self) -> str | None:
        """The name of the storage that holds float offsets beside such scales, if nothing else is said; None if none.

        By default its own, if that is for offsets.
        """
        return self.name if self.for_offsets else None

    @property
    def alone(self) -> str:
        """The name of the storage that holds such offsets beside scales which say nothing of offsets."""
        return self.name

    @property
    def trained(self) -> str:
        """The name of the storage that holds these numbers once they train: plain floats, or this one itself."""
        return "fp32" if self.dtype == torch.float32 else "fp16"

    @property
    def widest(self) -> str:
        """The storage that takes its place where it is too narrow: fp32, or itself if it holds no free numbers."""
        return "fp32" if self.free else self.name

    @property
    def family(self) -> str | None:
        """The one word by which settings choose among storages that differ in settings alone, or by the width of codes.

        None where settings have the storage's own name.
        """
        return None

    def serves(self, bits: int) -> bool:
        """Whether it is the one of its family that is meant for codes of `bits` bits."""
        return True

    @property
    def demands(self) -> dict[str, Any]:
        """Fields of a format that such scales determine, by name: `group_size`, `zero`."""
        return {}

    def shorter(self, format: Format, columns: int) -> tuple[Format, str] | None:
        """What takes the place of such scales in rows of `columns` inputs that they do not fit.

        Returns:
            The grid, and the name of the storage of its scales; None if they fit.
        """
        return None

    def label(self, format: Format) -> str:
        """The short name that reports use of a grid whose scales, and offsets if it has any, are held so."""
        return format.name

    def check(self, format: Format) -> None:  # noqa: B027 - most hold the numbers of any grid
        """Raise ConfigError if it does not hold the numbers of such a grid."""

    @abstractmethod
    def encode(self, values: Tensor, *, centre: bool) -> dict[str, Tensor]:
        """Turn numbers into the bytes that are stored.

        Args:
            values: Float `[out, groups]`.
            centre: Whether the mean may be taken off first: for scales, which all have one sign; not for offsets,
                among which zero must stay zero.

        Returns:
            uint8 tensors by suffix, with the shapes of :meth:`shapes`, on the device of `values`.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """What :meth:`encode` stored, as float32 `[out, groups]`, which is `shape`."""

    @abstractmethod
    def shapes(self, out: int, groups: int) -> dict[str, tuple[int, int]]:
        """Shapes of the uint8 tensors that hold `[out, groups]` numbers, by suffix."""

    def total_bits(self, out: int, groups: int) -> int:
        """Bits of all that is stored for `[out, groups]` numbers."""
        return 8 * sum(math.prod(shape) for shape in self.shapes(out, groups).values())

    def held(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> list[Tensor]:
        """What :meth:`encode` stored, as `kernels.product` takes it. By default decoded, as float32."""
        return [self.decode(tensors, shape)]

    def through(self, values: Tensor, *, centre: bool) -> Tensor:
        """What numbers `[out, groups]` are once they have been stored: float32."""
        return self.decode(self.encode(values, centre=centre), (values.shape[0], values.shape[1]))

    def rounded(self, values: Tensor) -> Tensor:
        """Numbers as they are once stored, in their own dtype; unchanged if all of the matrix is stored `together`.

        Args:
            values: Of any shape if each number is stored by itself; else `[rows, groups]`, in whole runs of `together`
                (the last run of a row may be shorter).
        """
        return values

    def above(self, values: Tensor) -> Tensor:
        """The least number that is held and not below each of `values`, which are positive; float32.

        Storages that hold all of a matrix `together` cannot say, and give `values`; those that hold super-blocks take
        `[rows, groups]`.
        """
        return values

    def snap(self, values: Tensor) -> Tensor:
        """Round as :meth:`rounded` does, with the gradient of no rounding at all (straight through)."""
        return _StraightThrough.apply(values, self) if self.together is not None else values

    def fits_scales(self, least: float, most: float) -> bool:
        """Whether scales from `least` to `most` are held well: none over the top, and none changed by over 1/64."""
        return True

    def fits_offsets(self, most: float) -> bool:
        """Whether offsets of an absolute value of up to `most` are held."""
        return True

    def exact_in(self, dtype: torch.dtype) -> bool:
        """Whether floats of `dtype` hold whatever this storage may hold. False says only that they may not."""
        return dtype == torch.float32


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, values: Tensor, storage: ValueStorage) -> Tensor:
        return storage.rounded(values)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def as_bytes(values: Tensor) -> Tensor:
    """The bytes of numbers, uint8 with as many times more columns as a number has bytes."""
    return values.contiguous().view(torch.uint8)
