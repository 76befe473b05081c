"""Offsets for which a type of blocks has no room, as a LoRA in a GGUF file beside the model's.

GGML has no type of eight bits with offsets. But `s * (q - middle)` is Q8_0, and what is missing,
`b + middle * s` for every weight of a group, is a product of two matrices: one that sums the inputs of each group, and
one that has this number for each row and group. llama.cpp computes it in float32, as any LoRA, so that nothing is
rounded but the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from quadapt.exporters.gguf_entries import Entry, Stack, pieces_of, stacked
from quadapt.exporters.gguf_lora import write_lora
from quadapt.exporters.report import TensorRow
from quadapt.kernels import expand
from quadapt.quant.weight import Layout, QuantWeight


def offsets_file(path: Path) -> Path:
    """Where the offsets of a GGUF file go that it has no room for."""
    return path.with_name(f"{path.stem}-offsets.gguf")


def write_offsets(path: Path, arch: str, entries: Sequence[Entry | Stack]) -> list[TensorRow]:
    """Write the offsets that the types of some entries lack; returns the rows of the file.

    Args:
        path: The file.
        arch: The name of the model's architecture in GGUF files.
        entries: All of the model's.
    """
    pieces = [piece for entry in entries if lacks_offsets(entry) for piece in pieces_of(entry)]
    factors = stacked([each for piece in pieces for each in (_sums(piece), _offsets(piece))], "F32")
    write_lora(path, arch, 0.0, factors)  # an alpha of zero means a scaling of one, whatever the rank
    return [factor.row for factor in factors]


def lacks_offsets(entry: Entry | Stack) -> bool:
    """Whether the type of an entry has no room for offsets that it has."""
    return any(piece.aside for piece in pieces_of(entry))


@dataclass(frozen=True)
class _Sums(Entry):
    """The matrix that sums the inputs of each group: `[groups, in]` of zeros and ones."""

    def data(self) -> np.ndarray:
        layout = _layout(self)
        ones = torch.eye(layout.groups, dtype=torch.float16)
        return expand(ones, layout.format.width(layout.columns), layout.columns).numpy()


@dataclass(frozen=True)
class _Offsets(Entry):
    """What is missing, `[out, groups]`: zeros for a matrix that its type holds whole."""

    def data(self) -> np.ndarray:
        layout = _layout(self)
        held = replace(self, row=replace(self.row, type="Q8_0")).held()
        found = torch.zeros(layout.out, layout.groups) if held is None or held.aside is None else held.aside
        rows = found.cpu().numpy()
        return rows if self.order is None else rows[self.order]


def _layout(entry: Entry) -> Layout:
    assert isinstance(entry.source, QuantWeight)
    return entry.source.layout


def _sums(entry: Entry) -> Entry:
    layout = _layout(entry)
    size = 2 * layout.groups * layout.columns
    row = TensorRow(
        name=f"{entry.row.name}.lora_a", type="F16", shape=(layout.groups, layout.columns), nbytes=size, linear=False
    )
    return _Sums(row, entry.source)


def _offsets(entry: Entry) -> Entry:
    layout = _layout(entry)
    size = 4 * layout.out * layout.groups
    row = TensorRow(name=f"{entry.row.name}.lora_b", type="F32", shape=(layout.out, layout.groups), nbytes=size)
    return _Offsets(row, entry.source, entry.order, entry.choice)
