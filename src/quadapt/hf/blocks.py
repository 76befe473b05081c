"""Finished blocks on disk, so that quantizing can be stopped at any point and gone on with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quadapt.files import writing
from quadapt.model.layer import LayerRow
from quadapt.model.quantize import Done
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight, from_fields

_FACTORS = ("start_up", "start_down")
_PAIRS = ("block_error", "start_error")


class BlockFiles:
    """A :class:`quadapt.model.quantize.Keeper` that keeps each block in a file and hands back tensors mapped from it.

    Args:
        folder: Made if it does not exist. A damaged or half-written file counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def _file(self, unit: str) -> Path:
        return self.folder / f"{unit.replace(' ', '_')}.safetensors"

    def find(self, unit: str) -> Done | None:
        """The block, if an earlier run finished it."""
        try:
            return self._read(self._file(unit))
        except (OSError, SafetensorError, TypeError, KeyError, ValueError, AttributeError, RecursionError):
            return None

    def keep(self, unit: str, done: Done) -> Done:
        """Write the block under a temporary name, rename, and map it back: the copy in memory can go."""
        target = self._file(unit)
        tensors = {
            f"{name}.{part}": tensor.cpu()
            for name, weight in done.weights.items()
            for part, tensor in weight.tensors.items()
        }
        for name, factors in done.factors.items():
            tensors |= {
                f"{name}.{part}": factor.cpu().contiguous() for part, factor in zip(_FACTORS, factors, strict=True)
            }
        about = {
            "layouts": json.dumps({name: asdict(weight.layout) for name, weight in done.weights.items()}),
            "rows": json.dumps([asdict(row) for row in done.rows]),
            "factors": json.dumps(list(done.factors)),
        }
        with writing(target) as temporary:
            save_file(tensors, temporary, metadata=about)
        return self._read(target)

    def _read(self, path: Path) -> Done:
        weights = {}
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            for name, fields in json.loads(about["layouts"]).items():
                layout = Layout(
                    **{
                        **fields,
                        "format": from_fields(Format, fields["format"]),
                        "storage": from_fields(Storage, fields["storage"]),
                    }
                )
                weights[name] = QuantWeight(layout, {part: file.get_tensor(f"{name}.{part}") for part in layout.shapes})
            factors = {
                name: (file.get_tensor(f"{name}.{_FACTORS[0]}"), file.get_tensor(f"{name}.{_FACTORS[1]}"))
                for name in json.loads(about["factors"])
            }
        return Done(weights, [_row(row) for row in json.loads(about["rows"])], factors)


def _row(fields: dict[str, Any]) -> LayerRow:
    """A row as it was: JSON makes lists of tuples."""
    return LayerRow(**{**fields, **{name: tuple(fields[name]) for name in _PAIRS if fields[name] is not None}})
