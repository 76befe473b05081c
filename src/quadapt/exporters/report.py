"""What an export wrote, and what it cost: for people to read and for the command line to print."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One tensor of the exported file."""

    name: str
    """The name of the tensor in the file."""

    type: str
    """How its numbers are held: F32, F16, BF16, or a type of GGML's blocks (Q4_1, ..)."""

    shape: tuple[int, ...]
    """The shape of the tensor, with rows first as in torch."""

    nbytes: int
    """How many bytes the numbers of the tensor take."""

    linear: bool = False
    """Whether it is the weight of a layer that is quantized in the model."""

    note: str = ""
    """What was done other than wished, and why."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote, and how large it is."""

    format: str
    """Name of the format, or gguf-lora for the adapter beside a GGUF file."""

    path: str
    """The path of the file or folder that was written."""

    bytes: int
    """Size of the file, or of all files in the folder."""

    tensors: tuple[TensorRow, ...]
    """Every tensor that was written, in the order of the file."""

    bits_per_weight: float
    """Bits per weight of the quantized layers, as exported; for an adapter, the bits that it adds to each of their
    weights."""

    notes: tuple[str, ...] = ()
    """In plain words, what one should know before serving it."""

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        rows = [{**asdict(row), "shape": list(row.shape)} for row in self.tensors]
        return {**asdict(self), "tensors": rows, "notes": list(self.notes)}


def bits_per_weight(rows: Iterable[TensorRow]) -> float:
    """Stored bits per weight of the quantized layers; 0 if there are none."""
    linear = [row for row in rows if row.linear]
    weights = sum(prod(row.shape) for row in linear)
    return 8 * sum(row.nbytes for row in linear) / weights if weights else 0.0


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
