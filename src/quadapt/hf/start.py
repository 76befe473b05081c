"""The factors that adapters start from, on disk between quantizing and training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quadapt.files import writing
from quadapt.hf.peft_layer import adapted_layers
from quadapt.hf.reading import reading

START = "start.safetensors"

GRIDS = "grids.safetensors"
"""The file of the first grids of adapters over dense matrices that begin with what a rounding gave."""


def write_start(path: Path, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write `up` and `down` of each layer under a temporary name, then rename."""
    tensors: dict[str, Tensor] = {}
    for name, (up, down) in factors.items():
        tensors |= {f"{name}.up": up.contiguous().cpu(), f"{name}.down": down.contiguous().cpu()}
    with writing(path) as temporary:
        save_file(tensors, temporary)


def read_start(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the factors that :func:`write_start` wrote.

    Raises:
        CheckpointError: It is damaged.
    """
    return dict(reading(str(path), _read, path))


def _read(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    with safe_open(path, framework="pt") as file:
        names = sorted({key.rpartition(".")[0] for key in file.keys()})  # noqa: SIM118 - a file, no dict
        return {name: (file.get_tensor(f"{name}.up"), file.get_tensor(f"{name}.down")) for name in names}


def write_grids(path: Path, grids: Mapping[str, Tensor]) -> None:
    """Write the first grid of each layer, float32 `[2, out, groups]`, under a temporary name, then rename."""
    with writing(path) as temporary:
        save_file({name: grid.contiguous().cpu() for name, grid in grids.items()}, temporary)


def read_grids(path: Path) -> dict[str, Tensor]:
    """Read the grids that :func:`write_grids` wrote.

    Raises:
        CheckpointError: It is damaged.
    """
    return dict(reading(str(path), load_file, path))


@torch.no_grad()
def set_grids(model: nn.Module, grids: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Give the adapters of a PEFT model over dense matrices their first grids."""
    for name, layer in adapted_layers(model).items():
        if name in grids:
            layer.adapters[adapter_name].begin_with(grids[name], layer.params(adapter_name))


def set_start(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], adapter_name: str = "default") -> None:
    """Give the adapters of a PEFT model their first factors."""
    for name, layer in adapted_layers(model).items():
        if name in factors and layer.adapters[adapter_name].begins == "factors":
            layer.begin(adapter_name, *factors[name])
