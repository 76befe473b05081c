"""Folders that others have quantized: which format they have, and how a model of ours is made of them.

The files stay as they are. What transformers would load is put together in memory: the tensors of quantized layers in
the stored form, all others as they lie in the files; and a configuration that says so. From there on such a model is
like any other that quadapt has quantized, and an adapter may have the folder as its base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from quadapt.errors import CheckpointError, locate
from quadapt.hf.checkpoint import skeleton, stored_tensors, weight_files
from quadapt.hf.config import QuadaptConfig
from quadapt.hf.reading import read_json, reading
from quadapt.hf.stored_form import changes, names_in_model
from quadapt.importers import IMPORTERS, FileImporter, Importer, Parts
from quadapt.model.select import left_over
from quadapt.quant.weight import Layout


def one_file(path: Path) -> Path | None:
    """The file that is a whole checkpoint: a path itself, or the only one in a folder that says nothing of a model."""
    endings = tuple(importer.suffix for importer in IMPORTERS.values() if issubclass(importer, FileImporter))
    if path.is_file():
        return path if path.name.endswith(endings) else None
    if not path.is_dir() or (path / "config.json").exists() or (path / "adapter_config.json").exists():
        return None
    files = [each for each in path.iterdir() if each.name.endswith(endings)]
    return files[0] if len(files) == 1 else None


def importer_of(folder: Path) -> Importer | None:
    """What reads a folder, or a file; None if it is dense, by quadapt, or of a format that is not known here.

    Raises:
        CheckpointError: Its format is known, and it says something about it that is not understood.
    """
    for importer in IMPORTERS.values():
        if issubclass(importer, FileImporter) and folder.suffix == importer.suffix and folder.is_file():
            found: Importer = reading(str(folder), importer.of_file, folder)
            return found
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    for importer in IMPORTERS.values():
        about = importer.found(config)
        if about is None and "quantization_config" not in config and importer.settings_file:
            path = folder / importer.settings_file
            about = read_json(path) if path.exists() else None
        if about is not None:
            with locate(str(folder)):
                return importer.of(about)
    return None


class Files(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read when it is asked for: mapped from its file."""

    def __init__(self, folder: Path) -> None:
        self._pickled: dict[str, Tensor] = {}
        self._file_of: dict[str, Path] = {}
        for path in weight_files(folder):
            if path.suffix != ".safetensors":
                self._pickled = stored_tensors(folder)  # mapped
                break
            with safe_open(path, framework="pt") as file:
                self._file_of |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._pickled:
            return self._pickled[name]
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._pickled or self._file_of)

    def __len__(self) -> int:
        return len(self._pickled or self._file_of)


class Renamed(Mapping[str, Tensor]):
    """The tensors of a folder by the names that the model has for them."""

    def __init__(self, files: Files, names: Mapping[str, str]) -> None:
        self._files, self._names = files, names

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Layer(Mapping[str, Tensor]):
    """The tensors of one layer, by what follows its name."""

    def __init__(self, files: Mapping[str, Tensor], name: str, parts: tuple[str, ...]) -> None:
        self.files, self.name = files, name
        self.parts = tuple(part for part in parts if f"{name}.{part}" in files)

    def __getitem__(self, part: str) -> Tensor:
        if part not in self.parts:
            raise CheckpointError(f"{part}: is not in the files. The copy is incomplete")
        return self.files[f"{self.name}.{part}"]

    def __contains__(self, part: object) -> bool:  # a Mapping's own would ask for it, and get the error
        return part in self.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@dataclass(frozen=True)
class Imported:
    """A folder that others have quantized, with transformers' configuration of its model."""

    folder: Path
    """The folder that holds the quantized checkpoint, or the file that is one."""

    importer: Importer
    """The importer that reads the layers of this folder."""

    config: Any
    """transformers' configuration, as the folder has it. It is not changed."""

    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""

    @cached_property
    def files(self) -> Mapping[str, Tensor]:
        """All tensors of the folder, or of the file."""
        if isinstance(self.importer, FileImporter):
            own: Mapping[str, Tensor] = reading(str(self.folder), self.importer.tensors, self.folder, self.skeleton)
            return own
        found: Files = reading(str(self.folder), Files, self.folder)
        return Renamed(found, names_in_model(self.skeleton, found)) if changes(self.skeleton) else found

    @cached_property
    def skeleton(self) -> nn.Module:
        """The dense model on the meta device."""
        return skeleton(
            self._plain_config(),
            name=str(self.folder),
            dtype=self._dtype,
            trust_remote_code=self.trust_remote_code,
        )

    def _plain_config(self) -> Any:
        """A copy of the configuration that says nothing of the format."""
        config = copy.deepcopy(self.config)
        for field in self.importer.config_fields:
            if hasattr(config, field):
                delattr(config, field)
        return config

    @property
    def _dtype(self) -> torch.dtype:
        found = getattr(self.config, "dtype", None)
        return found if isinstance(found, torch.dtype) else torch.float16

    @cached_property
    def layers(self) -> dict[str, Parts]:
        """The tensors of each linear layer that is held as codes, by the name of the layer."""
        return {name: parts for name, parts in self._quantized.items() if name not in self.dense}

    @cached_property
    def dense(self) -> dict[str, Parts]:
        """The tensors of each quantized embedding (or head tied to it), which is held as dense numbers, by name."""
        known = dict(self.skeleton.named_modules())
        tables = {id(each.weight) for each in known.values() if isinstance(each, nn.Embedding)}
        return {name: parts for name, parts in self._quantized.items() if id(known[name].weight) in tables}

    @cached_property
    def _quantized(self) -> dict[str, Parts]:
        """The tensors of each quantized layer, by the name of the layer.

        Raises:
            CheckpointError: There is none, or the model has no linear layer and no embedding of that name.
        """
        known = dict(self.skeleton.named_modules())
        every = (*self.importer.parts, *self.importer.optional)
        found: dict[str, Parts] = {}
        for full in self.files:
            name = full.removesuffix(f".{self.importer.parts[0]}")
            if name == full:
                continue
            if not isinstance(known.get(name), nn.Linear | nn.Embedding):
                raise CheckpointError(
                    f"{self.folder}: {name} is quantized in the files, and {type(self.skeleton).__name__} has no "
                    "linear layer of that name (stacks of experts cannot be imported). Give the dense model"
                )
            found[name] = _Layer(self.files, name, every)
        if not found:
            raise CheckpointError(
                f"{self.folder}: says that it is quantized by {self.importer.name}, and holds no "
                f"{self.importer.parts[0]}. Remove quantization_config from config.json if it is dense"
            )
        return found

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """The layout of each quantized layer, by the name of the layer."""
        found = {}
        for name, parts in self.layers.items():
            with locate(f"{self.folder}: {name}"):
                linear: Any = self.skeleton.get_submodule(name)
                found[name] = self.importer.layout(parts, linear.out_features, linear.in_features)
        return found

    def translated(self) -> Any:
        """Transformers' configuration of the model as quadapt holds it; its fingerprint is not known before loading."""
        config = self._plain_config()
        dense = left_over(self.skeleton, "not quantized in the checkpoint")
        dense |= {name: f"{dense[name]}, quantized in the checkpoint and held as its numbers" for name in self.dense}
        content = QuadaptConfig.of(
            self.layouts,
            left={name: why for name, why in dense.items() if name not in self.layouts},
            made={"imported": self.importer.name, **self.importer.model_dump(mode="json", exclude_none=True)},
            fingerprint="",
        )
        config.quantization_config = content.to_dict()  # as it would stand in config.json
        return config

    def tensors(self, *, read: bool = True) -> dict[str, Tensor]:
        """What a folder by quadapt would hold: the stored form of quantized layers, and all else as it is.

        Args:
            read: False gives mere shapes of the former, on the meta device.
        """
        belongs = {f"{name}.{part}" for name, parts in self._quantized.items() for part in parts}
        state = {name: self.files[name] for name in self.files if name not in belongs}
        for name, parts in self.dense.items():
            with locate(f"{self.folder}: {name}"):
                like: Any = self.skeleton.get_submodule(name).weight
                state[f"{name}.weight"] = self.importer.dense(parts, *like.shape) if read else torch.empty_like(like)
        for name, layout in self.layouts.items():
            with locate(f"{self.folder}: {name}"):
                self._check_bias(name, state)
                made = self.importer.weight(self.layers[name], layout).tensors if read else _shapes(layout)
            state |= {f"{name}.{part}": tensor for part, tensor in made.items()}
        return state

    def _check_bias(self, name: str, state: dict[str, Tensor]) -> None:
        """Leave out a bias of zeros that the model does not have, as some libraries write one for every layer.

        Raises:
            CheckpointError: It is not zero.
        """
        linear: Any = self.skeleton.get_submodule(name)
        bias = state.get(f"{name}.bias")
        if linear.bias is not None or bias is None:
            return
        if bool((bias != 0).any()):
            raise CheckpointError("has a bias, which the model has no place for. config.json belongs to another model")
        del state[f"{name}.bias"]


def _shapes(layout: Layout) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=torch.int32 if name == "perm" else torch.uint8, device="meta")
        for name, shape in layout.shapes.items()
    }
